"""How models are trained: the full trainer of the finalists, the fine-tuner of every variant."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from compressor.config.checks import check, is_finite
from compressor.config.reader import as_mapping, convert, read
from compressor.config.spellings import read_optimizer, read_scheduler
from compressor.errors import ConfigError
from compressor.interfaces.optimizers import (
    AdjustedOptimizerFactory,
    OptimizerSpec,
    SchedulerConfig,
)

# What a fine-tuner that does not say it takes from the full trainer.
INHERITED = ("eval_freq", "eval_skip", "gradient_clip_norm", "distillation", "ema")
# A model that is trained already wants a lower rate than one that is not; published scripts
# divide by ten.
FINE_TUNING_LR = 0.1


@dataclass(frozen=True)
class EmaConfig:
    """An exponential moving average of the weights, which is what is evaluated and kept.

    Attributes:
        decay_rate: of the average, 0 to 1, once it has grown.
        period: steps over which it grows: decay_rate * (1 - exp(-step / period)).
    """

    decay_rate: float = 0.9999
    period: int = 2000

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        check(
            "ema.decay_rate", self.decay_rate, 0 < self.decay_rate < 1, "a number between 0 and 1"
        )
        check("ema.period", self.period, self.period >= 1, "a number of steps from 1")


@dataclass(frozen=True)
class DistillationConfig:
    """How much the reference teaches, beside the user's own loss (Hinton et al., 2015).

    Attributes:
        weight: of the distance between the outputs of the two models.
        task_weight: of the user's loss.
        temperature: softens logits; 1 leaves them as they are.
    """

    weight: float = 0.9
    task_weight: float = 0.1
    temperature: float = 2.0

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        name = "distillation"
        check(f"{name}.weight", self.weight, is_finite(self.weight, 0), "0 or more")
        check(f"{name}.task_weight", self.task_weight, is_finite(self.task_weight, 0), "0 or more")
        is_positive = is_finite(self.temperature, 0) and self.temperature > 0
        check(f"{name}.temperature", self.temperature, is_positive, "a number above 0")
        if self.weight == self.task_weight == 0:
            raise ConfigError(
                "distillation.weight and distillation.task_weight are both 0: nothing is left to "
                "learn from. Write distillation=False to train on your loss alone."
            )


T = TypeVar("T")


def _switch(cls: type[T]) -> Callable[[Any, str], T | None]:
    """A reader: True is `cls` with its defaults, False and None are None, a mapping says more."""

    def read_switch(value: Any, where: str) -> T | None:
        if value is None or isinstance(value, cls):
            return value
        if isinstance(value, Mapping):
            return read(cls, value, where)
        return cls() if convert(value, bool, where) else None

    return read_switch


@dataclass(frozen=True)
class TrainerConfig:
    """One way to train.

    Attributes:
        optimizer: {"name": class of torch.optim, ...its arguments}, or a factory; None is
            `interfaces.optimizers.DEFAULT_OPTIMIZER`.
        scheduler: None is linear warm-up and cosine.
        epochs: None lets the budget decide.
        eval_freq: epochs from one evaluation to the next.
        eval_skip: first epochs that are not evaluated.
        early_stopping_patience: stop after so many evaluations without improvement; None: never.
        loop_test: leave every loop after two batches, to try a script.
        ema: True, False, or {"decay_rate", "period"}.
        gradient_clip_norm: largest 2-norm of all gradients together; None: no clipping. A
            norm below that of the loss's gradients keeps a recovery from gaining anything.
        distillation: True, False, or {"weight", "task_weight", "temperature"}.
    """

    optimizer: OptimizerSpec | None = field(default=None, metadata={"read": read_optimizer})
    scheduler: SchedulerConfig | None = field(default=None, metadata={"read": read_scheduler})
    epochs: int | None = None
    eval_freq: int = 1
    eval_skip: int = 0
    early_stopping_patience: int | None = None
    loop_test: bool = False
    ema: EmaConfig | None = field(default=None, metadata={"read": _switch(EmaConfig)})
    gradient_clip_norm: float | None = None
    distillation: DistillationConfig | None = field(
        default=DistillationConfig(), metadata={"read": _switch(DistillationConfig)}
    )

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        check("epochs", self.epochs, self.epochs is None or self.epochs >= 0, "0 or more")
        check("eval_freq", self.eval_freq, self.eval_freq >= 1, "a number of epochs from 1")
        check("eval_skip", self.eval_skip, self.eval_skip >= 0, "0 or more")
        patience, norm = self.early_stopping_patience, self.gradient_clip_norm
        check("early_stopping_patience", patience, patience is None or patience >= 1, "1 or more")
        check("gradient_clip_norm", norm, norm is None or norm > 0, "a number above 0, or None")


def inherit(fine_tuner: object, full: TrainerConfig) -> TrainerConfig:
    """The fine-tuner, with what it does not say taken from the full trainer.

    Raises:
        ConfigError: as for any trainer.
    """
    if isinstance(fine_tuner, TrainerConfig):
        return fine_tuner
    given = dict(as_mapping(fine_tuner, "fine_tuner"))
    inherited = {name: getattr(full, name) for name in INHERITED}
    optimizer = read_optimizer(given.get("optimizer"), "fine_tuner.optimizer")
    given["optimizer"] = _inherit_optimizer(optimizer, full.optimizer)
    return read(TrainerConfig, {**inherited, **given}, "fine_tuner")


def _inherit_optimizer(
    own: OptimizerSpec | None, full: OptimizerSpec | None
) -> OptimizerSpec | None:
    if full is None or (own is not None and not _is_nameless(own)):
        return own
    if not isinstance(full, Mapping):
        return AdjustedOptimizerFactory(full, own) if isinstance(own, Mapping) and own else full
    lr = {"lr": full["lr"] * FINE_TUNING_LR} if "lr" in full else {}
    return {**full, **lr, **(own if isinstance(own, Mapping) else {})}


def _is_nameless(spec: OptimizerSpec) -> bool:
    return isinstance(spec, Mapping) and "name" not in spec
