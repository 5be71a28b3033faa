"""Rules of LSTM, GRU and their cells: the hidden units of a layer, and the inputs of the next."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from compressor.structure.labels.contraction import plain
from compressor.structure.labels.flow import Flow
from compressor.structure.labels.operations import operation, rule
from compressor.structure.labels.value import Value, vector

GATES = {"aten.lstm": 4, "aten.gru": 3, "aten.rnn_tanh": 1, "aten.rnn_relu": 1}
CELLS = {
    "aten.lstm_cell": 4,
    "aten.gru_cell": 3,
    "aten.rnn_tanh_cell": 1,
    "aten.rnn_relu_cell": 1,
}


@rule(*GATES)
def recurrent(
    flow: Flow,
    node: fx.Node,
    value: Value,
    states: Any,
    weights: Sequence[Value],
    has_bias: bool,
    layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool = False,
) -> Any:
    """(…, in) -> (…, hidden), or (…, 2 hidden); the gates of a unit go together."""
    del dropout, train, batch_first
    gates = GATES[operation(node)]
    given = [states] if isinstance(states, Value) else list(states)
    per_layer = 4 if has_bias else 2
    directions = 2 if bidirectional else 1
    dims = len(value.shape)
    shape = tuple(int(n) for n in node.meta["val"][0].shape)
    if len(weights) != per_layer * layers * directions:  # with a projection there are more
        flow.freeze_all(node, [value, given, list(weights)], f"{flow.where(node)} has projections")
        return tuple(Value(tuple(int(n) for n in e.shape)) for e in node.meta["val"])
    hidden = weights[1].on(1)
    if not hidden:
        flow.freeze_all(node, [value, given, list(weights)], f"{flow.where(node)} has one unit")
        return tuple(Value(tuple(int(n) for n in e.shape)) for e in node.meta["val"])
    inputs = plain(flow, node, value, dims - 1)
    outputs: list[torch.Tensor] = []
    everything = []
    for layer in range(layers):
        outputs = []
        for direction in range(directions):
            at = (layer * directions + direction) * per_layer
            own = weights[at : at + per_layer]
            read = [f.reshape(-1) for f in own[0].on(1)]
            flow.contract(node, inputs, read)
            units = own[1].on(1)[0].reshape(-1)
            flow.mark_read(units)
            rows = [f.reshape(gates, -1) for w in own for f in w.factors if f.shape[0] > 1]
            for row in rows:
                flow.unite(row, units.expand_as(row), node)
            outputs.append(units)
            everything.append(units)
        inputs = [torch.cat(outputs)]
    # All layers and directions share one number of units: position by position.
    for units in everything[1:]:
        flow.unite(everything[0], units, node)
    for state in given:
        _meet(flow, node, state, everything[0])
    _step_through(flow, node, [value, *given])
    results = [Value(shape, [vector(inputs[0], len(shape) - 1, len(shape))])]
    for example in node.meta["val"][1:]:
        size = tuple(int(n) for n in example.shape)
        results.append(Value(size, [vector(everything[0], len(size) - 1, len(size))]))
    return tuple(results)


@rule(*CELLS)
def cell(
    flow: Flow,
    node: fx.Node,
    value: Value,
    states: Any,
    weight_ih: Value,
    weight_hh: Value,
    *biases: Value | None,
) -> Any:
    """One step: (N, in) and a state of (N, hidden) -> (N, hidden); of an LSTM two of each."""
    gates = CELLS[operation(node)]
    given = [states] if isinstance(states, Value) else list(states)
    examples = node.meta["val"]
    shape = tuple(int(n) for n in (examples[0] if len(given) > 1 else examples).shape)
    weights = [weight_ih, weight_hh, *(bias for bias in biases if bias is not None)]
    hidden = plain(flow, node, weight_hh, 1)
    if not hidden:
        flow.freeze_all(node, [value, given, weights], f"{flow.where(node)} has one unit")
        return tuple(Value(shape) for _ in given) if len(given) > 1 else Value(shape)
    units = hidden[0]
    flow.mark_read(units)
    flow.contract(node, plain(flow, node, value, len(shape) - 1), plain(flow, node, weight_ih, 1))
    for weight in weights:
        for rows in plain(flow, node, weight, 0):
            gate = rows.reshape(gates, -1)
            flow.unite(gate, units.expand_as(gate), node)
    for state in given:
        _meet(flow, node, state, units)
    _step_through(flow, node, [value, *given])
    results = [Value(shape, [vector(units, len(shape) - 1, len(shape))]) for _ in given]
    return tuple(results) if len(results) > 1 else results[0]


def _meet(flow: Flow, node: fx.Node, state: Value, units: torch.Tensor) -> None:
    """A state that is given has the units' labels; one that is a fixed tensor stops them."""
    last = len(state.shape) - 1
    labels = plain(flow, node, state, last)
    for vectors in labels:
        flow.unite(vectors, units, node)
    if not labels and not state.follows and state.shape[last] > 1:
        flow.freeze(units, f"{flow.where(node)} is given its first state")


def _step_through(flow: Flow, node: fx.Node, operands: Sequence[Value]) -> None:
    """Samples, steps and layers are none of the units: they stay."""
    for operand in operands:
        for factor in operand.off(len(operand.shape) - 1):
            flow.freeze(factor, f"{flow.where(node)} steps through them")
