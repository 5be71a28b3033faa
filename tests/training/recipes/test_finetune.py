from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.methods import describe
from benchmarks.methods_table import METHODS
from compressor.errors import ConfigError, DataError
from compressor.training import TaskModel, Trainer
from compressor.training.algorithms import SAM, CutMix, Distillation
from compressor.training.recipes import (
    distill,
    finetune_compressed,
    hot_algorithms,
    medium_algorithms,
    mild_algorithms,
)
from compressor.training.tasks.classifier import ClassifierTask
from tests.training.helpers import are_equal, make_loader, make_model, weights_of
from tests.training.recipes.test_presets import images, make_net

LEVELS = {"mild": mild_algorithms, "medium": medium_algorithms, "hot": hot_algorithms}


def keys(algorithms: Any) -> list[str]:
    return [type(each).__name__ for each in algorithms]


def test_each_level_adds_to_the_one_below() -> None:
    teacher = make_model()
    mild, medium, hot = (keys(make(teacher)) for make in LEVELS.values())
    assert mild == ["ChannelsLast", "Distillation"]
    assert medium == [*mild, "CutMix"]
    assert hot == [*medium, "SAM"]


def test_without_a_teacher_nothing_is_mixed() -> None:
    found = [keys(make(None)) for make in LEVELS.values()]
    assert found == [["ChannelsLast"], ["ChannelsLast"], ["ChannelsLast", "SAM"]]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("is_task", [False, True])
def test_every_level_trains_a_classifier_and_a_task(level: str, is_task: bool) -> None:
    net, teacher, data = make_net(), make_net(), images()
    model = ClassifierTask(net) if is_task else net
    before, taught = weights_of(net), weights_of(teacher)
    trainer = finetune_compressed(level, model, teacher, data, data, max_duration="1ep")
    trainer.fit()
    assert not are_equal(before, weights_of(net))
    assert are_equal(taught, weights_of(teacher))
    assert isinstance(trainer.model, TaskModel)
    assert trainer.model.model is net
    assert 0 <= trainer.state.metrics["accuracy"] <= 1
    assert "train/distillation" in trainer.state.train_metrics


def test_harder_levels_train_longer_unless_told_otherwise() -> None:
    def total(level: str, **options: Any) -> float:
        trainer = finetune_compressed(level, make_net(), None, images(), **options)
        return trainer.state.max_duration.value

    assert total("mild") < total("medium") < total("hot")
    assert total("hot", max_duration="3ep") == 3


def test_an_unknown_level_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"no level 'mld'\. Did you mean 'mild'"):
        finetune_compressed("mld", make_net(), None, images())


def test_algorithms_are_added_to_those_of_the_level() -> None:
    extra = Distillation(make_net())
    trainer = finetune_compressed("mild", make_net(), None, images(), algorithms=[extra])
    assert extra in trainer.state.algorithms
    assert len(trainer.state.algorithms) == 2


def test_an_algorithm_with_the_key_of_one_of_the_levels_takes_its_place() -> None:
    own = SAM(interval=2)
    trainer = finetune_compressed("hot", make_net(), make_net(), images(), algorithms=[own])
    assert [each for each in trainer.state.algorithms if isinstance(each, SAM)] == [own]
    assert len(trainer.state.algorithms) == 4


def test_a_level_is_made_of_what_the_benchmark_measured() -> None:
    teacher = make_net()
    place = SimpleNamespace(teacher=teacher)
    measured = {method.name: method.make for method in METHODS}
    mild, medium, hot = ([describe(each) for each in make(teacher)] for make in LEVELS.values())
    alone = [measured[name](place) for name in ("ChannelsLast", "Distillation")]  # type: ignore[arg-type]
    assert mild == [describe(each) for (each,) in alone]
    assert [describe(CutMix()), describe(SAM(interval=4))] == [medium[-1], hot[-1]]


def as_dicts() -> list[Any]:
    return [{"image": x, "label": y} for x, y in images()]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("is_task", [False, True])
def test_every_level_takes_dict_batches(level: str, is_task: bool) -> None:
    keys: Any = {"input_key": "image", "target_key": "label"}
    dicts, tuples = make_net(), make_net()
    common: Any = {"max_duration": "2ep"}
    if is_task:
        finetune_compressed(level, ClassifierTask(dicts, **keys), None, as_dicts(), **common).fit()
    else:
        finetune_compressed(level, dicts, None, as_dicts(), **keys, **common).fit()
    finetune_compressed(level, tuples, None, images(), **common).fit()
    assert are_equal(weights_of(dicts), weights_of(tuples))


def test_distill_takes_dict_batches() -> None:
    student = make_net()
    before = weights_of(student)
    keys: Any = {"input_key": "image", "target_key": "label"}
    distill(student, make_net(), as_dicts(), max_duration="1ep", **keys).fit()
    assert not are_equal(before, weights_of(student))


def test_a_model_in_the_levels_place_is_not_printed() -> None:
    with pytest.raises(ConfigError, match=r"^The level is a Sequential\. It comes first") as error:
        finetune_compressed(make_net(), "mild", None, images())  # type: ignore[arg-type]
    assert "Conv2d" not in str(error.value)


def test_distill_is_a_trainer_with_a_teacher() -> None:
    students = [make_model(1) for _ in range(2)]
    teacher, data = make_model(2), make_loader()
    options: dict[str, Any] = {"max_duration": "3ep", "optimizers": {"name": "SGD", "lr": 0.1}}
    distill(
        students[0], teacher, data, distillation={"temperature": 3.0, "weight": 1.0}, **options
    ).fit()
    by_hand = ClassifierTask(students[1])
    method = Distillation(teacher, temperature=3.0, weight=1.0)
    Trainer(by_hand, train_dataloader=data, algorithms=[method], **options).fit()
    assert are_equal(weights_of(students[0]), weights_of(students[1]))


def test_a_student_comes_nearer_to_its_teacher() -> None:
    student, teacher = make_model(1).eval(), make_model(2).eval()
    x = make_loader().dataset.tensors[0]  # type: ignore[attr-defined]

    def distance() -> float:
        with torch.no_grad():
            p, q = (model(x).softmax(1) for model in (student, teacher))
        return float((p - q).abs().mean())

    before = distance()
    only_the_teacher = {"weight": 1.0, "task_weight": 0.0}
    distill(
        student, [teacher, copy.deepcopy(teacher)], make_loader(), distillation=only_the_teacher
    ).fit()
    assert distance() < before / 2


def test_a_step_of_the_users_own_is_used_as_it_is() -> None:
    net = make_net()

    def step(model: nn.Module, batch: Any) -> torch.Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    trainer = finetune_compressed("mild", net, make_net(), images(), step=step, max_duration="1ep")
    trainer.fit()
    assert trainer.model is net


@pytest.mark.parametrize("level", LEVELS)
def test_a_level_resumes_bit_equal_within_an_epoch(level: str, tmp_path: Path) -> None:
    def make(loader: Any, save_dir: Path | None) -> Trainer:
        return finetune_compressed(
            level,
            make_net(),
            make_net(),
            loader,
            images(),
            max_duration="3ep",
            save_dir=save_dir,
            save_interval="2ba",
            autoresume=save_dir is not None,
        )

    straight = make(images(), None)
    straight.fit()
    with pytest.raises(DataError, match="the disk is gone"):
        make(FailingLoader(fail_at=5), tmp_path).fit()
    resumed = make(images(), tmp_path)
    resumed.fit()
    assert are_equal(weights_of(resumed.model), weights_of(straight.model))
    assert resumed.state.metrics == straight.state.metrics


class FailingLoader:
    """The images, until the disk is gone."""

    def __init__(self, fail_at: int) -> None:
        self.left = fail_at

    def __iter__(self) -> Iterator[Any]:
        for batch in images():
            self.left -= 1
            if self.left < 0:
                raise OSError("the disk is gone")
            yield batch

    def __len__(self) -> int:
        return len(images())


def test_batches_of_another_form_say_the_way_out() -> None:
    with pytest.raises(DataError, match=r"Set input_key and .* a TaskModel of your own, whose"):
        finetune_compressed("mild", make_net(), None, as_dicts(), max_duration="1ep").fit()
