"""The pull is the gradient of the penalty in the paper, over whole channels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from compressor.errors import ConfigError
from compressor.training import Algorithm, Event, State
from compressor.training.algorithms import GradualPruning, GroupRegularization, channel_shrinkage
from tests.training.helpers import HIDDEN, cross_entropy, make_loader, make_model, make_trainer


def test_the_strength_is_the_papers() -> None:
    squares = [0.5, 2.0, 3.5, 9.0]
    by_hand = [2 ** (4 * (9.0 - own) / (9.0 - 0.5)) for own in squares]
    assert channel_shrinkage(torch.tensor(squares)).tolist() == pytest.approx(by_hand)
    assert channel_shrinkage(torch.ones(3)).tolist() == [1.0, 1.0, 1.0]
    assert channel_shrinkage(torch.zeros(3)).tolist() == [1.0, 1.0, 1.0]


def norms(model: nn.Module) -> torch.Tensor:
    """Squares of each hidden channel: its row, its scale, its column."""
    rows, columns = model[0].weight.square().sum(1), model[4].weight.square().sum(0)
    return rows + model[1].weight.square() + columns


def test_the_gradient_is_that_of_half_the_weighted_squares() -> None:
    class Noting(Algorithm):
        events = frozenset({Event.BEFORE_STEP})
        after = ("GroupRegularization",)

        def on(self, event: Event, state: State) -> None:
            self.seen = {n: p.grad.clone() for n, p in state.model.named_parameters()}

    model = make_model(seed=2).train()
    weights = channel_shrinkage(norms(model).detach(), alpha=3)
    batch = next(iter(make_loader()))
    penalised = cross_entropy(model, batch)["loss"] + 0.1 / 2 * (weights * norms(model)).sum()
    expected = torch.autograd.grad(penalised, list(model.parameters()))
    noting = Noting()
    make_trainer(
        make_model(seed=2),
        algorithms=[GroupRegularization([HIDDEN], 0.1, alpha=3), noting],
        max_duration="1ba",
    ).fit()
    for (name, _), gradient in zip(model.named_parameters(), expected, strict=True):
        torch.testing.assert_close(noting.seen[name], gradient)


def test_unimportant_channels_shrink_most() -> None:
    def train(algorithms: list[Any]) -> torch.Tensor:
        model = make_model(seed=2)
        make_trainer(model, algorithms=algorithms, max_duration="20ep").fit()
        return norms(model).detach().sort().values

    plain, pulled = train([]), train([GroupRegularization([HIDDEN], 0.01)])
    assert pulled[0] / pulled[-1] < 0.5 * plain[0] / plain[-1]


def test_it_follows_channels_that_are_cut() -> None:
    model = make_model()
    regularization = GroupRegularization([HIDDEN], 0.01)
    algorithms = [GradualPruning([HIDDEN], 0.5, updates=2), regularization]
    make_trainer(model, algorithms=algorithms, max_duration="3ep").fit()
    assert model[0].out_features == 4
    assert len(regularization.groups.kept["0"]) == 4


@pytest.mark.parametrize("options", [{"strength": 0.0}, {"strength": -1.0}, {"alpha": -1.0}])
def test_what_cannot_be_meant_is_refused(options: Any) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        GroupRegularization([HIDDEN], **options)
