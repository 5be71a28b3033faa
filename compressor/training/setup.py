"""What a trainer is given, settled: device, optimizer, schedule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch.optim import Optimizer

from compressor.errors import ConfigError
from compressor.interfaces.device import Device
from compressor.interfaces.optimizers import (
    OptimizerSpec,
    Schedule,
    SchedulerConfig,
    SchedulerSpec,
    make_optimizer,
    make_scheduler,
)
from compressor.seeding import derive_seed, isolated_rng
from compressor.training import binding
from compressor.training.dispatch import Dispatch
from compressor.training.events import Event
from compressor.training.schedules import make_default_schedule
from compressor.training.state import State

Optimizers: TypeAlias = OptimizerSpec | Optimizer | Sequence[Optimizer] | None
Schedulers: TypeAlias = SchedulerConfig | SchedulerSpec | None
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
    state.optimizer = given


def set_schedule(state: State, schedulers: Schedulers, *, has_metric: bool) -> None:
    """Put a schedule on the optimizer of `state`.

    Raises:
        ConfigError: if it steps with a metric, and there is none.
    """
    assert state.optimizer is not None
    made: Schedule | None = make_scheduler(schedulers, state.optimizer)
    state.schedule = made or make_default_schedule(state.optimizer, lambda: state.fraction)
    if state.schedule.interval == "eval" and not has_metric:
        raise ConfigError(
            "The scheduler steps with the metric, and there is none. "
            "Give eval_dataloader and eval_key, or another interval."
        )


def torch_device(value: DeviceLike) -> torch.device:
    """The device that a user means: "GPU", "cuda:1", a `Device`, …."""
    if isinstance(value, Device):
        return value.torch_device
    if isinstance(value, str) and value.lower() in ("gpu", "cpu"):
        return Device.of(value).torch_device
    return torch.device(value)


def _only_one(optimizers: Optimizers) -> OptimizerSpec | Optimizer | None:
    if not isinstance(optimizers, (list, tuple)):
        return optimizers  # type: ignore[return-value]
    if len(optimizers) != 1:
        raise ConfigError(
            f"{len(optimizers)} optimizers were given, and one steps. Give one with several "
            "parameter groups, or write a ManualStep."
        )
    return optimizers[0]
