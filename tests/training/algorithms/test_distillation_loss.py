from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from compressor.errors import ModelError
from compressor.training.algorithms.distillation import (
    attention_map,
    distillation_loss,
    feature_distance,
)


def test_the_distance_of_logits_is_the_divergence_written_out() -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(3, 5, generator=generator) for _ in range(2))
    p, q = (teacher / 4).softmax(1), (student / 4).softmax(1)
    expected = (p * (p.log() - q.log())).sum() / 3 * 16
    torch.testing.assert_close(distillation_loss(student, teacher, temperature=4.0), expected)


def test_other_tensors_are_compared_by_their_relative_square_error() -> None:
    teacher = torch.full((2, 3, 4), 2.0)
    assert distillation_loss(teacher + 1, teacher).item() == pytest.approx(1 / 4)
    assert distillation_loss(teacher[..., 0, :1], teacher[..., 0, :1]).item() == 0


def test_outputs_in_any_nesting_are_averaged() -> None:
    teacher = {"a": torch.ones(2, 1), "b": [torch.ones(2, 1), torch.tensor([1])]}
    student = {"a": torch.ones(2, 1) * 3, "b": [torch.ones(2, 1), torch.tensor([5])]}
    assert distillation_loss(student, teacher).item() == pytest.approx(2.0)


def test_outputs_of_other_shapes_are_refused_with_both() -> None:
    with pytest.raises(ModelError, match=r"\(2, 3\).*\(2, 4\)"):
        distillation_loss(torch.ones(2, 3), torch.ones(2, 4))


def test_the_teacher_gets_no_gradient_from_the_loss() -> None:
    student, teacher = torch.ones(2, 3, requires_grad=True), torch.zeros(2, 3, requires_grad=True)
    distillation_loss(student * torch.arange(3), teacher).backward()
    assert student.grad is not None
    assert teacher.grad is None


def test_outputs_with_logits_are_compared_by_these_token_by_token() -> None:
    generator = torch.Generator().manual_seed(0)
    ours, theirs = (torch.randn(2, 3, 5, generator=generator) for _ in range(2))
    student = SimpleNamespace(logits=ours, loss=torch.tensor(1.0))
    teacher = SimpleNamespace(logits=theirs, loss=torch.tensor(9.0))
    tokens = distillation_loss(ours.flatten(0, 1), theirs.flatten(0, 1))
    assert torch.equal(distillation_loss(student, teacher), tokens)


def test_equal_features_are_compared_by_their_relative_square_error() -> None:
    teacher = torch.full((2, 3, 4, 4), 2.0)
    assert feature_distance(teacher + 1, teacher).item() == pytest.approx(1 / 4)


def test_attention_is_the_papers_formula() -> None:
    features = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    summed = (features**2).sum(1).reshape(2, -1)
    expected = torch.stack([sample / sample.norm() for sample in summed])
    torch.testing.assert_close(attention_map(features), expected)


@pytest.mark.parametrize("channels", [1, -1])
def test_narrower_features_are_compared_by_their_attention(channels: int) -> None:
    generator = torch.Generator().manual_seed(0)
    ours, theirs = (torch.randn(2, c, 6, generator=generator) for c in (3, 8))
    expected = (attention_map(ours) - attention_map(theirs)).square().sum(1).mean()
    moved = [features.movedim(1, channels) for features in (ours, theirs)]
    torch.testing.assert_close(feature_distance(*moved), expected)


@pytest.mark.parametrize("shapes", [((2, 3), (2, 4)), ((2, 3, 4), (2, 4, 5)), ((2, 3), (2, 3, 4))])
def test_features_without_common_positions_are_refused(shapes: Any) -> None:
    with pytest.raises(ModelError, match="cannot be compared"):
        feature_distance(*(torch.ones(shape) for shape in shapes))
