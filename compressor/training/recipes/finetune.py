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
from compressor.training.algorithms.sam import SAM
from compressor.training.evaluator import Evaluator
from compressor.training.tasks.base import TaskModel
from compressor.training.tasks.classifier import ClassifierTask
from compressor.training.trainer import Trainer

Teacher: TypeAlias = "nn.Module | Sequence[nn.Module] | None"
EvalData: TypeAlias = "Iterable[Any] | Evaluator | Sequence[Evaluator] | None"


def mild_algorithms(teacher: Teacher) -> list[Algorithm]:
    """Distillation with its defaults, if there is a teacher; channels-last.

    In short recoveries of a pruned ResNet-20, `docs/methods.md`, no other method gained as much as
    a teacher. Averages of the weights gained nothing, as the learning rate falls to 0, and clipping
    gradients at 1 lost: so neither is in it. With labels at full weight beside the teacher there
    was less to gain, by one seed.
    """
    return [ChannelsLast(), *([] if teacher is None else [Distillation(teacher)])]


def medium_algorithms(
    teacher: Teacher, input_key: int | str = 0, target_key: int | str = 1
) -> list[Algorithm]:
    """`mild_algorithms`, and CutMix if there is a teacher; the keys are places in a batch.

    Beside a teacher CutMix lost no more in a short recovery than other ways to show a network more
    than its few images; it is for longer ones. With labels alone it lost most of these, so that
    without a teacher there is none.
    """
    mixing = [] if teacher is None else [CutMix(input_key=input_key, target_key=target_key)]
    return [*mild_algorithms(teacher), *mixing]


def hot_algorithms(
    teacher: Teacher, input_key: int | str = 0, target_key: int | str = 1
) -> list[Algorithm]:
    """`medium_algorithms`, and SAM at every fourth batch, which makes steps a quarter longer."""
    return [*medium_algorithms(teacher, input_key, target_key), SAM(interval=4)]


@dataclass(frozen=True)
class Level:
    """How hard a compressed model is trained.

    Attributes:
        algorithms: of a teacher, and the places of inputs and targets in a batch.
        max_duration: of the fit.
    """

    algorithms: Callable[[Teacher, int | str, int | str], list[Algorithm]]
    max_duration: str


LEVELS: Mapping[str, Level] = {
    "mild": Level(lambda teacher, *_: mild_algorithms(teacher), "10ep"),
    "medium": Level(medium_algorithms, "20ep"),
    "hot": Level(hot_algorithms, "40ep"),
}


def finetune_compressed(
    level: str,
    model: nn.Module,
    teacher: Teacher,
    train_dataloader: Iterable[Any],
    eval_dataloader: EvalData = None,
    *,
    input_key: int | str | None = None,
    target_key: int | str | None = None,
    **options: Any,
) -> Trainer:
    """A trainer that recovers what a compressed model has lost; call its `fit()`.

    Level "mild" suits every model; "medium" and "hot" want images (N, C, H, W), class indices as
    targets and a loss that also takes weights of the classes, as cross entropy does.

    Begin with "mild". What the levels are made of was chosen by `benchmarks/methods.py`, whose
    recoveries are short: in those nothing that was added to the teacher gained. The higher levels
    train longer, which what they add is for; whether it pays is to be tried.

    Args:
        level: "mild", "medium" or "hot"; see `mild_algorithms` and so on.
        model: a `TaskModel`, or a classifier called with the first element of a batch, which is
            wrapped in a `ClassifierTask`; trained in place.
        teacher: the model before it was compressed, or several; None: train without.
        train_dataloader: any iterable of batches that can be iterated again.
        eval_dataloader: as of `Trainer`.
        input_key: place of the inputs in a batch; None: where the task says, else 0.
        target_key: place of the targets; None: where the task says, else 1.
        options: of `Trainer`; `algorithms` are added to those of the level, and take the place of
            those with the same key.

    Raises:
        ConfigError: if there is no such level, or an option contradicts it.
    """
    if not isinstance(level, str):
        raise ConfigError(
            f"The level is a {type(level).__name__}. It comes first: "
            "finetune_compressed('mild', model, teacher, train_dataloader)."
        )
    if level not in LEVELS:
        raise ConfigError(f"There is no level {level!r}. {suggest(level, LEVELS)}")
    chosen = LEVELS[level]
    options = {"max_duration": chosen.max_duration, **options}
    task = _make_task(model, input_key, target_key, options)
    keys = _keys(task, input_key, target_key)
    own = list(options.pop("algorithms", ()))
    replaced = {each.key for each in own}
    others = [each for each in chosen.algorithms(teacher, *keys) if each.key not in replaced]
    return _make_trainer(task, train_dataloader, eval_dataloader, [*others, *own], options)


def distill(
    student: nn.Module,
    teacher: nn.Module | Sequence[nn.Module],
    train_dataloader: Iterable[Any],
    eval_dataloader: EvalData = None,
    *,
    distillation: Mapping[str, Any] | None = None,
    input_key: int | str | None = None,
    target_key: int | str | None = None,
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
        input_key: place of the inputs in a batch, for a student that is no task; None: 0.
        target_key: place of the targets likewise; None: 1.
        options: of `Trainer`; `algorithms` are added.

    Raises:
        ConfigError: if options contradict each other.
    """
    algorithms = [Distillation(teacher, **(distillation or {})), *options.pop("algorithms", ())]
    task = _make_task(student, input_key, target_key, options)
    return _make_trainer(task, train_dataloader, eval_dataloader, algorithms, options)


def _make_task(
    model: nn.Module,
    input_key: int | str | None,
    target_key: int | str | None,
    options: Mapping[str, Any],
) -> nn.Module:
    if isinstance(model, TaskModel) or options.get("step") is not None:
        return model
    input_key, target_key = _keys(model, input_key, target_key)
    return ClassifierTask(model, input_key=input_key, target_key=target_key)


def _keys(
    model: nn.Module, input_key: int | str | None, target_key: int | str | None
) -> tuple[int | str, int | str]:
    """As given, else as a task says."""
    is_task = isinstance(model, TaskModel)
    if input_key is None:
        input_key = getattr(model, "input_key", 0) if is_task else 0
    if target_key is None:
        label_key = getattr(model, "label_key", 1)  # as a HuggingFaceTask has it
        target_key = getattr(model, "target_key", label_key) if is_task else 1
    return input_key, target_key


def _make_trainer(
    model: nn.Module,
    train_dataloader: Iterable[Any],
    eval_dataloader: EvalData,
    algorithms: Sequence[Algorithm],
    options: Mapping[str, Any],
) -> Trainer:
    return Trainer(
        model,
        train_dataloader=train_dataloader,
        eval_dataloader=eval_dataloader,
        algorithms=algorithms,
        **options,
    )
