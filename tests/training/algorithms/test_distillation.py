from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compressor.errors import ConfigError, ModelError
from compressor.structure import surgery
from compressor.testing.models import TinyResNet
from compressor.training import Algorithm, Event, EventEngine, State, TaskModel
from compressor.training.algorithms.distillation import (
    Distillation,
    distillation_loss,
    feature_distance,
)
from compressor.training.algorithms.sam import SAM
from tests.training.algorithms.resuming import assert_resumes
from tests.training.helpers import (
    are_equal,
    cross_entropy,
    make_loader,
    make_model,
    make_trainer,
    weights_of,
)


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
    assert trainer.state_dict()["algorithms"] == {"Distillation": {}}


class Classifier(TaskModel):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Any) -> Tensor:
        return self.model(batch[0])

    def loss(self, outputs: Any, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(outputs, batch[1])


def distances_of(*algorithms: Algorithm, **options: Any) -> dict[str, float]:
    trainer = make_trainer(algorithms=algorithms, max_duration="1ba", **options)
    trainer.fit()
    return trainer.state.train_metrics


def test_several_teachers_count_alike() -> None:
    teachers = [make_model(seed=seed) for seed in (1, 2, 3)]
    each = [distances_of(Distillation(t))["train/distillation"] for t in teachers]
    together = distances_of(Distillation(teachers))["train/distillation"]
    assert together == pytest.approx(sum(each) / 3)


def test_a_drawn_teacher_is_asked_alone_and_for_the_whole_batch() -> None:
    asked: list[tuple[int, int]] = []

    def note(number: int) -> Any:
        return lambda *_: asked.append((trainer.state.clock.batch, number))

    teachers = [make_model(seed=seed) for seed in range(3)]
    for number, teacher in enumerate(teachers):
        teacher.register_forward_hook(note(number))
    trainer = make_trainer(
        algorithms=[Distillation(teachers, sample=True)], micro_batch_size=4, max_duration="6ep"
    )
    trainer.fit()
    drawn = dict(asked)
    assert len(asked) == 2 * 24
    assert len(set(asked)) == len(drawn) == 24
    assert set(drawn.values()) == {0, 1, 2}


def test_a_bare_teacher_is_called_by_the_students_task() -> None:
    bare = distances_of(Distillation(make_model(seed=1)))
    task = distances_of(Distillation(make_model(seed=1)), model=Classifier(make_model()), step=None)
    both = distances_of(
        Distillation(Classifier(make_model(seed=1))), model=Classifier(make_model()), step=None
    )
    assert bare == pytest.approx(task)
    assert bare == pytest.approx(both)


def test_two_distillations_have_terms_of_their_own() -> None:
    other = Distillation(make_model(seed=2))
    other.key = "other"
    metrics = distances_of(Distillation(make_model(seed=1)), other)
    assert {"train/distillation", "train/other"} <= metrics.keys()


def test_features_are_compared_as_the_formula_says() -> None:
    student, teacher = make_model(), make_model(seed=1)
    x, _ = next(iter(make_loader()))
    with torch.no_grad():
        ours, theirs = student[:2](x), teacher.eval()[:2](x)
        hidden = make_model()[:1](x), teacher[:1](x)
    expected = feature_distance(ours, theirs) + feature_distance(*hidden)
    metrics = distances_of(
        Distillation(teacher, features=["0", "1"], feature_weight=2.0, task_weight=0.0),
        model=make_model(),
    )
    assert metrics["train/distillation_features"] == pytest.approx(expected.item() / 2)
    total = 0.9 * metrics["train/distillation"] + 2 * metrics["train/distillation_features"]
    assert metrics["train/total"] == pytest.approx(total)


def test_features_alone_bring_the_student_nearer() -> None:
    student, teacher = Classifier(TinyResNet(width=4)), TinyResNet(width=8)
    generator = torch.Generator().manual_seed(0)
    loader = [(torch.randn(8, 1, 8, 8, generator=generator), torch.arange(8))]
    names = {"layer1": "layer1", "model.layer2.0": "layer2.0"}
    distillation = Distillation(teacher, features=names, weight=0.0, task_weight=0.0)
    trainer = make_trainer(
        student, step=None, train_dataloader=loader, algorithms=[distillation], max_duration="1ep"
    )
    trainer.fit()
    first = trainer.state.train_metrics["train/distillation_features"]
    trainer.fit("40ep")
    assert "train/distillation" not in trainer.state.train_metrics
    assert trainer.state.train_metrics["train/distillation_features"] < 0.8 * first


def test_no_tap_is_left_and_a_second_fit_has_them_again() -> None:
    student, teacher = make_model(), make_model(seed=1)
    trainer = make_trainer(
        student, algorithms=[Distillation(teacher, features=["1"])], max_duration="1ep"
    )
    trainer.fit()
    assert not any(m._forward_hooks for m in (*student.modules(), *teacher.modules()))
    trainer.fit("1ep")
    assert trainer.state.train_metrics["train/distillation_features"] > 0
    assert not any(m._forward_hooks for m in (*student.modules(), *teacher.modules()))


def test_features_and_samples_stay_right_in_micro_batches_and_under_sam() -> None:
    def train(size: int | None) -> dict[str, float]:
        student = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
        teacher = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
        trainer = make_trainer(
            student,
            algorithms=[Distillation(teacher, features=["0"], feature_weight=0.1), SAM()],
            micro_batch_size=size,
        )
        trainer.fit()
        return trainer.state.train_metrics

    with torch.random.fork_rng():
        torch.manual_seed(0)
        whole = train(None)
        torch.manual_seed(0)
        parts = train(4)
    # Means of squares over halves, divided by each half's own mean square: not the same number.
    assert parts["train/loss"] == pytest.approx(whole["train/loss"], rel=0.02)


def test_layers_that_surgery_replaces_are_tapped_and_those_it_removes_drop_out() -> None:
    class Editing(Algorithm):
        events = frozenset({Event.BATCH_END})

        def on(self, event: Event, state: State) -> None:
            if state.clock.batch == 2:
                state.edit(lambda m: surgery.replace(m, "0", nn.Linear(4, 8)))
            if state.clock.batch == 4:
                state.edit(lambda m: surgery.replace(m, "1", surgery.Skip()))
                state.edit(lambda m: surgery.remove(m, "3"))

    distillation = Distillation(make_model(seed=1), features=["0", "3"])
    trainer = make_trainer(algorithms=[distillation, Editing()], max_duration="3ep")
    trainer.fit()
    assert distillation.features == {"0": "0"}
    assert trainer.state.train_metrics["train/distillation_features"] > 0


def test_layers_of_unknown_name_are_refused_before_anything_is_done() -> None:
    with pytest.raises(ConfigError, match="no layer '9'"):
        make_trainer(algorithms=[Distillation(make_model(), features={"9": "0"})])
    trainer = make_trainer(algorithms=[Distillation(make_model(), features={"0": "9"})])
    with pytest.raises(ConfigError, match="no layer '9'"):
        trainer.fit()


def test_a_layer_that_runs_more_often_than_the_teachers_is_refused() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.linear(self.linear(x)))

    distillation = Distillation(make_model(), features={"linear": "0"})
    with pytest.raises(ModelError, match="gave 2 feature tensors and its teacher's 1"):
        make_trainer(Twice(), algorithms=[distillation]).fit()


def test_a_model_cannot_be_its_own_teacher() -> None:
    model = make_model()
    with pytest.raises(ConfigError, match="Give a copy"):
        make_trainer(model, algorithms=[Distillation(model)]).fit()
    with pytest.raises(ConfigError, match="no teacher"):
        Distillation([])
    with pytest.raises(ConfigError, match="temperature=0"):
        Distillation(make_model(), temperature=0)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_it_trains_in_mixed_precision(precision: str) -> None:
    distillation = Distillation(make_model(seed=1), features=["0"])
    trainer = make_trainer(algorithms=[distillation], precision=precision)
    trainer.fit()
    assert trainer.state.train_metrics["train/distillation_features"] > 0


def test_it_resumes_with_drawn_teachers_and_features() -> None:
    def make(callbacks: list[Any]) -> Any:
        teachers = [make_model(seed=1), make_model(seed=2)]
        return make_trainer(
            make_model(dropout=0.2),
            train_dataloader=make_loader(shuffle=True),
            algorithms=[Distillation(teachers, sample=True, features=["1"])],
            callbacks=callbacks,
        )

    assert_resumes(make, [2, 4, 5])


def test_it_works_in_a_loop_of_ones_own() -> None:
    task = Classifier(make_model())
    state = State(task, "1ep")
    engine = EventEngine(state, [Distillation(make_model(seed=1), features=["0"])])
    engine.run_event("setup")
    state.batch = next(iter(make_loader()))
    engine.run_event("before_forward")
    state.outputs = task(state.batch)
    engine.run_event("after_forward")
    state.loss = task.loss(state.outputs, state.batch)
    engine.run_event("after_loss")
    assert {"loss", "distillation", "distillation_features"} == state.losses.keys()
    state.loss.backward()
    engine.close()


@pytest.mark.slow
@pytest.mark.parametrize("is_task", [False, True])
def test_a_compiled_student_has_its_taps(is_task: bool) -> None:
    def train(compiled: Any) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
        model: nn.Module = Classifier(make_model()) if is_task else make_model()
        step = None if is_task else cross_entropy
        trainer = make_trainer(
            model,
            step=step,
            algorithms=[Distillation(make_model(seed=1), features=["0", "1"])],
            compile=compiled,
            max_duration="1ep",
        )
        trainer.fit()
        seen = [dict(trainer.state.train_metrics)]
        trainer.fit("1ep")
        return weights_of(model), [*seen, dict(trainer.state.train_metrics)]

    torch.compiler.reset()
    eager, compiled = train(False), train({"backend": "eager"})
    for name, value in eager[0].items():
        torch.testing.assert_close(value, compiled[0][name])
    assert eager[1] == [pytest.approx(metrics) for metrics in compiled[1]]
