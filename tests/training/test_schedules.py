from __future__ import annotations

import pytest
import torch

from compressor.errors import ConfigError
from compressor.training.schedules import (
    SHAPES,
    shape_called,
    warmup_constant,
    warmup_cosine,
    warmup_linear,
)
from tests.training.helpers import make_trainer


def test_the_rate_rises_linearly_then_falls_along_half_a_cosine() -> None:
    assert warmup_cosine(0.025) == pytest.approx(0.55)
    assert warmup_cosine(0.05 + 0.95 / 2) == pytest.approx(0.5)
    falling = [warmup_cosine(0.05 + step / 100) for step in range(95)]
    assert falling == sorted(falling, reverse=True)


def test_all_rise_alike_and_then_fall_as_they_are_called() -> None:
    for fraction in (0.0, 0.01, 0.049, 0.05):
        assert warmup_linear(fraction) == pytest.approx(warmup_cosine(fraction))
        assert warmup_constant(fraction) == pytest.approx(warmup_cosine(fraction))
    assert [warmup_constant(f) for f in (0.3, 0.9)] == [1.0, 1.0]
    assert warmup_linear(0.05 + 0.95 / 4) == pytest.approx(0.75)


@pytest.mark.parametrize("name", SHAPES)
def test_a_trainer_takes_a_schedule_by_its_name(name: str) -> None:
    rates: list[float] = []

    def step(model: torch.nn.Module, batch: list[torch.Tensor]) -> torch.Tensor:
        assert trainer.optimizer is not None
        rates.append(trainer.optimizer.param_groups[0]["lr"])
        return model(batch[0]).square().mean()

    trainer = make_trainer(step=step, schedulers=name)
    trainer.fit()
    assert rates == pytest.approx([0.1 * SHAPES[name](batch / 8) for batch in range(8)])


def test_an_unknown_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"no schedule 'cosin'. Did you mean 'cosine'\?.*StepLR"):
        shape_called("cosin")
