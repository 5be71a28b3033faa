"""Copies, graphs and shapes of a model, with errors that name the part which is in the way."""

from __future__ import annotations

import contextlib
import copy
import io
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from compressor.errors import ModelError, first_line
from compressor.interfaces.inputs import ModelInputs

M = TypeVar("M", bound=nn.Module)
# What a user's `forward`, and the tools that trace it, raise when they cannot go on.
FORWARD_FAILURES = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    NameError,
    RuntimeError,
    TypeError,
    ValueError,
)
COPY_FAILURES = (*FORWARD_FAILURES, copy.Error)


def copy_model(model: nn.Module) -> nn.Module:
    """A deep copy of `model`.

    Raises:
        ModelError: if an attribute cannot be copied; the message has its path.
    """
    try:
        return copy.deepcopy(model)
    except COPY_FAILURES as error:
        path = _uncopyable(model)
        raise ModelError(
            f"The model cannot be deep-copied because of {path!r}: {first_line(error)} "
            "Create it in `forward`, keep it outside the model, or give it a `__deepcopy__`."
        ) from error


def in_eval(model: M) -> M:
    """`model`, now in eval mode."""
    return in_mode(model, is_training=False)


def in_mode(model: M, *, is_training: bool) -> M:
    """`model`, now in that mode. A `train` of the user's own may forget to return it."""
    model.train(is_training)
    return model


def copy_for_analysis(model: nn.Module) -> nn.Module:
    """A deep copy on the CPU in eval mode that keeps no cache of what it has seen.

    Decoders of Hugging Face return their cache, a class that no graph can hold.

    Raises:
        ModelError: as `copy_model`.
    """
    copied = in_eval(copy_model(model).cpu())
    for module in copied.modules():
        config = getattr(module, "config", None)
        if getattr(config, "use_cache", None) is True:
            config.use_cache = False  # type: ignore[union-attr]
    return copied


def copy_skeleton(model: nn.Module) -> nn.Module:
    """A copy of `model`'s modules that shares all tensors with it, also those in plain attributes.

    For structural edits that are thrown away: surgery puts new tensors into the copy. Values must
    not be written into it, as by training. To compare with later, see `describe.outline`.

    Raises:
        ModelError: as `copy_model`.
    """
    try:
        shared = {id(tensor): tensor for tensor in _tensors(model)}
        return copy.deepcopy(model, shared)
    except COPY_FAILURES:
        return copy_model(model)


def export_graph(model: nn.Module, inputs: ModelInputs) -> torch.export.ExportedProgram:
    """The ATen graph of `model` in eval mode, with shapes fixed to those of `inputs`.

    Raises:
        ModelError: if the model does not run on `inputs`, or cannot be traced; names the module.
    """
    with eval_mode(model):
        try:
            return export(model, inputs)
        except FORWARD_FAILURES as error:
            run(model, inputs)
            name, cause = _untraceable(model, inputs, error)
            where = f"its module {name!r}" if name else "its own `forward`"
            raise ModelError(
                f"The model cannot be traced because of {where}: {first_line(cause)} "
                "Python control flow must not depend on tensor values: write it with torch.where, "
                "and keep `.item()`, `.numpy()` and calls of other libraries out of `forward`."
            ) from error


def export(model: nn.Module, inputs: ModelInputs) -> torch.export.ExportedProgram:
    """The ATen graph of `model` in the mode it is in, or whatever tracing it raises."""
    # When it fails, torch prints all that it had traced.
    with torch.no_grad(), contextlib.redirect_stderr(io.StringIO()), quiet_lstm():
        return torch.export.export(model, inputs.args, dict(inputs.kwargs), strict=False)


@contextmanager
def quiet_lstm() -> Iterator[None]:
    """Without what torch warns of in its own LSTM.

    It has a list of its weights; and once an ONNX file was written, torch tries a loop instead.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The tensor attributes? .*_flat_weights", UserWarning)
        warnings.filterwarnings("ignore", "_check_is_size will be removed", FutureWarning)
        yield


def input_shapes(model: nn.Module, inputs: ModelInputs) -> dict[str, tuple[int, ...]]:
    """Shape of the first tensor that each module takes, by name; of its first call.

    Modules that are not called, or take no tensor, are not listed.

    Raises:
        ModelError: if the model does not run on `inputs`.
    """
    shapes: dict[str, tuple[int, ...]] = {}

    def note(name: str, received: ModelInputs, _: Any) -> None:
        tensors = received.tensors()
        if tensors:
            shapes.setdefault(name, tuple(tensors[0].shape))

    watch(model, inputs, note)
    return shapes


def watch(
    model: nn.Module, inputs: ModelInputs, note: Callable[[str, ModelInputs, Any], None]
) -> Any:
    """Run `model` in eval mode; after every call of a module, `note(name, arguments, outputs)`.

    Returns:
        The model's outputs.

    Raises:
        ModelError: if the model does not run on `inputs`.
    """

    def hook(name: str) -> Callable[..., None]:
        return lambda _, args, kwargs, outputs: note(name, ModelInputs(args, kwargs), outputs)

    with eval_mode(model), torch.no_grad():
        handles = [
            module.register_forward_hook(hook(name), with_kwargs=True)
            for name, module in model.named_modules()
        ]
        try:
            return run(model, inputs)
        finally:
            for handle in handles:
                handle.remove()


def run(model: nn.Module, inputs: ModelInputs) -> Any:
    """`inputs.call(model)`, its failure as a `ModelError`."""
    try:
        return inputs.call(model)
    except FORWARD_FAILURES as error:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in inputs.tensors())
        raise ModelError(
            f"The model does not run on inputs of shapes {shapes or 'none'}: {first_line(error)} "
            "Check the forward pass and that model and batch are on one device."
        ) from error


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """`model` in eval mode; every module gets its own mode back."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    for module in model.modules():
        yield from _tensors_in(vars(module))


def _tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors_in(item)


def _uncopyable(model: nn.Module) -> str:
    """Path of the first attribute that `deepcopy` refuses."""
    for prefix, module in model.named_modules():
        stores = {**module._parameters, **module._buffers}
        attributes = {key: value for key, value in vars(module).items() if key != "_modules"}
        for key, value in {**stores, **attributes}.items():
            try:
                copy.deepcopy(value)
            except COPY_FAILURES:
                return f"{prefix}.{key}" if prefix else key
    return type(model).__name__


def _untraceable(model: nn.Module, inputs: ModelInputs, error: Exception) -> tuple[str, Exception]:
    """The innermost module that cannot be traced by itself, and why."""
    received: dict[str, ModelInputs] = {}

    def note(name: str, arguments: ModelInputs, _: Any) -> None:
        received.setdefault(name, arguments)

    watch(model, inputs, note)
    culprit = ""
    traceable: list[str] = []
    for name, module in model.named_modules():  # a parent comes before its children
        inside = not culprit or name.startswith(f"{culprit}.")
        if not name or name not in received or not inside or name.startswith(tuple(traceable)):
            continue
        try:
            export(module, received[name])
            traceable.append(f"{name}.")
        except FORWARD_FAILURES as cause:
            culprit, error = name, cause
    return culprit, error
