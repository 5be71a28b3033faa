"""A delta that every model would keep means nothing."""

from __future__ import annotations

import pytest

from compressor.errors import ConfigError
from compressor.interfaces.metrics import check_delta


def test_a_point_on_a_fraction_is_refused_with_the_value_to_write() -> None:
    with pytest.raises(ConfigError, match=r"delta=1 accepts every model.*write delta=0\.01"):
        check_delta(1.0, "accuracy", 0.917, is_larger_better=True)


@pytest.mark.parametrize(
    ("delta", "reference", "is_larger_better"),
    [(0.01, 0.917, True), (1.0, 91.7, True), (5.0, 0.3, False), (1.0, -3.0, True)],
)
def test_a_delta_that_can_fail_is_accepted(
    delta: float, reference: float, is_larger_better: bool
) -> None:
    check_delta(delta, "metric", reference, is_larger_better=is_larger_better)
