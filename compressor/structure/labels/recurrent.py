"""Rules of LSTM and GRU: the hidden units of a layer, and the inputs of the next."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from compressor.structure.labels.flow import Flow
from compressor.structure.labels.operations import operation, rule
from compressor.structure.labels.value import Value, vector

GATES = {"aten.lstm": 4, "aten.gru": 3, "aten.rnn_tanh": 1, "aten.rnn_relu": 1}


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
    inputs = [f.reshape(-1) for f in value.on(dims - 1)]
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
        if not state.follows:
            for factor in state.on(len(state.shape) - 1):
                flow.unite(factor.reshape(-1), everything[0], node)
            if (
                not state.on(len(state.shape) - 1)
                and state.shape[-1] > 1
                and state.constant is None
            ):
                flow.freeze(everything[0], f"{flow.where(node)} is given its first state")
    results = [Value(shape, [vector(inputs[0], len(shape) - 1, len(shape))])]
    for example in node.meta["val"][1:]:
        size = tuple(int(n) for n in example.shape)
        results.append(Value(size, [vector(everything[0], len(size) - 1, len(size))]))
    return tuple(results)
