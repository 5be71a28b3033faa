"""Divergence against torch's own Kullback-Leibler and a slow formula."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from compressor.interfaces.divergence import divergence

GENERATOR = torch.Generator().manual_seed(0)
OURS = [[torch.randn(n, 5, generator=GENERATOR)] for n in (4, 4, 2)]
THEIRS = [[torch.randn(n, 5, generator=GENERATOR)] for n in (4, 4, 2)]


def test_of_logits_is_the_mean_kullback_leibler_divergence_over_samples() -> None:
    ours, theirs = (torch.cat([batch[0] for batch in side]) for side in (OURS, THEIRS))
    expected = F.kl_div(
        ours.log_softmax(1), theirs.log_softmax(1), log_target=True, reduction="batchmean"
    )
    assert divergence(OURS, THEIRS, is_classifier=True) == pytest.approx(float(expected), rel=1e-5)


def test_of_other_outputs_is_the_squared_error_relative_to_the_reference() -> None:
    by_hand = sum(
        len(a) * float(((a - b) ** 2).mean() / (b**2).mean())
        for [a], [b] in zip(OURS, THEIRS, strict=True)
    )
    assert divergence(OURS, THEIRS, is_classifier=False) == pytest.approx(by_hand / 10, rel=1e-5)


@pytest.mark.parametrize("is_classifier", [True, False])
def test_of_equal_outputs_is_zero(is_classifier: bool) -> None:
    assert divergence(OURS, OURS, is_classifier=is_classifier) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("is_classifier", [True, False])
def test_of_outputs_that_are_not_finite_is_not_finite(is_classifier: bool) -> None:
    broken = [[torch.full_like(batch[0], torch.nan)] for batch in OURS]
    assert not math.isfinite(divergence(broken, THEIRS, is_classifier=is_classifier))
