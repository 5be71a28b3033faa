"""Callbacks of recipes that change the weights: the optimizer, its learning rate, an average."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from compressor.errors import ConfigError, MetricError, suggest
from compressor.training.algorithms.gradient_clipping import clip_gradients
from compressor.training.algorithms.weight_average import update_average


class Optimizer:
    """Zeroes the gradients before a batch, and steps after it.

    With `accumulation` the gradients of so many batches are averaged for one step. A rest at the
    end of an epoch is a step of its own.

    Args:
        opt: of torch.
        accumulation: batches.
        clip_norm: the 2-norm that all gradients together may have; None: any.
        log_lr: post "lr", the learning rate of the first group that the step was made with.
        log_momentum: post "momentum" likewise.

    Raises:
        ConfigError: if `accumulation` or `clip_norm` leaves nothing.
    """

    def __init__(
        self,
        opt: torch.optim.Optimizer,
        accumulation: int = 1,
        clip_norm: float | None = None,
        *,
        log_lr: bool = False,
        log_momentum: bool = False,
    ) -> None:
        if accumulation < 1:
            raise ConfigError(f"accumulation={accumulation} never steps. Write 1 or more.")
        if clip_norm is not None and not clip_norm > 0:
            raise ConfigError(f"clip_norm={clip_norm} leaves no gradient. Write a number above 0.")
        self.opt = opt
        self.accumulation = accumulation
        self.clip_norm = clip_norm
        self.log_lr = log_lr
        self.log_momentum = log_momentum
        self._accumulated = 0

    def on_batch_start(self, state: dict[str, Any]) -> None:
        """Zero the gradients, unless some are being accumulated."""
        del state
        if not self._accumulated:
            self.opt.zero_grad(set_to_none=True)

    def on_batch_end(self, state: dict[str, Any]) -> None:
        """Step, if it is time."""
        self._accumulated += 1
        if self._accumulated == self.accumulation:
            self._step(state)

    def on_epoch_end(self, state: dict[str, Any]) -> None:
        """Step with what is left."""
        if self._accumulated:
            self._step(state)

    def state_dict(self) -> dict[str, Any]:
        """That of the optimizer, and the gradients that are being accumulated."""
        gradients = [parameter.grad for parameter in self._parameters()]
        return {
            "optimizer": self.opt.state_dict(),
            "accumulated": self._accumulated,
            "gradients": gradients if self._accumulated else None,
        }

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Take it."""
        self.opt.load_state_dict(saved["optimizer"])
        # It has stepped; else torch warns when a scheduler steps before its next step here.
        self.opt._opt_called = True  # type: ignore[attr-defined]
        self._accumulated = saved["accumulated"]
        if self._accumulated:
            for parameter, gradient in zip(self._parameters(), saved["gradients"], strict=True):
                parameter.grad = None if gradient is None else gradient.to(parameter.device)

    def to(self, device: torch.device) -> None:
        """Follow the parameters to their device."""
        del device
        self.opt.load_state_dict(self.opt.state_dict())

    def _step(self, state: dict[str, Any]) -> None:
        parameters = self._parameters()
        if self._accumulated > 1:
            for parameter in parameters:
                if parameter.grad is not None:
                    parameter.grad.div_(self._accumulated)
        if self.clip_norm is not None:
            clip_gradients(parameters, self.clip_norm)
        group = self.opt.param_groups[0]
        if self.log_lr:
            state["metrics"]["lr"] = float(group["lr"])
        if self.log_momentum:
            state["metrics"]["momentum"] = float(group.get("momentum", group.get("betas", [0])[0]))
        self.opt.step()
        self._accumulated = 0

    def _parameters(self) -> list[nn.Parameter]:
        return [parameter for group in self.opt.param_groups for parameter in group["params"]]


class LRSched:
    """Steps a scheduler of torch; add it after `Optimizer`.

    Args:
        scheduler: of torch.
        interval: it steps after every "step" of its optimizer, or after every "epoch".
        metric: name of what ReduceLROnPlateau listens to.

    Raises:
        ConfigError: an unknown interval, or ReduceLROnPlateau without a metric.
    """

    def __init__(
        self,
        scheduler: LRScheduler,
        interval: Literal["step", "epoch"] = "epoch",
        metric: str | None = None,
    ) -> None:
        if interval not in ("step", "epoch"):
            raise ConfigError(f"interval={interval!r} is none. Known: step, epoch.")
        if isinstance(scheduler, ReduceLROnPlateau) and metric is None:
            raise ConfigError("ReduceLROnPlateau listens to a metric. Give its name as `metric`.")
        self.scheduler = scheduler
        self.interval = interval
        self.metric = metric
        self._has_stepped = False
        if interval == "step":  # not every batch has one, where gradients accumulate
            scheduler.optimizer.register_step_post_hook(self._note)

    def on_batch_end(self, state: dict[str, Any]) -> None:
        """Step, if the optimizer has."""
        if self._has_stepped:
            self._step(state)

    def on_epoch_end(self, state: dict[str, Any]) -> None:
        """Step, if it is by epochs, or the optimizer has stepped with a rest."""
        if self.interval == "epoch" or self._has_stepped:
            self._step(state)

    def state_dict(self) -> dict[str, Any]:
        """That of the scheduler, and whether it is to step."""
        return {"scheduler": self.scheduler.state_dict(), "has_stepped": self._has_stepped}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Take it."""
        self.scheduler.load_state_dict(dict(saved["scheduler"]))
        self._has_stepped = saved["has_stepped"]

    def _note(self, *_: Any) -> None:
        self._has_stepped = True

    def _step(self, state: Mapping[str, Any]) -> None:
        self._has_stepped = False
        if not isinstance(self.scheduler, ReduceLROnPlateau):
            self.scheduler.step()
            return
        metrics = state["metrics"]
        if self.metric not in metrics:
            raise MetricError(
                f"There is no metric {self.metric!r} for ReduceLROnPlateau. "
                f"{suggest(str(self.metric), metrics)} Add what posts it before this."
            )
        self.scheduler.step(float(metrics[self.metric]))


class LRByFraction:
    """Sets the learning rate before a batch, by the fraction of the run that has passed.

    Args:
        opt: its learning rates now are what `curve` multiplies.
        curve: 0 to 1, the fraction, to a factor; such as `schedules.warmup_cosine`.
    """

    def __init__(self, opt: torch.optim.Optimizer, curve: Callable[[float], float]) -> None:
        self.opt = opt
        self.curve = curve
        for group in opt.param_groups:
            group.setdefault("initial_lr", group["lr"])  # as torch's own schedulers call it

    def on_batch_start(self, state: dict[str, Any]) -> None:
        """Set it."""
        for group in self.opt.param_groups:
            group["lr"] = group["initial_lr"] * self.curve(state["fraction"])


class Polyak:
    """Lets another model be the exponential average of the one that is trained.

    Add it after `Optimizer`, and register `average`, so that it is saved.

    Args:
        model: is trained.
        average: a copy of it, changed in place.
        decay_rate: 0 to 1; what remains of the average after a batch.

    Raises:
        ConfigError: if the two differ.
    """

    def __init__(self, model: nn.Module, average: nn.Module, decay_rate: float = 0.999) -> None:
        ours, theirs = _tensors(model), _tensors(average)
        if average is model or [t.shape for t in ours] != [t.shape for t in theirs]:
            raise ConfigError("The average is no copy of the model. Give copy.deepcopy(model).")
        self.model = model
        self.average = average
        self.decay_rate = decay_rate

    def on_batch_end(self, state: dict[str, Any]) -> None:
        """Follow."""
        del state
        with torch.no_grad():
            for mean, value in zip(_tensors(self.average), _tensors(self.model), strict=True):
                update_average(mean, value, self.decay_rate)


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]
