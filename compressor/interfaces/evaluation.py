"""Evaluation, `(model, loader)` to metrics: the user's, called as its signature allows, or ours."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from compressor.errors import DataError, MetricError, suggest
from compressor.interfaces.data import DataLoaderView, kept_generators, move, sample_count
from compressor.interfaces.device import Device
from compressor.interfaces.forward_pass import ForwardPass, TorchForwardPass
from compressor.interfaces.inputs import device_of, output_tensors
from compressor.interfaces.loss import Loss, call_loss
from compressor.interfaces.metrics import answer_count, count_right

Evaluation: TypeAlias = Callable[..., Any]
Transform: TypeAlias = Callable[[Any], Any] | None
BARE_NUMBER = "metric"  # what a number is called that comes without a name
USUAL_KEYS = ("map", "miou")  # of detection and segmentation, where no eval_key says which counts


class EvaluationFunction:
    """Judges a model on a loader. Override `apply`, or `__call__`."""

    def apply(self, model: nn.Module, data_loader: Any, **kwargs: Any) -> Mapping[str, Any]:
        """Metrics by name."""
        raise NotImplementedError(f"{type(self).__name__} needs an apply(model, data_loader).")

    def __call__(self, model: nn.Module, data_loader: Any, **kwargs: Any) -> Mapping[str, Any]:
        """Metrics by name."""
        return self.apply(model, data_loader, **accepted(self.apply, kwargs))


class TorchEvaluationFunction(EvaluationFunction):
    """Override `_compute_inference`: the model is on the device, in eval mode, without grad.

    Subclasses that forget `super().__init__()` work.
    """

    def apply(
        self,
        model: nn.Module,
        data_loader: Any,
        device: Device = Device.CPU,
        transform: Transform = None,
        **kwargs: Any,
    ) -> Mapping[str, Any]:
        """Metrics by name. The model's device and mode are put back.

        Args:
            model: is judged.
            data_loader: yields batches.
            device: where the model runs.
            transform: of every batch, before it is used; None: none.
            kwargs: for `_compute_inference`.
        """
        before = device_of(model)
        options = {"device": Device.of(device), "transform": transform, **kwargs}
        try:
            with evaluating(model), torch.no_grad():
                model.to(options["device"].torch_device)
                compute = self._compute_inference
                return compute(model, data_loader, **accepted(compute, options))
        finally:
            model.to(before)

    def _compute_inference(
        self,
        model: nn.Module,
        data_loader: Any,
        device: Device = Device.CPU,
        transform: Transform = None,
    ) -> Mapping[str, Any]:
        raise NotImplementedError(
            f"{type(self).__name__} needs a _compute_inference(model, loader)."
        )


def evaluate(
    eval_func: Evaluation,
    model: nn.Module,
    loader: Iterable[Any],
    device: Device,
    key: str | None,
) -> dict[str, float]:
    """The user's metrics of `model`, which is moved to `device`; its mode and flags are put back.

    So are the loader's own generators.

    Args:
        eval_func: called with (model, loader), and with `device` if it takes one.
        model: is judged in eval mode, without grad.
        loader: reaches `eval_func` as a `DataLoaderView`.
        device: where the model runs.
        key: the metric that counts; None: the only one there is, or among several the one that is
            called mAP or mIoU, in any case.

    Returns:
        The metrics that are finite numbers; `key` is among them, or the first one.

    Raises:
        MetricError: if it is not, or `eval_func` returns neither numbers by name nor a number.
    """
    view = loader if isinstance(loader, DataLoaderView) else DataLoaderView(loader)
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.to(device.torch_device)
    try:
        with evaluating(model), torch.no_grad(), kept_generators(view):
            returned = _call(eval_func, model, view, device)
    finally:
        model.to(device.torch_device)  # functions that move it elsewhere
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
    return _check_metrics(returned, key)


class _Classification(TorchEvaluationFunction):
    """Counts right answers.

    Args:
        forward_pass: how a batch becomes a call; default: its first of two elements is the input.
        label: position or key of the labels in a batch.
    """

    def __init__(self, forward_pass: ForwardPass | None = None, label: int | str = 1) -> None:
        self.forward_pass = forward_pass or TorchForwardPass()
        self.label = label

    def _compute_inference(
        self,
        model: nn.Module,
        data_loader: Any,
        device: Device = Device.CPU,
        transform: Transform = None,
    ) -> Mapping[str, float]:
        right: Tensor | None = None
        seen = 0
        for batch in data_loader:
            if transform is not None:
                batch = transform(batch)
            outputs = self.forward_pass.perform(model, batch, device)
            logits = _logits(outputs)
            labels = move(batch[self.label], logits.device, non_blocking=True)
            counted = self._count_right(logits, labels)
            right = counted if right is None else right + counted  # no wait for the GPU
            seen += answer_count(logits)
        if right is None:
            raise DataError("The loader of the evaluation yields no batch. Check its dataset.")
        return self._name([100 * float(value) / seen for value in right])

    def _count_right(self, logits: Tensor, labels: Tensor) -> Tensor:
        return count_right(logits, labels, topk=(1,))

    def _name(self, percent: Sequence[float]) -> Mapping[str, float]:
        raise NotImplementedError


class Accuracy(_Classification):
    """{"accuracy": percent of right answers, 0 to 100}."""

    def _name(self, percent: Sequence[float]) -> Mapping[str, float]:
        return {"accuracy": percent[0]}


class Missclass(_Classification):
    """{"missclass": percent of wrong answers, 0 to 100}; less is better."""

    def _name(self, percent: Sequence[float]) -> Mapping[str, float]:
        return {"missclass": 100 - percent[0]}


class TopK(_Classification):
    """{"top-1": percent, "top-5": percent}: the label is among the k highest scores.

    Args:
        topk: values of k; one above the number of classes counts every answer as right.
        forward_pass: how a batch becomes a call; default: its first of two elements is the input.
        label: position or key of the labels in a batch.
    """

    def __init__(
        self,
        topk: Sequence[int] = (1, 5),
        forward_pass: ForwardPass | None = None,
        label: int | str = 1,
    ) -> None:
        super().__init__(forward_pass, label)
        self.topk = tuple(topk)

    def _count_right(self, logits: Tensor, labels: Tensor) -> Tensor:
        return count_right(logits, labels, self.topk)

    def _name(self, percent: Sequence[float]) -> Mapping[str, float]:
        return {f"top-{k}": value for k, value in zip(self.topk, percent, strict=True)}


class EvalLossFunction(TorchEvaluationFunction):
    """{"loss": mean over all samples}; less is better.

    Args:
        loss_function: of (model, batch), a mean over the batch.
    """

    def __init__(self, loss_function: Loss) -> None:
        self.loss_function = loss_function

    def _compute_inference(
        self,
        model: nn.Module,
        data_loader: Any,
        device: Device = Device.CPU,
        transform: Transform = None,
    ) -> Mapping[str, float]:
        to_device = getattr(self.loss_function, "to_device", None)
        if callable(to_device):
            to_device(device)
        total, seen = 0.0, 0
        for batch in data_loader:
            if transform is not None:
                batch = transform(batch)
            terms = call_loss(self.loss_function, model, batch)
            samples = sample_count(batch)
            total += samples * sum(float(term) for term in terms.values())
            seen += samples
        if not seen:
            raise DataError("The loader of the evaluation yields no batch. Check its dataset.")
        return {"loss": total / seen}


def get_accuracy(
    model: nn.Module, data_loader: Any, device: Device = Device.CPU, transform: Transform = None
) -> Mapping[str, float]:
    """`Accuracy` of a model whose batches are (input, label)."""
    return Accuracy()(model, data_loader, device=device, transform=transform)


def get_missclass(
    model: nn.Module, data_loader: Any, device: Device = Device.CPU, transform: Transform = None
) -> Mapping[str, float]:
    """`Missclass` of a model whose batches are (input, label)."""
    return Missclass()(model, data_loader, device=device, transform=transform)


def get_topk(
    model: nn.Module,
    data_loader: Any,
    device: Device = Device.CPU,
    transform: Transform = None,
    topk: Sequence[int] = (1, 5),
) -> Mapping[str, float]:
    """`TopK` of a model whose batches are (input, label)."""
    return TopK(topk)(model, data_loader, device=device, transform=transform)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put `model` into eval mode, in place; each module has its own mode back after."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def model_device(model: nn.Module) -> Device:
    """Where the parameters of `model` are; CPU without any."""
    return Device.of(device_of(model).type)


def accepted(function: Callable[..., Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of `options` that `function` takes by name.

    >>> accepted(lambda model, loader, device=None: 0, {"device": "cpu", "transform": None})
    {'device': 'cpu'}
    """
    parameters = inspect.signature(function).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return dict(options)
    named = {
        parameter.name
        for parameter in parameters
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    }
    return {key: value for key, value in options.items() if key in named}


def _call(eval_func: Evaluation, model: nn.Module, view: DataLoaderView, device: Device) -> object:
    if isinstance(eval_func, type):
        raise MetricError(
            f"The evaluation is the class {eval_func.__name__} itself. Give an instance of it: "
            f"eval_func={eval_func.__name__}()."
        )
    try:
        options = accepted(eval_func, {"device": device})
        inspect.signature(eval_func).bind(model, view, **options)
    except (TypeError, ValueError) as error:
        name = getattr(eval_func, "__name__", type(eval_func).__name__)
        raise MetricError(
            f"The evaluation {name} cannot be called with (model, data_loader): {error}. "
            "Its other arguments need defaults; `device` may be one of them."
        ) from error
    result: object = eval_func(model, view, **options)
    return result


def _check_metrics(returned: object, key: str | None) -> dict[str, float]:
    if not isinstance(returned, Mapping):
        number = _number(returned)
        if number is None:
            raise MetricError(
                f"The evaluation returned a {type(returned).__name__}. "
                "Return a dict of numbers, such as {'accuracy': 91.7}."
            )
        returned = {key or BARE_NUMBER: number}
    numbers = {str(name): _number(value) for name, value in returned.items()}
    metrics = {name: value for name, value in numbers.items() if value is not None}
    finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
    if key is None:
        usual = [name for name in finite if name.lower() in USUAL_KEYS]
        if len(finite) == 1 or len(usual) == 1:
            return {name: finite[name] for name in (*usual, *finite)}
        raise MetricError(
            f"The evaluation returned {len(finite)} finite numbers ({', '.join(finite)}), and no "
            "eval_key says which counts. Write eval_key in the configuration."
        )
    if key not in numbers:
        raise MetricError(
            f"The evaluation returned no {key!r}, which is the eval_key. {suggest(key, numbers)} "
            "Write one of these as eval_key."
        )
    if key not in metrics:
        raise MetricError(f"The metric {key!r} is not a number. Return one number for it.")
    if key not in finite:
        raise MetricError(
            f"The metric {key!r} is {metrics[key]}. "
            "Check the evaluation for a division by zero, and the model's outputs for NaN."
        )
    return finite


def _number(value: Any) -> float | None:
    """`value` as a float; None if it is none (a table, a text)."""
    if isinstance(value, (str, bytes)):
        return None
    try:
        return float(value)  # also a tensor or array with one element
    except (TypeError, ValueError, RuntimeError):
        return None


def _logits(outputs: Any) -> Tensor:
    tensors = output_tensors(outputs)
    if not tensors:
        raise MetricError(
            f"The model returned a {type(outputs).__name__} without a floating point tensor. "
            "Write your own TorchEvaluationFunction for it."
        )
    return tensors[0]
