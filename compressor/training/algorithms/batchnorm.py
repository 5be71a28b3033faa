"""Batch norm statistics after surgery: those of the old network do not fit the new one."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from compressor.interfaces.data import kept_generators
from compressor.training.algorithm import Algorithm
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


class BatchNormReestimation(Algorithm):
    """Re-estimates batch norms when a fit begins, and before a model that was edited is used again.

    Args:
        batches: can be iterated again and again, such as the training loader.
        call: runs the model on a batch.
        count: batches to take.
    """

    events = frozenset(
        {Event.FIT_START, Event.BATCH_START, Event.EVAL_START, Event.CHECKPOINT, Event.FIT_END}
    )

    def __init__(
        self, batches: Iterable[Any], call: Callable[[nn.Module, Any], Any], count: int = 20
    ) -> None:
        self.batches = batches
        self.call = call
        self.count = count
        self._is_stale = False

    def on(self, event: Event, state: State) -> None:
        """Re-estimate, if the statistics are of another model."""
        is_new = event is Event.FIT_START and not state.clock.batch
        if is_new or self._is_stale:
            reestimate_batchnorm(state.model, self.batches, self.call, self.count)
            self._is_stale = False

    def rebind(self, edit: Edit, state: State) -> None:
        """Note that the statistics are stale."""
        del edit, state
        self._is_stale = True
