"""Optimizers and schedulers as users describe them: by the name of a class, or by a factory."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from torch import nn, optim
from torch.optim import Optimizer, lr_scheduler
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from compressor.errors import ConfigError, ModelError, suggest

Interval: TypeAlias = Literal["epoch", "iteration", "eval"]

# What trains when the user names no optimizer: the common choice for convolutional nets.
DEFAULT_OPTIMIZER: Mapping[str, Any] = {
    "name": "SGD",
    "momentum": 0.9,
    "nesterov": True,
    "weight_decay": 1e-4,
}
DEFAULT_LR = 0.01  # of it


class NativeOptimizerFactory(ABC):
    """Makes the user's optimizer for a model; called again for every variant.

    Any class with a `make` is one.
    """

    @abstractmethod
    def make(self, native_model: nn.Module) -> Optimizer:
        """An optimizer of `native_model`'s parameters."""

    @classmethod
    def __subclasshook__(cls, other: type) -> bool:
        return _makes(other) if cls is NativeOptimizerFactory else NotImplemented


class NativeSchedulerFactory(ABC):
    """Makes the user's learning rate scheduler for an optimizer. Any class with a `make` is one."""

    @abstractmethod
    def make(self, native_optimizer: Optimizer) -> LRScheduler:
        """A scheduler of `native_optimizer`."""

    @classmethod
    def __subclasshook__(cls, other: type) -> bool:
        return _makes(other) if cls is NativeSchedulerFactory else NotImplemented


class DefaultTorchNativeSchedulerFactory(NativeSchedulerFactory):
    """A scheduler of `torch.optim.lr_scheduler` by its name.

    Args:
        name: of the class.
        kwargs: its arguments.

    Raises:
        ConfigError: if torch has no such scheduler, or it takes no such argument.
    """

    def __init__(self, name: str, **kwargs: Any) -> None:
        self.spec = check_scheduler({"name": name, **kwargs})

    def make(self, native_optimizer: Optimizer) -> LRScheduler:
        """A scheduler of `native_optimizer`."""
        return _make_named_scheduler(self.spec, native_optimizer)


class AdjustedOptimizerFactory(NativeOptimizerFactory):
    """The optimizer of another factory with some options changed, such as a lower learning rate.

    Args:
        factory: makes the optimizer.
        options: of its parameter groups: {"lr": 0.01}.
    """

    def __init__(self, factory: NativeOptimizerFactory, options: Mapping[str, Any]) -> None:
        self.factory = factory
        self.options = dict(options)

    def make(self, native_model: nn.Module) -> Optimizer:
        """The other factory's optimizer, changed before its first step."""
        optimizer = self.factory.make(native_model)
        unknown = sorted(self.options.keys() - optimizer.defaults.keys())
        if unknown:
            raise ConfigError(
                f"{type(optimizer).__name__} has no option {unknown[0]!r}. "
                f"{suggest(unknown[0], optimizer.defaults)}"
            )
        for group in optimizer.param_groups:
            group.update(self.options)
        return optimizer


class ScaledOptimizerFactory(NativeOptimizerFactory):
    """The optimizer that a description gives, with all its learning rates times a factor.

    Args:
        spec: as `make_optimizer` takes it.
        lr_factor: above 0.
    """

    def __init__(self, spec: OptimizerSpec | None, lr_factor: float) -> None:
        if not lr_factor > 0:
            raise ConfigError(f"lr_factor={lr_factor} trains nothing. Write a number above 0.")
        self.spec = spec
        self.lr_factor = lr_factor

    def make(self, native_model: nn.Module) -> Optimizer:
        """The optimizer, changed before its first step."""
        optimizer = make_optimizer(self.spec, native_model, DEFAULT_LR)
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] * self.lr_factor
        return optimizer


OptimizerSpec: TypeAlias = Mapping[str, Any] | NativeOptimizerFactory
SchedulerSpec: TypeAlias = Mapping[str, Any] | NativeSchedulerFactory


@dataclass(frozen=True)
class SchedulerConfig:
    """A learning rate schedule.

    Attributes:
        factory: {"name": class of torch.optim.lr_scheduler, ...its arguments}, or a factory.
        interval: it steps after every "epoch", after every "iteration", or after every "eval"
            with the metric. None: "eval" for ReduceLROnPlateau, "epoch" for all others.
    """

    factory: SchedulerSpec
    interval: Interval | None = None

    def __post_init__(self) -> None:
        """Check what can be known before there is an optimizer."""
        if isinstance(self.factory, Mapping):
            object.__setattr__(self, "factory", check_scheduler(self.factory))
            if self.factory["name"] == "ReduceLROnPlateau":
                _check_plateau(self.interval)


@dataclass(frozen=True)
class Schedule:
    """A scheduler and when it steps.

    Attributes:
        scheduler: of torch.
        interval: between its steps.
        refresh: sets the rates anew when the whole training has become longer; None: they do not
            depend on it.
    """

    scheduler: LRScheduler
    interval: Interval
    refresh: Callable[[], None] | None = None

    def step(self, metric: float | None = None) -> None:
        """Step; `metric` is what ReduceLROnPlateau listens to, others are not given it."""
        if self.interval == "eval" and isinstance(self.scheduler, ReduceLROnPlateau):
            if metric is None:
                raise ConfigError("ReduceLROnPlateau needs a metric. Give it interval='eval'.")
            self.scheduler.step(metric)
        else:
            self.scheduler.step()


def make_optimizer(spec: OptimizerSpec | None, model: nn.Module, default_lr: float) -> Optimizer:
    """The optimizer that `spec` describes, for the parameters of `model` that require grad.

    Args:
        spec: {"name": class of torch.optim, ...its arguments}; without a name, options of
            `DEFAULT_OPTIMIZER`; or a factory; None is `DEFAULT_OPTIMIZER`.
        model: is trained.
        default_lr: learning rate where `spec` has neither a name nor an "lr".

    Raises:
        ConfigError: if torch has no such optimizer, it refuses the arguments, or the factory does
            not return an optimizer.
        ModelError: if no parameter requires grad.

    >>> make_optimizer({"name": "Adam", "lr": 0.5}, nn.Linear(1, 1), default_lr=0.1).defaults["lr"]
    0.5
    """
    if isinstance(spec, NativeOptimizerFactory):
        made: object = spec.make(model)
        if not isinstance(made, Optimizer):
            raise ConfigError(
                f"{type(spec).__name__}.make returned a {type(made).__name__}. "
                "Return a torch.optim.Optimizer."
            )
        return made
    spec = check_optimizer(spec or {})
    if "name" not in spec:
        spec = {**DEFAULT_OPTIMIZER, "lr": default_lr, **spec}
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not parameters:
        raise ModelError(
            "No parameter of the model requires grad, so it cannot be fine-tuned. "
            "Call requires_grad_(True) on what may be trained."
        )
    options = {key: value for key, value in spec.items() if key != "name"}
    cls: type[Any] = getattr(optim, spec["name"])
    try:
        optimizer: Optimizer = cls(parameters, **options)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"The optimizer {spec['name']} refuses {options}: {error}. Correct its options."
        ) from error
    return optimizer


def make_scheduler(
    spec: SchedulerConfig | SchedulerSpec | None, optimizer: Optimizer
) -> Schedule | None:
    """The scheduler that `spec` describes, on `optimizer`; None for None.

    Raises:
        ConfigError: if torch has no such scheduler, it refuses the arguments, the factory does not
            return a scheduler, or it listens to the metric and is stepped without one.
    """
    if spec is None:
        return None
    config = spec if isinstance(spec, SchedulerConfig) else SchedulerConfig(spec)
    if isinstance(config.factory, NativeSchedulerFactory):
        made: object = config.factory.make(optimizer)
        if not isinstance(made, LRScheduler):
            raise ConfigError(
                f"{type(config.factory).__name__}.make returned a {type(made).__name__}. "
                "Return a scheduler of torch.optim.lr_scheduler."
            )
        scheduler = made
    else:
        scheduler = _make_named_scheduler(config.factory, optimizer)
    if isinstance(scheduler, ReduceLROnPlateau):
        _check_plateau(config.interval)
        return Schedule(scheduler, "eval")
    return Schedule(scheduler, config.interval or "epoch")


def check_optimizer(spec: Mapping[str, Any]) -> dict[str, Any]:
    """`spec` with its name as torch spells it; without a name its keys must be SGD's.

    Raises:
        ConfigError: if torch has no such optimizer, or it takes no such argument.

    >>> check_optimizer({"name": "sgd", "lr": 0.1})
    {'name': 'SGD', 'lr': 0.1}
    """
    known = _classes(optim, Optimizer)
    return _check_named("optimizer", spec, known, default=DEFAULT_OPTIMIZER["name"])


def check_scheduler(spec: Mapping[str, Any]) -> dict[str, Any]:
    """`spec` with its name as torch spells it.

    Raises:
        ConfigError: if it has no name, torch has no such scheduler, or it takes no such argument.
    """
    if "name" not in spec:
        raise ConfigError(
            f"The scheduler {dict(spec)} has no 'name'. "
            "Write one of torch.optim.lr_scheduler: {'name': 'StepLR', 'step_size': 10}."
        )
    return _check_named("scheduler", spec, _classes(lr_scheduler, LRScheduler))


def _makes(cls: type) -> bool:
    return callable(getattr(cls, "make", None))


def _classes(module: object, base: type) -> dict[str, type]:
    members = vars(module).items()
    return {
        name: member
        for name, member in members
        if isinstance(member, type)
        and issubclass(member, base)
        and member is not base
        and not name.startswith("_")
    }


def _check_named(
    kind: str, spec: Mapping[str, Any], known: Mapping[str, type], default: str = ""
) -> dict[str, Any]:
    checked = {key: value for key, value in spec.items() if key != "name"}
    given = spec.get("name")
    name = default if given is None else str(given).rpartition(".")[2]
    if name not in known:
        spellings = {other.lower(): other for other in known}
        if name.lower() not in spellings:
            near = suggest(name, known)
            raise ConfigError(f"torch.optim has no {kind} {given!r}. {near}")
        name = spellings[name.lower()]
    takes = list(inspect.signature(known[name]).parameters)[1:]  # after the parameters or optimizer
    unknown = [key for key in checked if key not in takes]
    if unknown:
        raise ConfigError(
            f"The {kind} {name} takes no {unknown[0]!r}. {suggest(unknown[0], takes)}"
        )
    return checked if given is None else {"name": name, **checked}


def _make_named_scheduler(spec: Mapping[str, Any], optimizer: Optimizer) -> LRScheduler:
    options = {key: value for key, value in spec.items() if key != "name"}
    cls: type[Any] = getattr(lr_scheduler, spec["name"])
    try:
        scheduler: LRScheduler = cls(optimizer, **options)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"The scheduler {spec['name']} refuses {options}: {error}. Correct its options."
        ) from error
    return scheduler


def _check_plateau(interval: Interval | None) -> None:
    if interval not in (None, "eval"):
        raise ConfigError(
            f"ReduceLROnPlateau listens to the metric and cannot step per {interval}. "
            "Write interval='eval' (or 'eval_based': True)."
        )
