"""What is computed on integers whose range is found in each call: DynamicQuantizeLinear of ONNX.

The LSTM is that of ONNX Runtime (DynamicQuantizeLSTM): what it reads has one range in the whole
call, its hidden state one in every step, over the batch; weights are int8 with a scale for each
row. With several threads the runtime cuts the batch in parts, whose hidden states have each their
own range; here, as with one thread, there is one part.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from compressor.quantization.affine import TINY, fake_quantize
from compressor.quantization.scheme import ACTIVATION


class DynamicQuantizer(nn.Module):
    """Rounds a tensor to uint8 of the range that it has in this call, as DynamicQuantizeLinear."""

    def forward(self, x: Tensor) -> Tensor:
        """`x` rounded, of its shape and dtype; computed in float32 at least."""
        return round_dynamic(x)


class DynamicLSTM(nn.Module):
    """One layer of an LSTM, in one or two directions.

    Args:
        is_bidirectional: whether the second half of the weights runs from the end.
    """

    def __init__(self, *, is_bidirectional: bool) -> None:
        super().__init__()
        self.directions = 1 + is_bidirectional

    def forward(
        self, x: Tensor, hidden: Tensor, cell: Tensor, *weights: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """All hidden states, and the last hidden and cell states.

        Args:
            x: (length, batch, in).
            hidden: (directions, batch, hidden), before the first step.
            cell: of the same shape.
            weights: of each direction as `dynamic_lstm` takes them, and two biases or none.

        Returns:
            (length, batch, directions * hidden), and twice the shape of `hidden`.
        """
        size = len(weights) // self.directions
        x = round_dynamic(x)
        parts = []
        for i in range(self.directions):
            own = weights[i * size : (i + 1) * size]
            bias = own[2] + own[3] if size > 2 else x.new_zeros(())
            states, *ends = dynamic_lstm(
                x.flip(0) if i else x, hidden[i], cell[i], own[0], own[1], bias
            )
            parts.append((states.flip(0) if i else states, *ends))
        found, *last = zip(*parts, strict=True)
        return torch.cat(found, dim=2), torch.stack(last[0]), torch.stack(last[1])


def dynamic_lstm(
    x: Tensor, hidden: Tensor, cell: Tensor, weight: Tensor, recurrent: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """One direction of an LSTM that rounds its hidden state before every step.

    Args:
        x: (length, batch, in), rounded.
        hidden: (batch, hidden), before the first step.
        cell: of the same shape.
        weight: (4 * hidden, in), rounded; rows of the gates in torch's order: input, forget, cell,
            output.
        recurrent: (4 * hidden, hidden), rounded.
        bias: (4 * hidden,) or ().

    Returns:
        Hidden states (length, batch, hidden), and the last hidden and cell states.
    """
    states = []
    for step in x @ weight.T:
        gates = step + round_dynamic(hidden) @ recurrent.T + bias
        hidden, cell = lstm_states(gates, cell)
        states.append(hidden)
    return torch.stack(states), hidden, cell


def lstm_states(gates: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
    """The hidden and the cell state behind a step.

    Args:
        gates: (batch, 4 * hidden), in torch's order.
        cell: (batch, hidden), before the step.
    """
    entering, kept, new, shown = gates.chunk(4, dim=1)
    cell = kept.sigmoid() * cell + entering.sigmoid() * new.tanh()
    return shown.sigmoid() * cell.tanh(), cell


def round_dynamic(x: Tensor) -> Tensor:
    """`x` rounded to uint8 of its own range; the gradient passes."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    scale, zero_point = dynamic_parameters(wide.detach())
    return fake_quantize(wide, scale, zero_point, ACTIVATION).to(x.dtype)


def dynamic_parameters(x: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and zero point that DynamicQuantizeLinear of ONNX finds for `x`."""
    low, high = x.min().clamp(max=0), x.max().clamp(min=0)
    scale = (high - low) / 255
    scale = torch.where(scale < TINY, 1.0, scale)
    return scale, (-low / scale).round().clamp(0, 255).to(torch.int32)
