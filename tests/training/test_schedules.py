from __future__ import annotations

import pytest

from compressor.training.schedules import warmup_cosine


def test_the_rate_rises_linearly_then_falls_along_half_a_cosine() -> None:
    assert warmup_cosine(0.025) == pytest.approx(0.55)
    assert warmup_cosine(0.05 + 0.95 / 2) == pytest.approx(0.5)
    falling = [warmup_cosine(0.05 + step / 100) for step in range(95)]
    assert falling == sorted(falling, reverse=True)
