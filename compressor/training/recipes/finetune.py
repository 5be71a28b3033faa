"""Trainers for models that were compressed: three levels, each on top of the one before."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import nn

from compressor.errors import ConfigError, suggest
from compressor.training.algorithm import Algorithm
from compressor.training.algorithms.channels_last import ChannelsLast
from compressor.training.algorithms.cutmix import CutMix
from compressor.training.algorithms.distillation import Distillation
from compressor.training.algorithms.gradient_clipping import GradientClipping
from compressor.training.algorithms.label_smoothing import LabelSmoothing
from compressor.training.algorithms.mixup import MixUp
from compressor.training.algorithms.sam import SAM
from compressor.training.algorithms.weight_average import EMA
from compressor.training.evaluator import Evaluator
from compressor.training.tasks.base import TaskModel
from compressor.training.tasks.classifier import ClassifierTask
from compressor.training.trainer import Trainer

Teacher: TypeAlias = "nn.Module | Sequence[nn.Module] | None"
EvalData: TypeAlias = "Iterable[Any] | Evaluator | Sequence[Evaluator] | None"


def mild_algorithms(teacher: Teacher) -> list[Algorithm]:
    """Distillation, if there is a teacher; gradient clipping, EMA, channels-last."""
    distillation = [] if teacher is None else [Distillation(teacher)]
    return [ChannelsLast(), *distillation, GradientClipping(), EMA()]


def medium_algorithms(teacher: Teacher) -> list[Algorithm]:
    """`mild_algorithms`, MixUp and label smoothing, for batches (inputs, targets)."""
    return [*mild_algorithms(teacher), MixUp(), LabelSmoothing()]


def hot_algorithms(teacher: Teacher) -> list[Algorithm]:
    """`medium_algorithms`, CutMix and SAM, for batches (images, targets)."""
    return [*medium_algorithms(teacher), CutMix(), SAM()]


@dataclass(frozen=True)
class Level:
    """How hard a compressed model is trained.

    Attributes:
        algorithms: of a teacher.
        max_duration: of the fit.
    """

    algorithms: Callable[[Teacher], list[Algorithm]]
    max_duration: str


LEVELS: Mapping[str, Level] = {
    "mild": Level(mild_algorithms, "10ep"),
    "medium": Level(medium_algorithms, "20ep"),
    "hot": Level(hot_algorithms, "40ep"),
}


def finetune_compressed(
    level: str,
    model: nn.Module,
    teacher: Teacher,
    train_dataloader: Iterable[Any],
    eval_dataloader: EvalData = None,
    **options: Any,
) -> Trainer:
    """A trainer that recovers what a compressed model has lost; call its `fit()`.

    Level "mild" suits every model; "medium" wants class indices as targets and a loss that also
    takes weights of the classes, as cross entropy does; "hot" wants images beside, and takes twice
    the passes for twice the epochs.

    Args:
        level: "mild", "medium" or "hot"; see `mild_algorithms` and so on.
        model: a `TaskModel`, or a classifier called with the first element of a batch, which is
            wrapped in a `ClassifierTask`; trained in place.
        teacher: the model before it was compressed, or several; None: train without.
        train_dataloader: any iterable of batches that can be iterated again.
        eval_dataloader: as of `Trainer`.
        options: of `Trainer`; `algorithms` are added to those of the level.

    Raises:
        ConfigError: if there is no such level, or an option contradicts it.
    """
    if level not in LEVELS:
        raise ConfigError(f"There is no level {level!r}. {suggest(str(level), LEVELS)}")
    chosen = LEVELS[level]
    options = {"max_duration": chosen.max_duration, **options}
    algorithms = [*chosen.algorithms(teacher), *options.pop("algorithms", ())]
    return _make_trainer(model, train_dataloader, eval_dataloader, algorithms, options)


def distill(
    student: nn.Module,
    teacher: nn.Module | Sequence[nn.Module],
    train_dataloader: Iterable[Any],
    eval_dataloader: EvalData = None,
    *,
    distillation: Mapping[str, Any] | None = None,
    **options: Any,
) -> Trainer:
    """A trainer in which `student` learns from labels and from `teacher`; call its `fit()`.

    Args:
        student: a `TaskModel`, or a classifier called with the first element of a batch, which is
            wrapped in a `ClassifierTask`; trained in place.
        teacher: is called like the student; or several.
        train_dataloader: any iterable of batches that can be iterated again.
        eval_dataloader: as of `Trainer`.
        distillation: options of `Distillation`, such as {"temperature": 4.0}; None: its defaults.
        options: of `Trainer`; `algorithms` are added.

    Raises:
        ConfigError: if options contradict each other.
    """
    algorithms = [Distillation(teacher, **(distillation or {})), *options.pop("algorithms", ())]
    return _make_trainer(student, train_dataloader, eval_dataloader, algorithms, options)


def _make_trainer(
    model: nn.Module,
    train_dataloader: Iterable[Any],
    eval_dataloader: EvalData,
    algorithms: Sequence[Algorithm],
    options: Mapping[str, Any],
) -> Trainer:
    is_known = isinstance(model, TaskModel) or options.get("step") is not None
    return Trainer(
        model if is_known else ClassifierTask(model),
        train_dataloader=train_dataloader,
        eval_dataloader=eval_dataloader,
        algorithms=algorithms,
        **options,
    )
