"""What the layers of an unchanged model give, at a few positions of a small sample."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from compressor.interfaces.inputs import ModelInputs
from compressor.seeding import generator
from compressor.structure.repair.linear_maps import (
    LinearMap,
    Positions,
    as_linear_map,
    draw_positions,
    fan_in,
    outputs_at,
    position_shape,
)
from compressor.structure.run_record import INPUT, Place, RunRecord, first_tensor
from compressor.structure.surgery import holders_of
from compressor.structure.trace import FORWARD_FAILURES, eval_mode, run

LEAST_POSITIONS = 16384
PER_ENTRY = 20  # positions for each entry that an output is computed from
MOST_WORK = 8  # of the least squares, times that of the layer itself
MOST_BYTES = 512 * 2**20  # of all that is kept
HELD_FRACTION = 0.125  # of the samples


@dataclass(frozen=True)
class Target:
    """What one layer gave.

    Attributes:
        shape: of its output, without the channels.
        positions: in that shape, in random order.
        is_held: (positions,); those on which a repair is judged, all of some samples.
        outputs: (positions, outputs).
        sums: the same of the sum that the output, or the norm of it, is a part of; None if there is
            none.
    """

    shape: tuple[int, ...]
    positions: Positions
    is_held: Tensor
    outputs: Tensor
    sums: Tensor | None


def linear_maps(model: nn.Module, record: RunRecord) -> dict[str, LinearMap]:
    """Layers that can be repaired: called once, with a weight of their own."""
    shared = {key for key, holders in holders_of(model).items() if len(holders) > 1}
    found = {}
    for name, module in model.named_modules():
        layer = as_linear_map(module)
        if layer is not None and record.counts[name] == 1 and name in record.shapes:
            if id(layer.weight) not in shared:
                found[name] = layer
    return found


def record_targets(model: nn.Module, record: RunRecord, inputs: ModelInputs) -> dict[str, Target]:
    """What the layers of `model` give on `inputs`, by their names; in one pass.

    Layers with fewer positions than entries to be found have none.

    Args:
        model: is not changed.
        record: of a run of it.
        inputs: on its device; as many samples as are to be repaired with.
    """
    layers = linear_maps(model, record)
    modules = dict(model.named_modules())
    drawn = _draw(layers, record, inputs)
    others = Others(record, layers, drawn)
    outputs: dict[str, Tensor] = {}

    def note(name: str, _: nn.Module, args: Any, output: Tensor) -> None:
        del args
        shape, positions = drawn[name]
        if position_shape(layers[name], tuple(output.shape)) == shape:
            outputs[name] = outputs_at(layers[name], output, positions)

    handles = [layers[name].register_forward_hook(partial(note, name)) for name in drawn]
    with eval_mode(model), torch.no_grad(), others.watched(modules):
        try:
            run(model, inputs)
        finally:
            for handle in handles:
                handle.remove()
    found = {}
    for name, values in outputs.items():
        shape, positions = drawn[name]
        norm = modules.get(record.norms.get(name, name))
        other, sums = others.values.get(name), None
        if other is not None and other.shape == values.shape:
            sums = other + (apply_norm(norm, values) if isinstance(norm, _BatchNorm) else values)
        is_held = positions[0] < max(1, round(HELD_FRACTION * shape[0]))
        found[name] = Target(shape, positions, is_held, values, sums)
    return found


def apply_norm(norm: _BatchNorm, values: Tensor) -> Tensor:
    """What a batch norm in eval mode makes of (positions, channels)."""
    assert norm.running_mean is not None
    return (values - norm.running_mean) * norm_gain(norm) + (0 if norm.bias is None else norm.bias)


def norm_gain(norm: _BatchNorm) -> Tensor:
    """(channels,) by which a batch norm in eval mode multiplies."""
    assert norm.running_var is not None
    gain = (norm.running_var + norm.eps).rsqrt()
    return gain if norm.weight is None else gain * norm.weight


class Others:
    """The tensors that outputs of layers are added to, seen before the layers run.

    Attributes:
        values: (positions, channels) by the layer.
    """

    def __init__(
        self,
        record: RunRecord,
        layers: Mapping[str, LinearMap],
        drawn: Mapping[str, tuple[tuple[int, ...], Positions]],
    ) -> None:
        """Look for the sums of the layers in `drawn`, at its positions of outputs of its shapes."""
        self.values: dict[str, Tensor] = {}
        self._layers = layers
        self._drawn = drawn
        self._through = {name: record.sums[name].through for name in drawn if name in record.sums}
        self._modules: Mapping[str, nn.Module] = {}
        self._places: dict[Place, list[str]] = {}
        for name in drawn:
            if name in record.sums:
                for place in record.sums[name].others:
                    self._places.setdefault(place, []).append(name)

    @contextmanager
    def watched(self, modules: Mapping[str, nn.Module]) -> Iterator[None]:
        """Inside the `with`, runs of the model with these modules fill `values`."""
        self._modules = modules
        handles: list[Any] = []
        for (name, kind), layers in self._places.items():
            if name not in modules:
                continue
            if kind == INPUT:
                hook = partial(self._take, layers)
                handles.append(modules[name].register_forward_pre_hook(hook, with_kwargs=True))
            else:
                handles.append(modules[name].register_forward_hook(partial(self._give, layers)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _take(self, layers: list[str], _: nn.Module, args: Any, kwargs: Any) -> None:
        self._note(layers, first_tensor((args, kwargs)))

    def _give(self, layers: list[str], _: nn.Module, args: Any, output: Any) -> None:
        del args
        self._note(layers, first_tensor(output))

    def _note(self, names: list[str], value: Tensor | None) -> None:
        for name in names:
            layer, (shape, positions) = self._layers[name], self._drawn[name]
            value = self._passed(self._through[name], value)
            if value is not None and value.dim() == len(shape) + 1:
                if position_shape(layer, tuple(value.shape)) == shape:
                    self.values[name] = outputs_at(layer, value, positions)

    def _passed(self, name: str, value: Tensor | None) -> Tensor | None:
        """What the module `name` makes of it, if there is one to go through."""
        if not name or value is None:
            return value
        try:
            return first_tensor(self._modules[name].forward(value))
        except FORWARD_FAILURES:  # edited, or what it takes is
            return None


def _draw(
    layers: Mapping[str, LinearMap], record: RunRecord, inputs: ModelInputs
) -> dict[str, tuple[tuple[int, ...], Positions]]:
    """Shape of the output on `inputs`, and positions in it, for each layer that has enough."""
    shapes, counts = {}, {}
    for name, layer in layers.items():
        shape = position_shape(layer, record.shapes[name])
        shape = (shape[0] * inputs.batch_size // record.samples, *shape[1:]) if shape else shape
        entries, total = fan_in(layer), math.prod(shape)
        groups = getattr(layer, "groups", 1)
        affordable = MOST_WORK * total * len(layer.weight) // (groups * entries)
        count = min(total, max(LEAST_POSITIONS, PER_ENTRY * entries), affordable)
        shapes[name], counts[name] = shape, count
    size = sum(8 * count * len(layers[name].weight) for name, count in counts.items())
    share = min(1.0, MOST_BYTES / max(size, 1))
    found = {}
    for name, shape in shapes.items():
        count = int(share * counts[name])
        if (1 - HELD_FRACTION) * count > fan_in(layers[name]):
            drawn = draw_positions(shape, count, generator(0, "repair", name))
            device = layers[name].weight.device
            found[name] = (shape, tuple(numbers.to(device) for numbers in drawn))
    return found
