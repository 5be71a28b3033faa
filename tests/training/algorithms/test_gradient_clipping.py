from __future__ import annotations

import pytest
import torch
from torch import nn

from compressor.errors import ConfigError
from compressor.training import Algorithm, Event, State
from compressor.training.algorithms import GradientClipping, clip_gradients
from tests.training.helpers import make_trainer


def test_gradients_keep_their_direction_and_lose_length() -> None:
    parameters = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1))]
    parameters[0].grad, parameters[1].grad = torch.tensor([3.0, 0.0]), torch.tensor([4.0])
    assert clip_gradients(parameters, max_norm=1.0).item() == pytest.approx(5.0)
    torch.testing.assert_close(parameters[0].grad, torch.tensor([0.6, 0.0]))
    torch.testing.assert_close(parameters[1].grad, torch.tensor([0.8]))


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_norm_that_is_stepped_is_at_most_the_limit(precision: str) -> None:
    norms: list[float] = []

    class Measuring(Algorithm):
        events = frozenset({Event.BEFORE_STEP})
        after = ("GradientClipping",)

        def on(self, event: Event, state: State) -> None:
            gradients = [p.grad for p in state.model.parameters() if p.grad is not None]
            norms.append(torch.stack([g.square().sum() for g in gradients]).sum().sqrt().item())

    make_trainer(algorithms=[Measuring(), GradientClipping(1e-3)], precision=precision).fit()
    assert norms == pytest.approx([1e-3] * 8, rel=1e-3)


def test_a_limit_that_leaves_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="max_norm=0"):
        GradientClipping(0)
