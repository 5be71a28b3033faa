"""What choices do to a model's layers, and what a layer then costs: the torch side of `Space`.

Layers are convolutions and linear layers: they hold nearly all of the cost, and a layer of another
width, or the chain that stands for it, is made here to be counted or timed without building the
whole variant. Tables of embeddings, LSTMs and the projections of attention count where bytes do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from math import prod
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from compressor.quantization.plan import find_format
from compressor.result import Choice
from compressor.search.space import FLOAT_BITS, LayerChange, LayerCost, LayerState
from compressor.structure.factored import (
    Factored,
    Layer,
    blank,
    chain_macs,
    settled_ranks,
    weight_entries,
    widths,
)

Shape = tuple[int, ...]

FLOAT_BYTES = 4
CONV1D = "Conv1D"


def costly_layers(model: nn.Module) -> dict[str, Layer]:
    """Every convolution and linear layer by its first name; a shared one counts once."""
    return {name: m for name, m in model.named_modules() if isinstance(m, (_ConvNd, nn.Linear))}


def tables(model: nn.Module) -> dict[str, nn.Embedding]:
    """Every embedding by its first name, but for those whose table is a layer's weight.

    They take no time, and bytes.
    """
    known = {id(layer.weight) for layer in costly_layers(model).values()}
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and id(module.weight) not in known:
            known.add(id(module.weight))
            found[name] = module
    return found


def other_matrices(model: nn.Module) -> dict[str, nn.Module]:
    """Further modules with matrices of their own that can be quantized, by their first names.

    They are LSTMs, `nn.MultiheadAttention` and the `Conv1D` of transformers.
    """
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (nn.LSTM, nn.MultiheadAttention)) or type(module).__name__ == CONV1D
    }


def stored_layers(model: nn.Module) -> dict[str, nn.Module]:
    """All whose bytes count."""
    return {**costly_layers(model), **tables(model), **other_matrices(model)}


def layer_state(layer: nn.Module) -> LayerState:
    """Widths of `layer`, in float, and the form of a chain; of a table its rows and columns.

    Of `other_matrices` the entries of the matrices, and of what else they have.
    """
    if not isinstance(layer, (_ConvNd, nn.Linear, Factored, nn.Embedding)):
        own = list(layer.parameters(recurse=False))
        entries = sum(parameter.numel() for parameter in own if parameter.dim() == 2)
        return LayerState(entries, sum(parameter.numel() for parameter in own) - entries)
    if isinstance(layer, nn.Embedding):
        return LayerState(*layer.weight.shape)
    if isinstance(layer, Factored):
        taken, made = widths(layer.layers[0])[0], widths(layer.layers[-1])[1]
        return LayerState(taken, made, form=layer.form, ranks=layer.ranks)
    return LayerState(*widths(layer))


def stated_change(choice: Choice) -> LayerChange | None:
    """What a choice does to the layer at its site, if its setting says it.

    None for those whose effect has to be read off an edited copy.
    """
    setting = choice.setting
    if not setting.keys() & {"format", "form", "stored_bits"}:
        return None
    quantized = setting.get("format", "")
    return LayerChange(
        bits=find_format(quantized).stored_bits if quantized else None,
        format=quantized,
        form=setting.get("form", ""),
        ranks=tuple(setting.get("ranks", ())),
        stored_bits=setting.get("stored_bits"),
    )


def effects_of(
    reference: nn.Module, choices: Sequence[Choice], applied: Callable[[Choice], nn.Module]
) -> dict[str, Mapping[str, LayerChange]]:
    """What each choice, by key, does to each layer: as it says, or read off an edited copy.

    Args:
        reference: is not changed.
        choices: of any technique.
        applied: a copy of the reference after a choice.
    """
    before = {name: layer_state(layer) for name, layer in stored_layers(reference).items()}
    effects: dict[str, Mapping[str, LayerChange]] = {}
    for choice in choices:
        stated = stated_change(choice)
        if stated is not None:
            effects[choice.key] = {choice.site: stated}
        else:
            effects[choice.key] = structural_changes(before, applied(choice))
    return effects


def structural_changes(
    before: Mapping[str, LayerState], model: nn.Module
) -> dict[str, LayerChange]:
    """How the layers of `model`, an edited copy, differ from `before`.

    A chain that stands for a layer has its name, and is that layer in another form.
    """
    chains = {name: m for name, m in model.named_modules() if isinstance(m, Factored)}
    after = {name: layer_state(m) for name, m in {**stored_layers(model), **chains}.items()}
    changes = {}
    for name, state in before.items():
        if name not in after:
            changes[name] = LayerChange(removes=True)
        elif after[name] != state:
            changes[name] = LayerChange(
                after[name].inputs - state.inputs,
                after[name].outputs - state.outputs,
                form=after[name].form,
                ranks=after[name].ranks,
            )
    return changes


def in_state(layer: Layer, state: LayerState) -> Layer | Factored:
    """A fresh layer like `layer` in `state`, or the chain that stands for it; weights are random.

    Ranks are cut to what the layer has at these widths; it is whole where a chain would be larger.
    """
    whole = resized(layer, state)
    ranks = _ranks(state, tuple(whole.weight.shape))
    return blank(whole, state.form, ranks) if ranks else whole


def resized(layer: Layer, state: LayerState) -> Layer:
    """A fresh whole layer like `layer` with the widths of `state`; weights are random."""
    has_bias = layer.bias is not None
    if isinstance(layer, nn.Linear):
        return nn.Linear(state.inputs, state.outputs, bias=has_bias)
    made: Layer = _class(layer)(
        state.inputs,
        state.outputs,
        layer.kernel_size,
        stride=layer.stride,
        padding=layer.padding,
        dilation=layer.dilation,
        groups=_groups(layer, state),
        bias=has_bias,
    )
    return made


def _class(layer: _ConvNd) -> Any:
    """One of torch's own; a class derived from it may be made of other arguments."""
    return next(kind for kind in type(layer).__mro__ if kind.__module__ == _ConvNd.__module__)


def resized_input(layer: Layer, shape: Shape, inputs: int) -> Shape:
    """`shape` of the layer's input with `inputs` channels or features."""
    axis = len(shape) - 1 if isinstance(layer, nn.Linear) else 1
    return (*shape[:axis], inputs, *shape[axis + 1 :])


def weight_count(layer: nn.Module, state: LayerState) -> int:
    """Entries of the weight in that state, or of the weights of a chain together."""
    if not isinstance(layer, (_ConvNd, nn.Linear, nn.Embedding)):
        return state.inputs
    shape = _weight_shape(layer, state)
    ranks = _ranks(state, shape)
    return weight_entries(state.form, ranks, shape) if ranks else prod(shape)


def size_cost(layers: Mapping[str, nn.Module], *, stores_compact: bool = False) -> LayerCost:
    """Bytes of a layer's weight at its bits, and of its bias in 32.

    Args:
        layers: of the reference.
        stores_compact: the target's file is packed, and `LayerState.stored_bits` counts.
    """

    def cost(name: str, state: LayerState) -> float:
        if state.is_removed:
            return 0.0
        layer = layers[name]
        has_bias = isinstance(layer, (_ConvNd, nn.Linear)) and layer.bias is not None
        is_other = not isinstance(layer, (_ConvNd, nn.Linear, nn.Embedding))
        bias = state.outputs if has_bias or is_other else 0
        bits: float = state.bits
        if stores_compact and state.stored_bits is not None:
            bits = min(bits, state.stored_bits)
        return weight_count(layer, state) * bits / 8 + bias * FLOAT_BYTES

    return cost


def macs_cost(
    layers: Mapping[str, Layer], macs: Mapping[str, int], input_shapes: Mapping[str, Shape]
) -> LayerCost:
    """MACs of a layer: those of the reference, scaled as its weight is; of a chain, its own share.

    Args:
        layers: of the reference.
        macs: of each in the reference.
        input_shapes: of each, of its first call.
    """

    @cache
    def share(name: str, state: LayerState) -> float:
        """Of the whole layer's MACs that its chain needs."""
        shape = resized_input(layers[name], input_shapes[name], state.inputs)
        with torch.device("meta"):
            made = in_state(layers[name], state)
            whole = resized(layers[name], state)
        chain = made.layers if isinstance(made, Factored) else [made]
        return chain_macs(chain, shape) / chain_macs([whole], shape)

    def cost(name: str, state: LayerState) -> float:
        if state.is_removed or name not in layers or not macs.get(name, 0):
            return 0.0
        weight = layers[name].weight
        whole = macs[name] * prod(_weight_shape(layers[name], state)) / weight.numel()
        if not state.form:
            return whole
        return whole * share(name, replace(state, bits=FLOAT_BITS, format="", stored_bits=None))

    return cost


def latency_cost(
    layers: Mapping[str, Layer],
    input_shapes: Mapping[str, Shape],
    time_layer: Callable[[Layer | Factored, Shape, str], float],
) -> LayerCost:
    """Milliseconds of a layer, timed alone on the target; equal layers are timed once.

    Args:
        layers: of the reference.
        input_shapes: of each, at the target's batch size.
        time_layer: times a layer, or a chain, on an input shape, in a format ("" is float).
    """

    def cost(name: str, state: LayerState) -> float:
        if state.is_removed or name not in input_shapes:
            return 0.0
        layer = layers[name]
        shape = resized_input(layer, input_shapes[name], state.inputs)
        return time_layer(in_state(layer, state), _covering(layer, shape), state.format)

    return cost


def _covering(layer: Layer, shape: Shape) -> Shape:
    """`shape` of an input, or as much more as the kernel covers: some layers pad it themselves."""
    if isinstance(layer, nn.Linear) or layer.transposed or isinstance(layer.padding, str):
        return shape
    dims = len(layer.kernel_size)
    least = (
        dilation * (kernel - 1) + 1 - 2 * padding
        for kernel, dilation, padding in zip(
            layer.kernel_size, layer.dilation, layer.padding, strict=True
        )
    )
    return (*shape[:-dims], *map(max, shape[-dims:], least))


def _ranks(state: LayerState, shape: Shape) -> tuple[int, ...]:
    """Of the chain that a weight of this shape becomes; () if it stays whole."""
    return settled_ranks(state.form, state.ranks, shape) if state.form else ()


def _groups(layer: _ConvNd, state: LayerState) -> int:
    """Of a convolution at these widths: it loses whole groups, of as many channels each."""
    return max(layer.groups * state.inputs // layer.in_channels, 1) if layer.groups > 1 else 1


def _weight_shape(layer: Layer | nn.Embedding, state: LayerState) -> Shape:
    """Of the whole weight at these widths."""
    if isinstance(layer, nn.Embedding):
        return (state.inputs, state.outputs)
    if isinstance(layer, nn.Linear):
        return (state.outputs, state.inputs)
    groups = _groups(layer, state)
    sides = [state.outputs, state.inputs]
    if layer.transposed:
        sides.reverse()
    return (sides[0], sides[1] // groups, *layer.kernel_size)
