"""LSTMs layer by layer, for an exporter that has wrong shapes for their states, and no projection.

torch 2.11 takes the last states for tensors of four dimensions, and any torch leaves projections
out, for which ONNX has nothing: their steps are written one after another.

Source: Sak et al. (2014), Long short-term memory based recurrent neural network architectures.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from compressor.errors import ExportError
from compressor.quantization.dynamic import lstm_states
from compressor.quantization.operations import LSTM
from compressor.structure.trace import quiet_lstm

TO_ONNX = (0, 3, 1, 2)  # torch has the gates input, forget, cell, output; ONNX i, o, f, c
States = tuple[Tensor, Tensor, Tensor]


@torch.library.custom_op("compressor::float_lstm", mutates_args=())
def float_lstm(
    x: Tensor, hidden: Tensor, cell: Tensor, weights: list[Tensor], is_bidirectional: bool
) -> States:
    """One layer; x (length, batch, in), and weights as `aten.lstm` takes them."""
    has_biases = len(weights) == 4 * len(hidden)
    options = (has_biases, 1, 0.0, False, is_bidirectional, False)
    result: States = LSTM(x, [hidden, cell], weights, *options)
    return result


@float_lstm.register_fake
def _(
    x: Tensor, hidden: Tensor, cell: Tensor, weights: list[Tensor], is_bidirectional: bool
) -> States:
    del weights, is_bidirectional
    found = x.new_empty(*x.shape[:2], hidden.shape[0] * hidden.shape[2])
    return found, torch.empty_like(hidden), torch.empty_like(cell)


def by_layers(program: ExportedProgram) -> ExportedProgram:
    """`program` with every LSTM as its layers; itself if there is none.

    Of one with a projection there are as many steps as the example had: its length is fixed.

    Raises:
        ExportError: if that length is the batch's.
    """
    nodes = [node for node in program.graph.nodes if node.target is LSTM]
    for node in nodes:
        states = [item.meta["val"] for item in node.args[1]]
        length = node.args[0].meta["val"].shape[1 if node.args[8] else 0]
        if _has_projection(*states) and not isinstance(length, int):
            raise ExportError(
                "The model has an LSTM with a projection that runs along the dimension of the "
                "batch. ONNX has none, and its steps can be written for a fixed length alone. "
                "Leave proj_size out, or give it inputs of one length."
            )
    if not nodes:
        return program
    with quiet_lstm():
        layers: ExportedProgram = program.run_decompositions({LSTM: lstm_layers})
    return layers


def lstm_layers(
    x: Tensor,
    states: Sequence[Tensor],
    weights: Sequence[Tensor],
    has_biases: bool,
    layers: int,
    dropout: float,
    train: bool,
    is_bidirectional: bool,
    is_batch_first: bool,
) -> States:
    """`aten.lstm` in evaluation mode."""
    del dropout, train
    directions = 2 if is_bidirectional else 1
    each = len(weights) // layers
    x = x.transpose(0, 1) if is_batch_first else x
    ends = []
    for i in range(layers):
        hidden, cell = (item[i * directions : (i + 1) * directions] for item in states)
        own = list(weights[i * each : (i + 1) * each])
        if _has_projection(hidden, cell):
            x, *end = _projected(x, hidden, cell, own, has_biases)
        else:
            x, *end = float_lstm(x, hidden, cell, own, is_bidirectional)
        ends.append(end)
    last = [torch.cat(items) for items in zip(*ends, strict=True)]
    return x.transpose(0, 1) if is_batch_first else x, last[0], last[1]


def float_lstm_translations(opset: int) -> Mapping[Callable[..., Any], Callable[..., Any]]:
    """What `float_lstm` is in ONNX, for `torch.onnx.export`."""
    import onnxscript

    op: Any = getattr(onnxscript, f"opset{opset}")

    def reordered(rows: Any) -> Any:
        ends = [(rows.shape[0] // 4 * i, rows.shape[0] // 4 * (i + 1)) for i in TO_ONNX]
        # slices of constants are constants in the file, and parts of a Split are not
        parts = [op.Slice(rows, *(op.Constant(value_ints=[n]) for n in (*end, 0))) for end in ends]
        return op.Concat(*parts, axis=0)

    def stacked(items: Sequence[Any]) -> Any:
        first = op.Constant(value_ints=[0])
        parts = [op.Unsqueeze(item, first) for item in items]
        return op.Concat(*parts, axis=0) if len(parts) > 1 else parts[0]

    def float_lstm(
        x: Any, hidden: Any, cell: Any, weights: Sequence[Any], is_bidirectional: bool
    ) -> Any:
        directions = 2 if is_bidirectional else 1
        each = len(weights) // directions
        kinds = [[reordered(item) for item in weights[i::each]] for i in range(each)]
        biases = [op.Concat(*pair, axis=0) for pair in zip(*kinds[2:], strict=True)]
        states, hidden, cell = op.LSTM(
            x,
            stacked(kinds[0]),
            stacked(kinds[1]),
            stacked(biases) if biases else None,
            None,
            hidden,
            cell,
            hidden_size=weights[1].shape[1],
            direction="bidirectional" if is_bidirectional else "forward",
        )
        return rowwise(op, states), hidden, cell

    ours: Any = torch.ops.compressor
    return {ours.float_lstm.default: float_lstm}


def rowwise(op: Any, states: Any) -> Any:
    """Of an LSTM of ONNX (length, directions, batch, n) as (length, batch, directions * n)."""
    rows = op.Transpose(states, perm=[0, 2, 1, 3])
    return op.Reshape(rows, op.Constant(value_ints=[0, 0, -1]))


def _projected(
    x: Tensor, hidden: Tensor, cell: Tensor, weights: Sequence[Tensor], has_biases: bool
) -> States:
    """One layer with a projection, step after step."""
    each = len(weights) // len(hidden)
    parts = []
    for i, (shown, kept) in enumerate(zip(hidden, cell, strict=True)):
        weight, recurrent, *biases, projection = weights[i * each : (i + 1) * each]
        bias = biases[0] + biases[1] if has_biases else 0
        found = []
        for step in range(len(x))[:: -1 if i else 1]:
            gates = x[step] @ weight.T + shown @ recurrent.T + bias
            wide, kept = lstm_states(gates, kept)
            shown = wide @ projection.T
            found.append(shown)
        parts.append((torch.stack(found[:: -1 if i else 1]), shown, kept))
    states, *last = zip(*parts, strict=True)
    return torch.cat(states, dim=2), torch.stack(last[0]), torch.stack(last[1])


def _has_projection(hidden: Tensor, cell: Tensor) -> bool:
    return hidden.shape[2] != cell.shape[2]
