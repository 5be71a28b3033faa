"""What a model costs: parameters, MACs, bytes, memory, time; alone, or beside another model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

from safetensors.torch import save
from torch import Tensor, nn

from compressor.interfaces.inputs import ModelInputs, device_of
from compressor.interfaces.instances import check_module
from compressor.profiling.counts import LayerCount, count
from compressor.profiling.latency import Timing, eager_call, interleave
from compressor.profiling.memory import peak_activation_memory
from compressor.profiling.tables import align
from compressor.units import with_unit

Metric = Callable[[nn.Module], Mapping[str, float]]
Measure = Callable[[Mapping[str, nn.Module], ModelInputs], Mapping[str, Timing]]


@dataclass(frozen=True)
class Profile:
    """What one model costs; counts, memory and latency are of one call with the example inputs.

    Attributes:
        name: what the table calls the model.
        params: all parameters, a tied one once.
        macs: multiply-accumulates.
        size_bytes: of the state dict as a safetensors file.
        peak_memory_bytes: of activations.
        latency: None if it was not measured.
        metrics: what the user's evaluation returned; empty without one.
        layers: modules with parameters or MACs.
        uncounted: operations that `macs` does not know, and how often they ran.
    """

    name: str
    params: int
    macs: int
    size_bytes: int
    peak_memory_bytes: int
    latency: Timing | None
    metrics: Mapping[str, float]
    layers: tuple[LayerCount, ...]
    uncounted: Mapping[str, int]

    def __repr__(self) -> str:
        """The table."""
        return self.table()

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    def table(self) -> str:
        """The totals, then a row for each layer."""
        totals = align([[label, value] for label, value in _rows(self).items()])
        parts = [self.name, totals, self._layer_table()]
        if self.uncounted:
            names = ", ".join(f"{name} ({n})" for name, n in sorted(self.uncounted.items()))
            parts.append(f"not counted: {names}")
        return "\n\n".join(parts)

    def _layer_table(self) -> str:
        rows = [["layer", "type", "params", "MACs", "input", "output"]]
        for layer in self.layers:
            shapes = ("×".join(map(str, s)) for s in (layer.input_shape, layer.output_shape))
            counts = (with_unit(layer.params, ""), with_unit(layer.macs, ""))
            rows.append([layer.name or "(model)", layer.type, *counts, *shapes])
        return align(rows)


@dataclass(frozen=True)
class Comparison:
    """Two models, timed in turn. Ratios are reference / compressed: above 1 is better."""

    reference: Profile
    compressed: Profile

    def __repr__(self) -> str:
        """The table."""
        return self.table()

    @property
    def params_ratio(self) -> float:
        """How many times fewer parameters."""
        return _ratio(self.reference.params, self.compressed.params)

    @property
    def macs_ratio(self) -> float:
        """How many times fewer MACs."""
        return _ratio(self.reference.macs, self.compressed.macs)

    @property
    def size_ratio(self) -> float:
        """How many times fewer bytes on disk."""
        return _ratio(self.reference.size_bytes, self.compressed.size_bytes)

    @property
    def memory_ratio(self) -> float:
        """How many times less activation memory."""
        return _ratio(self.reference.peak_memory_bytes, self.compressed.peak_memory_bytes)

    @property
    def latency_ratio(self) -> float | None:
        """How many times faster; None if it was not measured."""
        before, after = self.reference.latency, self.compressed.latency
        return _ratio(before.best_ms, after.best_ms) if before and after else None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            **asdict(self),
            "params_ratio": self.params_ratio,
            "macs_ratio": self.macs_ratio,
            "size_ratio": self.size_ratio,
            "memory_ratio": self.memory_ratio,
            "latency_ratio": self.latency_ratio,
        }

    def table(self) -> str:
        """A row for each figure: before, after, ratio."""
        ratios = {
            "params": self.params_ratio,
            "MACs": self.macs_ratio,
            "size": self.size_ratio,
            "peak memory": self.memory_ratio,
            "latency": self.latency_ratio,
        }
        before, after = _rows(self.reference), _rows(self.compressed)
        rows = [["", self.reference.name, self.compressed.name, "ratio"]]
        for label in before:
            ratio = ratios.get(label)
            rows.append(
                [label, before[label], after[label], "" if ratio is None else f"{ratio:.2f}x"]
            )
        return align(rows)


def measure_eager(models: Mapping[str, nn.Module], inputs: ModelInputs) -> dict[str, Timing]:
    """Latency in eager torch, each model on the device where it is, with torch's own threads."""
    devices = {device_of(model).type for model in models.values()}
    with ExitStack() as stack:
        calls = {name: stack.enter_context(eager_call(m, inputs)) for name, m in models.items()}
        return interleave(calls, device="cuda" if "cuda" in devices else "cpu")


def profile(
    model: nn.Module,
    example_inputs: ModelInputs | Any,
    *,
    name: str = "model",
    metric: Metric | None = None,
    latency: bool = True,
    measure: Measure = measure_eager,
) -> Profile:
    """What `model` costs; nothing about it is changed.

    Args:
        model: on any device.
        example_inputs: a tensor, a tuple of arguments, a dict of keywords, or `ModelInputs`.
        name: what the table calls the model.
        metric: the user's evaluation, called with the model.
        latency: whether to measure it.
        measure: how; `Target.measure` of a target takes models that were deployed there.

    >>> import torch
    >>> result = profile(nn.Linear(16, 4), torch.zeros(2, 16), latency=False)
    >>> result.params, result.macs
    (68, 128)
    """
    check_module("model", model)
    inputs = ModelInputs.of(example_inputs).to(device_of(model))
    timing = measure({name: model}, inputs)[name] if latency else None
    return _profile(model, inputs, name, metric, timing)


def compare(
    reference: nn.Module,
    compressed: nn.Module,
    example_inputs: ModelInputs | Any,
    *,
    metric: Metric | None = None,
    latency: bool = True,
    measure: Measure = measure_eager,
) -> Comparison:
    """Profile two models, timing them in turn so that the ratio holds on a busy machine too.

    Args:
        reference: the model before.
        compressed: the model after.
        example_inputs: as for `profile`.
        metric: as for `profile`.
        latency: as for `profile`.
        measure: as for `profile`.
    """
    check_module("reference", reference)
    check_module("compressed", compressed)
    inputs = ModelInputs.of(example_inputs)
    models = {"reference": reference, "compressed": compressed}
    timings = measure(models, inputs) if latency else {}
    before, after = (
        _profile(model, inputs.to(device_of(model)), name, metric, timings.get(name))
        for name, model in models.items()
    )
    return Comparison(before, after)


def state_size_bytes(model: nn.Module) -> int:
    """Size of the model's state dict as a safetensors file, tied tensors once."""
    unique: dict[tuple[object, ...], tuple[str, Tensor]] = {}
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, Tensor):
            place = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
            unique.setdefault(place if tensor.numel() else (name,), (name, tensor))
    return len(save({name: tensor.contiguous() for name, tensor in unique.values()}))


def _profile(
    model: nn.Module,
    inputs: ModelInputs,
    name: str,
    metric: Metric | None,
    timing: Timing | None,
) -> Profile:
    counts = count(model, inputs)
    return Profile(
        name,
        counts.params,
        counts.macs,
        size_bytes=state_size_bytes(model),
        peak_memory_bytes=peak_activation_memory(model, inputs),
        latency=timing,
        metrics=dict(metric(model)) if metric else {},
        layers=counts.layers,
        uncounted=counts.uncounted,
    )


def _rows(profile: Profile) -> dict[str, str]:
    rows = {name: f"{value:.4g}" for name, value in profile.metrics.items()}
    rows |= {
        "params": with_unit(profile.params, ""),
        "MACs": with_unit(profile.macs, "MACs"),
        "size": with_unit(profile.size_bytes, "B"),
        "peak memory": with_unit(profile.peak_memory_bytes, "B"),
    }
    if profile.latency:
        timing = profile.latency
        rows["latency"] = f"{timing.best_ms:.3g} ms (median {timing.median_ms:.3g})"
    return rows


def _ratio(before: float, after: float) -> float:
    return before / after if after else float("inf") if before else 1.0
