"""Everything that can be wrong with a job, tried once on two batches, before any work."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from compressor.config import Config
from compressor.errors import DataError, LossError, MetricError, first_line
from compressor.frameworks.defaults import CrossEntropy
from compressor.interfaces.data import DataLoaderView, kept_generators, move, take
from compressor.interfaces.device import Device
from compressor.interfaces.inputs import output_tensors
from compressor.interfaces.optimizers import DEFAULT_LR, make_optimizer, make_scheduler
from compressor.interfaces.task import Task
from compressor.seeding import isolated_rng
from compressor.structure.trace import copy_model

TRIED_BATCHES = 2
# What user code raises when a batch does not fit it.
USER_FAILURES = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    NotImplementedError,
    RuntimeError,
    TypeError,
    ValueError,
)


def check_calls(
    task: Task,
    model: nn.Module,
    splits: Mapping[str, DataLoaderView],
    device: torch.device,
    seed: int,
) -> None:
    """Call the model on two batches of each split.

    Args:
        task: the user's functions.
        model: not changed.
        splits: by name.
        device: of the job.
        seed: of anything random in the user's code.

    Raises:
        DataError: if the model cannot be called on a batch, or returns no tensor.
    """
    probe = copy_model(model)
    for name, loader in splits.items():
        with isolated_rng(seed), kept_generators(loader):
            for batch in take(loader, TRIED_BATCHES):
                _check_call(task, probe, name, batch, device)


def check_default_evaluation(
    task: Task,
    model: nn.Module,
    split: str,
    loader: DataLoaderView,
    device: Device,
    seed: int,
) -> None:
    """Judge two batches by the evaluation that a job has whose user gave none.

    Args:
        task: has the default.
        model: not changed.
        split: that is judged, for the message.
        loader: of that split.
        device: of the job.
        seed: of anything random in the user's code.

    Raises:
        MetricError: if the default does not suit the batches, or has no such metric.
    """
    with isolated_rng(seed), kept_generators(loader):
        batches = list(take(loader, TRIED_BATCHES))
        try:
            task.evaluate(copy_model(model), batches, device)
        except MetricError:
            raise
        except USER_FAILURES as error:
            raise MetricError(
                "No eval_func was given, and the default one, the accuracy of a classifier, wants "
                f"batches (inputs, labels): it fails on a batch of split {split!r}, "
                f"{_form(batches[0])}{_cause(error)} Give an eval_func(model, data_loader) that "
                "returns a dict such as {'accuracy': 91.7}."
            ) from error


def check_training(
    task: Task,
    model: nn.Module,
    splits: Mapping[str, DataLoaderView],
    device: torch.device,
    config: Config,
) -> None:
    """Make the optimizers and schedulers, and call the loss with its gradient on two batches.

    Raises:
        ConfigError: if an optimizer or scheduler cannot be made.
        ModelError: if no parameter of the model requires a gradient.
        LossError: if the loss raises, is not a finite scalar, or has no gradient.
    """
    probe = copy_model(model)
    if config.external_training_loop is None:
        for settings in (config.fine_tuner, config.full_trainer):
            optimizer = make_optimizer(settings.optimizer, probe, default_lr=DEFAULT_LR)
            make_scheduler(settings.scheduler, optimizer)
    with isolated_rng(config.seed), kept_generators(splits["train"]):
        for batch in take(splits["train"], TRIED_BATCHES):
            _check_loss(task, probe, move(batch, device))


def answers_alike(
    task: Task, model: nn.Module, batch: Any, device: torch.device, seed: int
) -> bool:
    """Whether `model` gives tensors of the same shapes in training as in evaluation.

    Detectors often do not: raw maps in training, or losses, which want targets; else boxes.

    Args:
        task: the user's functions.
        model: on `device`; not changed.
        batch: of the training split.
        device: of the job.
        seed: of anything random in the user's code.
    """
    probe = copy_model(model)
    with isolated_rng(seed), torch.no_grad():
        judged = output_tensors(task.outputs(probe.eval(), batch, device))
        try:
            trained = output_tensors(task.outputs(probe.train(), batch, device))
        except USER_FAILURES:
            return False
    return [tensor.shape for tensor in judged] == [tensor.shape for tensor in trained]


def _check_call(task: Task, model: nn.Module, split: str, batch: Any, device: torch.device) -> None:
    model.eval()
    try:
        with torch.no_grad():
            outputs = task.outputs(model, batch, device)
    except DataError:
        raise
    except USER_FAILURES as error:
        raise DataError(
            f"The model could not be called on a batch of split {split!r}: {first_line(error)} "
            "Check "
            "`model_input_pattern`, or write `extract_model_inputs` and `model_call` of your "
            "forward pass."
        ) from error
    if not output_tensors(outputs):
        raise DataError(
            f"The model returned no floating point tensor on split {split!r}, but "
            f"{type(outputs).__name__}. It must return tensors, in any nesting of tuple, list and "
            "dict."
        )


def _check_loss(task: Task, model: nn.Module, batch: Any) -> None:
    model.train()
    try:
        terms = task.loss(model, batch)
    except LossError:
        raise
    except USER_FAILURES as error:
        if isinstance(task.loss_function, CrossEntropy):
            raise LossError(
                "No loss_function_cls was given, and the default one, cross-entropy, wants batches "
                f"(inputs, labels): it fails on a training batch, {_form(batch)}{_cause(error)} "
                "Give a LossFunction whose __call__(model, batch) returns the loss."
            ) from error
        raise LossError(
            f"The loss function raised {type(error).__name__} on a training batch: "
            f"{first_line(error)} It is called as `loss(model, batch)` with a batch as the loader "
            "gives it."
        ) from error
    total = torch.stack([term.float() for term in terms.values()]).sum()
    if not bool(total.isfinite()):
        values = ", ".join(f"{name}={term.item():g}" for name, term in terms.items())
        raise LossError(
            f"The loss is not finite on the first training batches: {values}. Check targets and "
            "the scale of the inputs."
        )
    if not total.requires_grad:
        raise LossError(
            "The loss does not depend on the model: it has no gradient. Compute it from what the "
            "model returns, without `.detach()`, `.item()` or `torch.no_grad()`."
        )
    model.zero_grad()
    total.backward()  # type: ignore[no-untyped-call]


def _form(batch: Any) -> str:
    kind = f"a {type(batch).__name__}"
    if isinstance(batch, Mapping):
        return f"{kind} with the keys {list(batch)}"
    return f"{kind} of {len(batch)}" if isinstance(batch, (tuple, list)) else kind


def _cause(error: Exception) -> str:
    """What a default raised; how it would like its batches is said already."""
    return "." if isinstance(error, DataError) else f": {first_line(error)}"
