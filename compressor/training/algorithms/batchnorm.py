"""Batch norm statistics after surgery: those of the old network do not fit the new one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from compressor.errors import DataError
from compressor.interfaces.data import kept_generators, move, seed_generators
from compressor.seeding import derive_seed, isolated_rng
from compressor.training.algorithm import Algorithm
from compressor.training.card import Card
from compressor.training.events import Event
from compressor.training.state import State

if TYPE_CHECKING:
    from compressor.structure.surgery import Edit


def reestimate_batchnorm(
    model: nn.Module,
    batches: Iterable[Any],
    call: Callable[[nn.Module, Any], Any],
    count: int | None = None,
) -> None:
    """Set the running statistics of `model` to their mean over batches, in place.

    Every batch counts the same. Modes and momenta are put back; other layers (dropout) stay in eval
    mode meanwhile, and frozen statistics (`track_running_stats=False`) stay out of it.

    Args:
        model: without batch norms it is not called.
        batches: at least one.
        call: runs `model` on a batch.
        count: how many batches to take; None takes all.
    """
    norms = [
        module
        for module in model.modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None
    ]
    if not norms:
        return
    modes = [(module, module.training) for module in model.modules()]
    momenta = [norm.momentum for norm in norms]
    model.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # cumulative mean
        norm.train()
    try:
        with torch.no_grad(), kept_generators(batches):
            for batch in islice(batches, count):
                call(model, batch)
    finally:
        for module, mode in modes:
            module.training = mode
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum


def reestimate_in_training(
    state: State,
    count: int | None,
    batches: Iterable[Any] | None = None,
    call: Callable[[nn.Module, Any], Any] | None = None,
) -> None:
    """`reestimate_batchnorm` of the model that is trained, in place.

    Args:
        state: of the training.
        count: batches to take; None takes all.
        batches: None is what the model is trained on.
        call: None runs the model as the training step does.

    Raises:
        DataError: in the middle of an epoch of the same loader, if its workers are persistent.
    """
    batches, run = (state.train_dataloader if batches is None else batches), call or state.run_model
    if batches is state.train_dataloader and state.clock.batch_in_epoch:
        if getattr(getattr(batches, "native_dl", batches), "persistent_workers", False):
            raise DataError(
                "A second pass over a loader with persistent_workers=True would end the epoch that "
                "is under way. Give BatchNormReestimation another loader as `batches`, or SWA "
                "batchnorm_batches=0."
            )

    def run_there(model: nn.Module, batch: Any) -> Any:
        return run(model, move(batch, state.device))

    # A stream of its own: it is the same at whichever event of this batch it is due.
    seed = derive_seed(state.seed, "batch norm", state.clock.batch)
    with isolated_rng(seed), kept_generators(batches):
        seed_generators(batches, seed)
        reestimate_batchnorm(state.model, batches, run_there, count)


@runtime_checkable
class HoldsWeights(Protocol):
    """An algorithm with weights that are put into the model later: an average of them."""

    def reestimate_own(self, state: State, reestimate: Callable[[], None]) -> None:
        """Give its weights statistics of their own: `reestimate` with them in the model."""


class BatchNormReestimation(Algorithm):
    """Re-estimates batch norms when a fit begins, and before a model that was edited is used again.

    An average of the weights (`EMA`, `SWA`) is another network: its statistics are re-estimated as
    well, with its weights in the model.

    Args:
        batches: can be iterated again and again; None is the training loader.
        call: runs the model on a batch; None does it as the training step does.
        count: batches to take; None takes all.
    """

    events = frozenset(
        {Event.FIT_START, Event.BATCH_START, Event.EVAL_START, Event.CHECKPOINT, Event.FIT_END}
    )
    before = ("WeightAverage",)  # the statistics are of what is trained, not of what was put in
    card = Card(
        summary="Sets the running statistics of batch norms to their mean over some batches.",
        source="Ioffe and Szegedy (2015), Batch normalization, algorithm 2; Li et al. (2020), "
        "EagleEye, for pruned networks",
        functional="reestimate_batchnorm",
        settings="`count` batches: more where the statistics of a batch vary.",
        use_when="The network was pruned, factorised or averaged, and is judged before it is "
        "trained on: its old statistics do not fit.",
        avoid_when="Batches are very small, or the network has no batch norms. A fit of a hundred "
        "batches sets the statistics anew by itself.",
        cost="So many forward passes in fp32 when a fit begins and after every edit; twice as many "
        "beside an average of the weights.",
    )

    def __init__(
        self,
        batches: Iterable[Any] | None = None,
        call: Callable[[nn.Module, Any], Any] | None = None,
        count: int | None = 20,
    ) -> None:
        self.batches = batches
        self.call = call
        self.count = count
        self._is_stale = False

    def on(self, event: Event, state: State) -> None:
        """Re-estimate, if the statistics are of another model."""
        is_new = event is Event.FIT_START and not state.clock.batch
        if is_new or self._is_stale:
            reestimate = partial(reestimate_in_training, state, self.count, self.batches, self.call)
            reestimate()
            for other in state.algorithms:
                if isinstance(other, HoldsWeights):
                    other.reestimate_own(state, reestimate)
            self._is_stale = False

    def rebind(self, edit: Edit, state: State) -> None:
        """Note that the statistics are stale."""
        del edit, state
        self._is_stale = True

    def state_dict(self) -> dict[str, Any]:
        """Whether an edit was not followed yet."""
        return {"is_stale": self._is_stale}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Take it: edits that are replayed from a file were followed when they were made."""
        self._is_stale = saved["is_stale"]
