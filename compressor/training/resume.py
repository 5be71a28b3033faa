"""What a checkpoint holds of a trainer, and how another goes on from it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from compressor.errors import CheckpointError
from compressor.training import binding

if TYPE_CHECKING:
    from compressor.training.trainer import Trainer


def state_dict(trainer: Trainer) -> dict[str, Any]:
    """All that `load_state_dict` needs: plain values, and tensors that are not copied."""
    state = trainer.state
    return {
        "clock": state.clock.state_dict(),
        "seed": state.seed,
        "stop_reason": state.stop_reason,
        "metrics": dict(state.metrics),
        "train_metrics": dict(state.train_metrics),
        "model": state.model.state_dict(),
        "optimizer": binding.optimizer_state(trainer.optimizer, state.model),
        "schedule": trainer.schedule.scheduler.state_dict(),
        "scaler": trainer.scaler.state_dict(),
        "listeners": {each.key: each.state_dict() for each in trainer.dispatch.listeners},
    }


def load_state_dict(trainer: Trainer, saved: Mapping[str, Any]) -> None:
    """Put a trainer where the one was that `state_dict` was taken of.

    Raises:
        CheckpointError: if it has another model, optimizer or list of algorithms and callbacks;
            nothing is loaded then.
    """
    state, listeners = trainer.state, trainer.dispatch.listeners
    _check_same("algorithm or callback", saved["listeners"], [each.key for each in listeners])
    _check_same_model(state.model, saved["model"])
    binding.load_optimizer_state(trainer.optimizer, state.model, saved["optimizer"])
    state.model.load_state_dict(saved["model"])
    state.clock.load_state_dict(saved["clock"])
    state.seed, state.stop_reason = saved["seed"], saved["stop_reason"]
    state.metrics, state.train_metrics = dict(saved["metrics"]), dict(saved["train_metrics"])
    trainer.schedule.scheduler.load_state_dict(saved["schedule"])
    if saved["scaler"]:
        trainer.scaler.load_state_dict(saved["scaler"])
    for listener in listeners:
        listener.load_state_dict(saved["listeners"][listener.key])


def set_epoch(loader: Iterable[Any], epoch: int) -> None:
    """Tell samplers that shuffle by the number of the epoch, such as DistributedSampler."""
    sampler = getattr(getattr(loader, "native_dl", loader), "sampler", None)
    tell = getattr(sampler, "set_epoch", None)
    if callable(tell):
        tell(epoch)


def _check_same_model(model: nn.Module, saved: Mapping[str, Any]) -> None:
    own = model.state_dict()
    _check_same("tensor", saved, own)
    for name, value in own.items():
        if isinstance(value, Tensor) and value.shape != saved[name].shape:
            raise CheckpointError(
                f"{name!r} has shape {tuple(saved[name].shape)} in the checkpoint and "
                f"{tuple(value.shape)} in the model. Resume with the model as it was pruned then."
            )


def _check_same(kind: str, saved: Iterable[str], own: Iterable[str]) -> None:
    odd = sorted(set(saved) ^ set(own))
    if odd:
        where = "checkpoint" if odd[0] in set(saved) else "trainer"
        raise CheckpointError(
            f"The {kind} {odd[0]!r} is only in the {where}. Resume with a trainer made in the same "
            "way as the one that wrote the checkpoint."
        )
