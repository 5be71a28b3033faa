from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from compressor.errors import ConfigError
from compressor.export.post_training import PostTraining
from compressor.interfaces.inputs import ModelInputs
from compressor.quantization.dynamic import DynamicLSTM, dynamic_lstm, round_dynamic
from compressor.quantization.plan import DYNAMIC_INT8, STATIC_INT8, QuantizationPlan

SIZE, WIDE, LENGTH, BATCH = 5, 6, 4, 3


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def weights(*, seed: int = 0) -> list[Tensor]:
    shapes = [(4 * SIZE, WIDE), (4 * SIZE, SIZE), (4 * SIZE,), (4 * SIZE,)]
    return [random(*shape, seed=seed + i) for i, shape in enumerate(shapes)]


def states(directions: int = 1) -> tuple[Tensor, Tensor]:
    return random(directions, BATCH, SIZE, seed=7), random(directions, BATCH, SIZE, seed=8)


def lstm(model: nn.Module, x: Tensor) -> PostTraining:
    return PostTraining(model, ModelInputs((x,)))


class Last(nn.Module):
    """A class from the last hidden state of a sequence (N, L, WIDE)."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(WIDE, SIZE, batch_first=True)
        self.head = nn.Linear(SIZE, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[1][0][-1])


def test_an_lstm_is_a_cell_that_reads_its_rounded_state_at_every_step() -> None:
    x, parameters, (hidden, cell) = random(LENGTH, BATCH, WIDE), weights(), states()
    reference = nn.LSTMCell(WIDE, SIZE)
    with torch.no_grad():
        for own, value in zip(reference.parameters(), parameters, strict=True):
            own.copy_(value)
        h, c, expected = hidden[0], cell[0], []
        for step in x:
            h, c = reference(step, (round_dynamic(h), c))
            expected.append(h)
        found = dynamic_lstm(
            x, hidden[0], cell[0], parameters[0], parameters[1], parameters[2] + parameters[3]
        )
    for value, wanted in zip(found, (torch.stack(expected), h, c), strict=True):
        torch.testing.assert_close(value, wanted, atol=1e-6, rtol=0)


def test_two_directions_are_one_layer_forwards_and_one_on_the_reversed_sequence() -> None:
    x, ways, (hidden, cell) = random(LENGTH, BATCH, WIDE), (weights(), weights(seed=20)), states(2)
    both = DynamicLSTM(is_bidirectional=True)(x, hidden, cell, *ways[0], *ways[1])
    one = DynamicLSTM(is_bidirectional=False)
    forwards = one(x, hidden[:1], cell[:1], *ways[0])
    backwards = one(x.flip(0), hidden[1:], cell[1:], *ways[1])
    assert torch.equal(both[0], torch.cat([forwards[0], backwards[0].flip(0)], dim=2))
    for part in (1, 2):
        assert torch.equal(both[part], torch.cat([forwards[part], backwards[part]]))


def test_an_lstm_learns_through_the_rounding() -> None:
    torch.manual_seed(0)
    x = random(32, LENGTH, WIDE)
    labels = (x[:, -1, 0] > 0).long()
    quantizer = lstm(Last().eval(), x)
    model = quantizer.simulate({"lstm": DYNAMIC_INT8}).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    losses = []
    for _ in range(15):
        loss = nn.functional.cross_entropy(model(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]
    trained = dict(quantizer.model.named_parameters())["lstm.weight_hh_l0"]
    assert trained.grad is not None, "they are the model's own parameters"


def test_the_plan_of_an_lstm_goes_through_json() -> None:
    x = random(4, LENGTH, WIDE)
    quantizer = lstm(Last().eval(), x)
    plan = quantizer.plan({"lstm": DYNAMIC_INT8})
    assert {path: len(tensor.scale) for path, tensor in plan.weights.items()} == {
        "lstm.weight_ih_l0": 4 * SIZE,
        "lstm.weight_hh_l0": 4 * SIZE,
    }
    again = quantizer.simulate(QuantizationPlan.from_json(plan.to_json()))
    assert torch.equal(again(x), quantizer.simulate(plan)(x))


def test_a_plan_of_an_lstm_in_static_int8_is_refused() -> None:
    inputs = ModelInputs((random(4, LENGTH, WIDE),))
    quantizer = PostTraining(Last().eval(), inputs, [inputs])
    with pytest.raises(ConfigError, match=r"'lstm' cannot have this format.*Write dynamic_int8"):
        quantizer.plan({"lstm": STATIC_INT8})
