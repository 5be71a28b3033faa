from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from compressor.errors import ConfigError, ModelError
from compressor.structure import surgery
from compressor.testing.models import TinyResNet
from compressor.training import (
    Algorithm,
    Callback,
    Event,
    EventEngine,
    State,
    TaskModel,
    Window,
)
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
    assert distillation.features == {"0": "0", "3": "3"}  # as given, for another trainer
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


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"temperature": 0}, "temperature=0"),
        ({"weight": 0}, "weight=0 compares no outputs"),
        ({"weight": 0, "features": ["0"], "feature_weight": 0}, "weight=0 compares no outputs"),
        ({"weight": -1}, "weight=-1 would reward"),
        ({"task_weight": -1}, "task_weight=-1 would reward"),
        ({"feature_weight": -1, "features": ["0"]}, "feature_weight=-1 would reward"),
        ({"features": "layer"}, r"Write \['layer'\]"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Distillation(make_model(), **options)


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


def held(distillation: Distillation) -> int:
    return sum(map(len, distillation._student_taps._outputs.values()))


@pytest.mark.parametrize("window", [("0dur", "0.5dur"), ("0.5dur", "1dur")])
def test_no_feature_is_held_after_a_batch_inside_or_outside_a_window(window: Any) -> None:
    """Outside, each batch left a tensor with its graph."""
    distillation = Distillation(make_model(seed=1), features=["0"])
    distillation.window = Window.parse(*window)
    counts: list[int] = []
    acts: list[bool] = []

    class Counting(Callback):
        events = frozenset({Event.BATCH_END})

        def on(self, event: Event, state: State) -> None:
            counts.append(held(distillation))
            acts.append("distillation_features" in state.losses)

    make_trainer(algorithms=[distillation], callbacks=[Counting()]).fit()
    assert counts == [0] * 8
    is_early = window[0] == "0dur"
    assert acts == [is_early] * 4 + [not is_early] * 4


def test_features_of_a_pass_that_was_broken_off_do_not_count() -> None:
    task = Classifier(make_model())
    state, distillation = State(task, "1ep"), Distillation(make_model(seed=1), features=["0"])
    engine = EventEngine(state, [distillation])
    engine.run_event("setup")
    state.batch = next(iter(make_loader()))
    for _ in range(2):  # the first did not fit into memory
        engine.run_event("before_forward")
        state.outputs = task(state.batch)
    assert held(distillation) == 1
    state.loss = task.loss(state.outputs, state.batch)
    engine.run_event("after_loss")
    assert "distillation_features" in state.losses
    engine.close()


def test_activations_that_the_backward_pass_computes_again_do_not_count() -> None:
    class Thrifty(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = make_model()

        def forward(self, x: Tensor) -> Tensor:
            return self.layers[1:](checkpoint(self.layers[0], x, use_reentrant=False))

    distillation = Distillation(make_model(seed=1), features={"layers.0": "0"})
    trainer = make_trainer(Thrifty(), algorithms=[distillation])
    trainer.fit()
    plain = make_trainer(algorithms=[Distillation(make_model(seed=1), features=["0"])])
    plain.fit()
    assert trainer.state.train_metrics == pytest.approx(plain.state.train_metrics)


def test_weights_that_task_terms_have_already_are_multiplied() -> None:
    class Halving(Algorithm):
        events = frozenset({Event.AFTER_LOSS})

        def on(self, event: Event, state: State) -> None:
            state.weights["loss"] = 0.5

    distillation = Distillation(make_model(seed=1), weight=2.0, task_weight=0.3)
    metrics = distances_of(Halving(), distillation)
    total = 0.15 * metrics["train/loss"] + 2 * metrics["train/distillation"]
    assert metrics["train/total"] == pytest.approx(total)


def test_one_that_was_used_before_compares_all_features_of_another_model() -> None:
    class Removing(Algorithm):
        events = frozenset({Event.BATCH_END})

        def on(self, event: Event, state: State) -> None:
            if state.clock.batch == 2:
                state.edit(lambda m: surgery.remove(m, "3"))

    used = Distillation(make_model(seed=1), features=["0", "3"])
    make_trainer(algorithms=[used, Removing()]).fit()
    fresh = Distillation(make_model(seed=1), features=["0", "3"])
    assert distances_of(used) == distances_of(fresh)


class Tokens(TaskModel):
    """Scores of each token, by a model that is not told which are padding."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Any) -> Any:
        return {"logits": self.model(batch["input_ids"])}

    def loss(self, outputs: Any, batch: Any) -> Tensor:
        return outputs["logits"].square().mean()


class Told(nn.Module):
    """The same of transformers' kind, which gives an object."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        return SimpleNamespace(logits=self.model(input_ids))


@pytest.mark.parametrize("kind", [Tokens, Told])
def test_padding_does_not_count_where_the_batch_or_the_call_says_what_it_is(kind: Any) -> None:
    def embedding(seed: int) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return nn.Embedding(9, 4)

    def step(model: nn.Module, batch: Any) -> Tensor:
        outputs = model(batch[0], attention_mask=batch[1])
        return outputs.logits.square().mean()

    ids = torch.tensor([[1, 2, 3, 0, 0], [4, 5, 0, 0, 0]])
    mask = (ids > 0).long()
    metrics = distances_of(
        Distillation(kind(embedding(1))),
        model=kind(embedding(0)),
        step=None if kind is Tokens else step,
        train_dataloader=[
            {"input_ids": ids, "attention_mask": mask} if kind is Tokens else (ids, mask)
        ],
    )
    words = torch.arange(1, 6)
    wanted = distillation_loss(embedding(0)(words), embedding(1)(words))
    assert metrics["train/distillation"] == pytest.approx(wanted.item())
