"""What a trainer is given, settled: device, optimizer, schedule."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from compressor.errors import ConfigError
from compressor.interfaces.device import Device
from compressor.interfaces.optimizers import (
    NativeOptimizerFactory,
    NativeSchedulerFactory,
    OptimizerSpec,
    Schedule,
    SchedulerConfig,
    SchedulerSpec,
    make_optimizer,
    make_scheduler,
)
from compressor.seeding import derive_seed, isolated_rng
from compressor.training import binding
from compressor.training.algorithm import Callback
from compressor.training.dispatch import Dispatch
from compressor.training.events import Event
from compressor.training.loggers.base import Logger
from compressor.training.schedules import make_default_schedule, shape_called
from compressor.training.state import State

Optimizers: TypeAlias = (
    OptimizerSpec | Optimizer | Sequence[Optimizer] | Callable[[nn.Module], Optimizer] | None
)
Schedulers: TypeAlias = (
    SchedulerConfig | SchedulerSpec | LRScheduler | Callable[[Optimizer], LRScheduler] | str | None
)
DeviceLike: TypeAlias = torch.device | Device | str


def set_up(
    state: State, dispatch: Dispatch, optimizers: Optimizers, learning_rate: float | None
) -> None:
    """Fire SETUP, move the model, and bind the optimizer to what it has become.

    Args:
        state: its model is edited and moved in place; its optimizer is set.
        dispatch: has the algorithms that edit.
        optimizers: as the trainer takes them.
        learning_rate: where they say none; None: there is to be no optimizer.

    Raises:
        ConfigError: if there are several optimizers.
        SurgeryError: if the optimizer steps what is not the model's.
    """
    given = _only_one(optimizers)
    if isinstance(given, Optimizer):
        state.optimizer = given  # so that it follows what SETUP edits
    with isolated_rng(derive_seed(state.seed, "setup")):
        dispatch.fire(Event.SETUP, state)
        state.model.to(state.device)
        if learning_rate is None:
            return
        if not isinstance(given, Optimizer):
            given = make_optimizer(given, state.model, learning_rate)
    binding.check_bound(given, state.model)
    closure = inspect.signature(type(given).step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ConfigError(
            f"{type(given).__name__} wants to compute the loss itself, several times a step. Use "
            "an optimizer without a closure, or write a ManualStep."
        )
    state.optimizer = given


def set_schedule(state: State, schedulers: Schedulers, *, is_own: bool, has_metric: bool) -> None:
    """Put a schedule on the optimizer of `state`; the rate of a user's own stays, if there is none.

    Raises:
        ConfigError: if it steps with a metric, and there is none; or there is none of its name.
    """
    assert state.optimizer is not None
    if isinstance(schedulers, str):
        shape = shape_called(schedulers)
        state.schedule = make_default_schedule(state.optimizer, lambda: state.fraction, shape)
        return
    if schedulers is None and is_own:
        schedulers = {"name": "ConstantLR", "factor": 1.0}
    made: Schedule | None = make_scheduler(
        _scheduler_spec(schedulers, state.optimizer), state.optimizer
    )
    state.schedule = made or make_default_schedule(state.optimizer, lambda: state.fraction)
    if state.schedule.interval == "eval" and not has_metric:
        raise ConfigError(
            "The scheduler steps with the metric, and there is none. "
            "Give eval_dataloader and eval_key, or another interval."
        )


def check_manual(
    optimizers: Optimizers,
    schedulers: Schedulers,
    micro_batch_size: object,
    precision: str,
    compile: object,
) -> None:
    """Do nothing if nothing is asked of the trainer that a `ManualStep` does itself.

    Raises:
        ConfigError: if there is.
    """
    asked = {
        "optimizers": optimizers is not None,
        "schedulers": schedulers is not None,
        "micro_batch_size": micro_batch_size is not None,
        "precision": precision != "fp32",
        "compile": bool(compile),
    }
    for option, is_asked in asked.items():
        if is_asked:
            raise ConfigError(
                f"A ManualStep does all that is to be done with a batch, so {option} would do "
                "nothing. Leave it out, or give a step that returns the loss."
            )


def find_loggers(
    callbacks: Sequence[Callback], loggers: Sequence[object], rank: int
) -> tuple[Logger, ...]:
    """Those that are told of values: on the first process, wherever they were given.

    Raises:
        ConfigError: if one of `loggers` is none.
    """
    for each in loggers:
        if not isinstance(each, Logger):
            raise ConfigError(
                f"The {type(each).__name__} in loggers is no Logger. Give it in callbacks."
            )
    return tuple(each for each in callbacks if isinstance(each, Logger)) if rank == 0 else ()


def hyperparameters(state: State) -> dict[str, Any]:
    """What a logger is told of a training, as plain values."""
    options = {} if state.optimizer is None else dict(state.optimizer.param_groups[0])
    options["lr"] = options.pop("initial_lr", options.get("lr"))  # before the warm-up
    return {
        "max_duration": str(state.max_duration),
        "precision": state.precision,
        "seed": state.seed,
        "device": str(state.device),
        "model": type(state.model).__name__,
        "parameters": sum(parameter.numel() for parameter in state.model.parameters()),
        "optimizer": "" if state.optimizer is None else type(state.optimizer).__name__,
        **{
            f"optimizer/{name}": value
            for name, value in options.items()
            if isinstance(value, (bool, int, float, str))
        },
        "algorithms": ", ".join(each.key for each in state.algorithms),
    }


def torch_device(value: DeviceLike) -> torch.device:
    """The device that a user means: "GPU", "cuda:1", a `Device`, …."""
    if isinstance(value, Device):
        return value.torch_device
    if isinstance(value, str) and value.lower() in ("gpu", "cpu"):
        return Device.of(value).torch_device
    return torch.device(value)


def check_device(device: torch.device) -> None:
    """Do nothing if this machine has `device`.

    Raises:
        DeviceError: if it is a GPU and torch finds none.
    """
    if device.type == "cuda":
        Device.GPU.check_available(device)


class _OptimizerFunction(NativeOptimizerFactory):
    """A function of the model as a factory."""

    def __init__(self, function: Callable[[nn.Module], Optimizer]) -> None:
        self.function = function

    def make(self, native_model: nn.Module) -> Optimizer:
        """Call it."""
        return self.function(native_model)


class _SchedulerFunction(NativeSchedulerFactory):
    """A function of the optimizer as a factory."""

    def __init__(self, function: Callable[[Optimizer], LRScheduler]) -> None:
        self.function = function

    def make(self, native_optimizer: Optimizer) -> LRScheduler:
        """Call it."""
        return self.function(native_optimizer)


def _only_one(optimizers: Optimizers) -> OptimizerSpec | Optimizer | None:
    if isinstance(optimizers, (list, tuple)):
        if len(optimizers) != 1:
            raise ConfigError(
                f"{len(optimizers)} optimizers were given, and one steps. Give one with several "
                "parameter groups, or write a ManualStep."
            )
        optimizers = optimizers[0]
    if optimizers is None or isinstance(optimizers, (Mapping, Optimizer, NativeOptimizerFactory)):
        return optimizers
    if callable(optimizers):
        return _OptimizerFunction(optimizers)
    raise ConfigError(
        f"A {type(optimizers).__name__} is no optimizer. Give {{'name': 'SGD', 'lr': 0.1}}, an "
        "optimizer of the model's parameters, or a function of the model."
    )


def _scheduler_spec(
    schedulers: Schedulers, optimizer: Optimizer
) -> SchedulerConfig | SchedulerSpec | None:
    if isinstance(schedulers, (list, tuple)) and len(schedulers) == 1:
        schedulers = schedulers[0]
    if isinstance(schedulers, LRScheduler):
        if schedulers.optimizer is not optimizer:
            raise ConfigError(
                f"The {type(schedulers).__name__} schedules another optimizer than the trainer "
                "steps. Make it from the optimizer that you give as `optimizers`."
            )
        scheduler = schedulers
        return _SchedulerFunction(lambda _: scheduler)
    known = (Mapping, SchedulerConfig, NativeSchedulerFactory)
    if schedulers is None or isinstance(schedulers, known):
        return schedulers
    if callable(schedulers):
        return _SchedulerFunction(schedulers)
    raise ConfigError(
        f"A {type(schedulers).__name__} is no scheduler. Give {{'name': 'StepLR', "
        "'step_size': 10}, a scheduler of the optimizer, or a function of it."
    )
