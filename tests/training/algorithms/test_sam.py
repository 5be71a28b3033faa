from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compressor.errors import ConfigError
from compressor.training import Algorithm, Event, State
from compressor.training.algorithms.gradient_clipping import GradientClipping
from compressor.training.algorithms.sam import SAM, sam_perturbation
from tests.training.algorithms.resuming import assert_resumes
from tests.training.helpers import are_equal, make_loader, make_model, make_trainer, weights_of


class Point(nn.Module):
    def __init__(self, *values: float) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.tensor(values))

    def forward(self) -> Tensor:
        return self.x


def quadratic(model: nn.Module, batch: Any) -> Tensor:
    x = model()
    return 0.5 * (x * torch.tensor([1.0, 4.0]) * x).sum()


def test_the_perturbation_has_length_rho_and_the_direction_of_all_gradients() -> None:
    gradients = [torch.tensor([[1.0, -2.0]]), torch.tensor([2.0])]
    moves = sam_perturbation(gradients, rho=0.6)
    assert torch.cat([m.flatten() for m in moves]).norm().item() == pytest.approx(0.6)
    for move, gradient in zip(moves, gradients, strict=True):
        torch.testing.assert_close(move, gradient * 0.2)


def test_gradients_of_zero_move_nothing() -> None:
    assert sam_perturbation([torch.zeros(2)], rho=1.0)[0].tolist() == [0.0, 0.0]


def test_a_step_on_a_quadratic_is_the_formula() -> None:
    model = Point(1.0, -0.5)
    make_trainer(
        model,
        step=quadratic,
        algorithms=[SAM(rho=0.3)],
        optimizers={"name": "SGD", "lr": 0.1},
        schedulers={"name": "ConstantLR", "factor": 1.0},
        max_duration="1ba",
    ).fit()
    curvature, x = torch.tensor([1.0, 4.0]), torch.tensor([1.0, -0.5])
    gradient = curvature * x
    worst = x + 0.3 * gradient / (1.0 + 4.0) ** 0.5
    torch.testing.assert_close(model.x.detach(), x - 0.1 * curvature * worst)


def test_without_a_learning_rate_nothing_changes_but_the_statistics_of_one_pass() -> None:
    def train(*algorithms: Algorithm) -> dict[str, Tensor]:
        trainer = make_trainer(
            algorithms=algorithms, optimizers={"name": "SGD", "lr": 0.0}, max_duration="3ba"
        )
        trainer.fit()
        return weights_of(trainer.model)

    assert are_equal(train(), train(SAM(rho=0.7)))


def test_gradients_that_overflow_nearby_are_not_used() -> None:
    def cliff(model: nn.Module, batch: Any) -> Tensor:
        x = model()
        return (x * torch.inf if x.max() > 1 else x).sum()

    model = Point(1.0, 1.0)
    make_trainer(
        model,
        step=cliff,
        algorithms=[SAM(rho=0.3)],
        optimizers={"name": "SGD", "lr": 0.5},
        schedulers={"name": "ConstantLR", "factor": 1.0},
        max_duration="1ba",
    ).fit()
    assert model.x.tolist() == [0.5, 0.5]


def test_it_acts_at_every_so_many_batches() -> None:
    calls: list[int] = []

    def step(model: nn.Module, batch: Any) -> Tensor:
        calls.append(trainer.state.clock.batch)
        return quadratic(model, batch)

    trainer = make_trainer(
        Point(1.0, 1.0), step=step, algorithms=[SAM(interval=3)], max_duration="5ba"
    )
    trainer.fit()
    assert calls == [0, 0, 1, 2, 3, 3, 4]


def test_both_passes_drop_the_same_units() -> None:
    def train(*algorithms: Algorithm) -> dict[str, Tensor]:
        trainer = make_trainer(make_model(dropout=0.5), algorithms=algorithms, max_duration="4ba")
        trainer.fit()
        return weights_of(trainer.model)

    plain, nearby = train(), train(SAM(rho=1e-6))
    for name, value in plain.items():
        torch.testing.assert_close(nearby[name], value, rtol=0, atol=1e-5)  # moved by rho at most


def test_micro_batches_have_the_gradient_of_the_whole() -> None:
    def train(size: int | None) -> Tensor:
        torch.manual_seed(0)
        model = nn.Linear(4, 2)
        make_trainer(model, algorithms=[SAM(rho=0.2)], micro_batch_size=size).fit()
        return model.weight.detach()

    with torch.random.fork_rng():
        torch.testing.assert_close(train(None), train(2))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_it_trains_in_mixed_precision(precision: str) -> None:
    trainer = make_trainer(algorithms=[SAM(rho=0.1)], precision=precision)
    trainer.fit("1ep")
    first = trainer.state.train_metrics["train/loss"]
    trainer.fit("9ep")
    assert trainer.state.train_metrics["train/loss"] < 0.8 * first


def test_its_gradients_are_clipped() -> None:
    norms: list[float] = []

    class Measuring(Algorithm):
        events = frozenset({Event.BEFORE_STEP})
        after = ("GradientClipping", "SAM")

        def on(self, event: Event, state: State) -> None:
            norms.append(float(nn.utils.get_total_norm([p.grad for p in state.model.parameters()])))

    make_trainer(algorithms=[Measuring(), GradientClipping(1e-3), SAM()], max_duration="2ba").fit()
    assert norms == pytest.approx([1e-3] * 2, rel=1e-3)


def test_it_resumes_between_its_batches() -> None:
    def make(callbacks: list[Any]) -> Any:
        return make_trainer(
            make_model(dropout=0.3),
            train_dataloader=make_loader(shuffle=True),
            algorithms=[SAM(rho=0.1, interval=2)],
            callbacks=callbacks,
        )

    assert_resumes(make, [3, 4, 6])


def test_a_radius_that_moves_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="rho=0"):
        SAM(rho=0)
    with pytest.raises(ConfigError, match="interval=0"):
        SAM(interval=0)
