from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from compressor.errors import ConfigError, ModelError
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


def test_logits_under_a_key_are_compared_alone_like_those_of_an_attribute() -> None:
    generator = torch.Generator().manual_seed(0)
    ours, theirs = (torch.randn(4, 5, generator=generator) for _ in range(2))
    student = {"logits": ours, "hidden": torch.zeros(4, 9)}
    teacher = {"logits": theirs, "hidden": torch.ones(4, 7)}
    assert torch.equal(distillation_loss(student, teacher), distillation_loss(ours, theirs))


def test_of_images_the_classes_are_the_channels() -> None:
    generator = torch.Generator().manual_seed(0)
    ours, theirs = (torch.randn(2, 5, 3, 4, generator=generator) for _ in range(2))
    pixels = [t.movedim(1, -1).reshape(24, 5) for t in (ours, theirs)]
    distance = distillation_loss({"logits": ours}, {"logits": theirs})
    torch.testing.assert_close(distance, distillation_loss(*pixels))


@pytest.mark.parametrize("classes", [5, 1])
def test_padding_does_not_count(classes: int) -> None:
    generator = torch.Generator().manual_seed(0)
    ours, theirs = (torch.randn(2, 3, classes, generator=generator) for _ in range(2))
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    counted = [{"logits": t[mask.bool()]} for t in (ours, theirs)]
    ours[1, 2], theirs[1, 2] = torch.nan, torch.inf  # whatever padding gives
    distance = distillation_loss({"logits": ours}, {"logits": theirs}, 2.0, mask)
    torch.testing.assert_close(distance, distillation_loss(*counted))
    nothing = distillation_loss({"logits": ours}, {"logits": theirs}, 2.0, torch.zeros(2, 3))
    assert nothing.item() == 0


def test_a_mask_of_another_form_than_the_logits_is_passed_over() -> None:
    # That of the tokens, of a classifier of sentences.
    ours, theirs = torch.eye(2, 4), torch.ones(2, 4)
    masked = distillation_loss({"logits": ours}, {"logits": theirs}, 2.0, torch.ones(2, 7))
    assert torch.equal(masked, distillation_loss(ours, theirs))


def test_a_class_that_neither_admits_is_left_out() -> None:
    generator = torch.Generator().manual_seed(0)
    ours, theirs = (torch.randn(3, 5, generator=generator) for _ in range(2))
    expected = distillation_loss(ours[:, :4], theirs[:, :4])
    ours[:, 4] = theirs[:, 4] = -torch.inf
    ours.requires_grad_(True)
    distance = distillation_loss(ours, theirs)
    distance.backward()
    torch.testing.assert_close(distance, expected)
    assert ours.grad is not None
    assert ours.grad.isfinite().all()


def test_a_class_that_only_the_teacher_excludes_costs_what_the_student_gives_it() -> None:
    ours, theirs = torch.zeros(1, 3), torch.tensor([[0.0, 0.0, -torch.inf]])
    # KL = sum of p log(p / q), with p = 1/2, 1/2, 0 and q = 1/3 each
    distance = distillation_loss(ours, theirs, temperature=1.0)
    assert distance.item() == pytest.approx(math.log(1.5))


def test_a_temperature_that_softens_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="temperature=0"):
        distillation_loss(torch.ones(1, 2), torch.ones(1, 2), temperature=0)


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
