"""What choices do to a model's layers, and what a layer then costs: the torch side of `Space`.

Layers are convolutions and linear layers: they hold nearly all of the cost, and a layer of another
width is made here to be counted or timed without building the whole variant.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from torch import nn
from torch.nn.modules.conv import _ConvNd

from compressor.search.space import FLOAT_BITS, LayerChange, LayerCost, LayerState

Layer: TypeAlias = _ConvNd | nn.Linear
Shape = tuple[int, ...]

FLOAT_BYTES = 4


def costly_layers(model: nn.Module) -> dict[str, Layer]:
    """Every convolution and linear layer by its first name; a shared one counts once."""
    return {name: m for name, m in model.named_modules() if isinstance(m, (_ConvNd, nn.Linear))}


def layer_state(layer: Layer) -> LayerState:
    """Widths of `layer`, in float."""
    if isinstance(layer, nn.Linear):
        return LayerState(layer.in_features, layer.out_features)
    return LayerState(layer.in_channels, layer.out_channels)


def structural_changes(
    before: Mapping[str, LayerState], model: nn.Module
) -> dict[str, LayerChange]:
    """How the layers of `model`, an edited copy, differ from `before`."""
    after = {name: layer_state(layer) for name, layer in costly_layers(model).items()}
    changes = {}
    for name, state in before.items():
        if name not in after:
            changes[name] = LayerChange(removes=True)
        elif after[name] != state:
            changes[name] = LayerChange(
                after[name].inputs - state.inputs, after[name].outputs - state.outputs
            )
    return changes


def resized(layer: Layer, state: LayerState) -> Layer:
    """A fresh layer like `layer` with the widths of `state`; weights are random."""
    has_bias = layer.bias is not None
    if isinstance(layer, nn.Linear):
        return nn.Linear(state.inputs, state.outputs, bias=has_bias)
    # A depthwise layer loses a group with each channel; other groups keep their number.
    is_depthwise = layer.groups > 1 and layer.groups == layer.in_channels
    made: Layer = _class(layer)(
        state.inputs,
        state.outputs,
        layer.kernel_size,
        stride=layer.stride,
        padding=layer.padding,
        dilation=layer.dilation,
        groups=state.inputs if is_depthwise else layer.groups,
        bias=has_bias,
    )
    return made


def _class(layer: _ConvNd) -> Any:
    return type(layer)  # one of the six; their common base is not made


def resized_input(layer: Layer, shape: Shape, inputs: int) -> Shape:
    """`shape` of the layer's input with `inputs` channels or features."""
    axis = len(shape) - 1 if isinstance(layer, nn.Linear) else 1
    return (*shape[:axis], inputs, *shape[axis + 1 :])


def weight_count(layer: Layer, state: LayerState) -> int:
    """Entries of the weight in that state."""
    made = layer_state(layer)
    full = layer.weight.numel()
    if not isinstance(layer, nn.Linear) and layer.groups > 1 and layer.groups == made.inputs:
        return full * state.outputs // made.outputs
    return full * state.inputs * state.outputs // (made.inputs * made.outputs)


def size_cost(layers: Mapping[str, Layer]) -> LayerCost:
    """Bytes of a layer's weight at its bits, and of its bias in 32."""

    def cost(name: str, state: LayerState) -> float:
        if state.is_removed:
            return 0.0
        layer = layers[name]
        bias = 0 if layer.bias is None else state.outputs
        return weight_count(layer, state) * state.bits / 8 + bias * FLOAT_BYTES

    return cost


def macs_cost(layers: Mapping[str, Layer], macs: Mapping[str, int]) -> LayerCost:
    """MACs of a layer: those of the reference, scaled as its weight is."""

    def cost(name: str, state: LayerState) -> float:
        if state.is_removed:
            return 0.0
        layer = layers[name]
        return macs.get(name, 0) * weight_count(layer, state) / layer.weight.numel()

    return cost


def latency_cost(
    layers: Mapping[str, Layer],
    input_shapes: Mapping[str, Shape],
    time_layer: Callable[[Layer, Shape, bool], float],
) -> LayerCost:
    """Milliseconds of a layer, timed alone on the target; equal layers are timed once.

    Args:
        layers: of the reference.
        input_shapes: of each, at the target's batch size.
        time_layer: times a layer on an input shape, in int8 or not.
    """

    def cost(name: str, state: LayerState) -> float:
        if state.is_removed or name not in input_shapes:
            return 0.0
        layer = layers[name]
        shape = resized_input(layer, input_shapes[name], state.inputs)
        return time_layer(resized(layer, state), shape, state.bits < FLOAT_BITS)

    return cost
