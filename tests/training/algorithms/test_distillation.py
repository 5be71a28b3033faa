from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compressor.errors import ModelError
from compressor.training.algorithms import Distillation, distillation_loss
from tests.training.helpers import (
    are_equal,
    cross_entropy,
    make_loader,
    make_model,
    make_trainer,
    weights_of,
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


def test_the_total_is_task_and_distance_by_their_weights() -> None:
    model, teacher = make_model(), make_model(seed=1)
    trainer = make_trainer(
        model,
        algorithms=[Distillation(teacher, weight=0.7, task_weight=0.3, temperature=3.0)],
        max_duration="1ba",
    )
    x, y = next(iter(make_loader()))
    with torch.no_grad():
        outputs = make_model()(x)
        task = nn.functional.cross_entropy(outputs, y)
        distance = distillation_loss(outputs, teacher.eval()(x), 3.0)
    trainer.fit()
    metrics = trainer.state.train_metrics
    assert metrics["train/loss"] == pytest.approx(task.item())
    assert metrics["train/distillation"] == pytest.approx(distance.item())
    assert metrics["train/total"] == pytest.approx((0.3 * task + 0.7 * distance).item())


def test_the_teacher_comes_back_as_it_was() -> None:
    teacher = make_model(seed=1)
    teacher[0].requires_grad_(False)
    teacher[1].eval()
    before = weights_of(teacher)
    make_trainer(algorithms=[Distillation(teacher)]).fit()
    assert are_equal(before, weights_of(teacher))
    assert [module.training for module in teacher] == [True, False, True, True, True]
    assert [p.requires_grad for p in teacher[0].parameters()] == [False, False]
    assert all(p.grad is None for p in teacher.parameters())


def test_the_teacher_sees_what_the_student_sees_at_every_call() -> None:
    seen: dict[str, list[Tensor]] = {"student": [], "teacher": []}

    class Noting(nn.Module):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name, self.linear = name, nn.Linear(4, 2)

        def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
            seen[self.name].append(x * scale)
            return self.linear(x * scale)

    def augmented(model: nn.Module, batch: Any) -> Tensor:
        first = model(batch[0] + torch.randn_like(batch[0]), scale=2.0)
        return first.square().mean() + model(batch[0]).square().mean()

    distillation = Distillation(Noting("teacher"))
    trainer = make_trainer(
        Noting("student"), step=augmented, algorithms=[distillation], max_duration="2ba"
    )
    trainer.fit()
    assert len(seen["student"]) == 4
    assert all(map(torch.equal, seen["student"], seen["teacher"]))


def test_a_student_of_its_teacher_alone_comes_nearer() -> None:
    distillation = Distillation(make_model(seed=1), weight=1.0, task_weight=0.0)
    trainer = make_trainer(algorithms=[distillation])
    trainer.fit("1ep")
    first = trainer.state.train_metrics["train/distillation"]
    trainer.fit("15ep")
    assert trainer.state.train_metrics["train/distillation"] < 0.5 * first


def test_a_loss_that_goes_round_the_model_cannot_be_distilled() -> None:
    def step(model: nn.Sequential, batch: Any) -> Tensor:
        return model.forward(batch[0]).square().mean()

    with pytest.raises(ModelError, match="never called the model"):
        make_trainer(step=step, algorithms=[Distillation(make_model())]).fit()


def test_the_teacher_is_not_in_the_checkpoint() -> None:
    trainer = make_trainer(algorithms=[Distillation(make_model())], step=cross_entropy)
    assert trainer.state_dict()["listeners"] == {"Distillation": {}}
