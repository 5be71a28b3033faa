"""What a checkpoint holds of a trainer, and how another goes on from it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from compressor.distributed import Context
from compressor.errors import CheckpointError
from compressor.interfaces.loaders import shards_itself
from compressor.seeding import derive_seed, isolated_rng, rng_state
from compressor.structure.describe import apply_difference, diff
from compressor.training import binding
from compressor.training.fitting import check_structure, check_weights
from compressor.training.meter import merge_meters

if TYPE_CHECKING:
    from compressor.training.trainer import Trainer


def state_dict(trainer: Trainer) -> dict[str, Any]:
    """All that `load_state_dict` needs: plain values, and tensors that are not copied."""
    state = trainer.state
    own = {"generators": trainer.loop.generators(), "meter": trainer.meter.state_dict()}
    return {
        "clock": state.clock.state_dict(),
        "seed": state.seed,
        "stop_reason": state.stop_reason,
        "metrics": dict(state.metrics),
        "train_metrics": dict(state.train_metrics),
        "structure": state.structure(),
        "model": state.model.state_dict(),
        "optimizer": trainer.optimizer and binding.optimizer_state(trainer.optimizer, state.model),
        "optimizer_class": type(trainer.optimizer).__name__,
        "schedule": trainer.schedule and trainer.schedule.scheduler.state_dict(),
        "schedule_class": trainer.schedule and type(trainer.schedule.scheduler).__name__,
        "micro_batch_size": trainer.micro_batch_size,
        "fits": [str(fit) for fit in trainer.fits],
        "scaler": trainer.scaler.state_dict(),
        "ranks": trainer.context.gather(own),
        "batches_at_once": _batches_at_once(trainer.context),
        "registered": trainer.registered.state_dict(),
        "algorithms": {each.key: each.state_dict() for each in trainer.dispatch.algorithms},
        "callbacks": {each.key: each.state_dict() for each in trainer.dispatch.callbacks},
    }


def load_state_dict(trainer: Trainer, saved: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Put a trainer where the one was that `state_dict` was taken of.

    Callbacks and loggers may be others: those that are in both go on.

    Returns:
        The states of the global generators, if that was within an epoch.

    Raises:
        CheckpointError: if it has another model, optimizer or list of algorithms; nothing is loaded
            then.
    """
    state, algorithms = trainer.state, trainer.dispatch.algorithms
    _check(trainer, saved)
    _replay_structure(trainer, saved)
    if trainer.optimizer is not None and trainer.schedule is not None:
        binding.load_optimizer_state(trainer.optimizer, state.model, saved["optimizer"])
        trainer.schedule.scheduler.load_state_dict(saved["schedule"])
        # It has stepped; else torch warns when the epoch ends before its next step here.
        trainer.optimizer._opt_called = True  # type: ignore[attr-defined]
    state.model.load_state_dict(saved["model"])
    state.clock.load_state_dict(saved["clock"])
    state.seed, state.stop_reason = saved["seed"], saved["stop_reason"]
    state.metrics, state.train_metrics = dict(saved["metrics"]), dict(saved["train_metrics"])
    if saved["scaler"]:
        trainer.scaler.load_state_dict(saved["scaler"])
    trainer.take_micro_batch_size(saved["micro_batch_size"])
    trainer.registered.load_state_dict(saved["registered"])
    for algorithm in algorithms:
        algorithm.load_state_dict(saved["algorithms"][algorithm.key])
    for callback in trainer.dispatch.callbacks:
        if callback.key in saved["callbacks"]:
            callback.load_state_dict(saved["callbacks"][callback.key])
    return _load_own(trainer, saved)


def _load_own(trainer: Trainer, saved: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What each process had of its own; the states of the global generators within an epoch."""
    context, ranks = trainer.context, saved["ranks"]
    if len(ranks) == context.world_size:
        own = ranks[context.rank]
        trainer.meter.load_state_dict(own["meter"])
        generators: Mapping[str, Any] | None = own["generators"]
        return generators
    has_same_batches = saved.get("batches_at_once", 1) == _batches_at_once(context)
    if not has_same_batches or shards_itself(trainer.train_dataloader):
        return None  # the epoch begins anew
    if ranks[0]["generators"] is None:
        return None
    trainer.meter.load_state_dict(merge_meters([each["meter"] for each in ranks], context.rank))
    if context.rank < len(ranks):
        return dict(ranks[context.rank]["generators"])
    clock = trainer.state.clock
    with isolated_rng(derive_seed(trainer.state.seed, "joined", clock.batch, context.rank)):
        return rng_state()


def _batches_at_once(context: Context) -> int:
    """Batches of the user's loader that are trained between two steps."""
    return 1 if context.splits_batches else context.world_size


def _check(trainer: Trainer, saved: Mapping[str, Any]) -> None:
    """What can be known before anything is changed."""
    own = {"algorithms", "model", "optimizer", "ranks", "registered"}
    if not own <= saved.keys():
        has = ", ".join(sorted(map(str, saved))[:6]) or "nothing"
        raise CheckpointError(
            f"This is no checkpoint of a Trainer: it holds {has}. Name the trainer's own; what "
            "KeepBest wrote is read by `load_best`."
        )
    _check_same(
        "algorithm", saved["algorithms"], [each.key for each in trainer.dispatch.algorithms]
    )
    schedule = trainer.schedule and type(trainer.schedule.scheduler).__name__
    for kind, theirs, mine in (
        ("optimizer", saved["optimizer_class"], type(trainer.optimizer).__name__),
        ("scheduler", saved["schedule_class"], schedule),
    ):
        if theirs != mine:
            raise CheckpointError(
                f"The checkpoint is of a training with the {kind} {theirs}, and this one has "
                f"{mine}. Resume with the same, or load only the weights."
            )
    trainer.registered.check(saved["registered"])


def _replay_structure(trainer: Trainer, saved: Mapping[str, Any]) -> None:
    """Edit the model as it was edited then; if it would not fit even so, leave it as it is."""
    state, structure = trainer.state, saved["structure"]
    own = state.structure()
    is_as_made = own is None or own == diff(state.model, state.model)
    if structure is None or own == structure or not is_as_made:
        check_weights(state.model, saved["model"])
        return
    check_structure(state.model, structure, saved["model"])
    state.edit(lambda model: apply_difference(model, structure))


def _check_same(kind: str, saved: Iterable[str], own: Iterable[str]) -> None:
    odd = sorted(set(saved) ^ set(own))
    if odd:
        where = "checkpoint" if odd[0] in set(saved) else "trainer"
        raise CheckpointError(
            f"The {kind} {odd[0]!r} is only in the {where}. Resume with a trainer made in the same "
            "way as the one that wrote the checkpoint."
        )
