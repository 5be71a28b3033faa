"""What is called in place of the model: itself, compiled, or made for several processes."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from compressor.distributed import Replica
from compressor.training.state import State


class Replication:
    """Keeps `state.runner` up to date, and makes gradients those of all processes.

    A model of one process is called itself, or compiled once, for good.

    Args:
        state: of the training.
        compile: options of `torch.compile`; None does not compile.
    """

    def __init__(self, state: State, compile: Mapping[str, Any] | None) -> None:
        self._state = state
        self._options = compile
        self._replica: Replica | None = None
        self._runner: Any = None  # of the replica, as it was seen last
        self._is_first = False
        if state.context.world_size == 1:
            state.runner = self._compiled(state.model)

    def begin_batch(self) -> None:
        """Set `state.runner` for the next batch of several processes."""
        state = self._state
        if self._replica is None:
            self._replica = state.context.replicate(state.model)
            # The first batch shows what can be wrapped: it is not worth a compilation.
            self._is_first = self._options is not None
        runner = self._replica.runner
        if self._is_first:
            state.runner, self._is_first = runner, False
        elif runner is not self._runner:
            self._runner = runner
            state.runner = self._compiled(runner)

    def accumulating(self, is_last: bool) -> AbstractContextManager[object]:
        """Holds forward and backward of a micro-batch; `is_last` of the batch may communicate."""
        assert self._replica is not None
        return self._replica.accumulating(is_last)

    def finish(self) -> None:
        """After the last backward pass of a batch: set the gradients to the mean over all."""
        assert self._replica is not None
        self._replica.finish()

    def end(self) -> None:
        """The model was edited, or the fit is over."""
        if self._replica is not None:
            self._replica.close()
            self._replica = self._runner = None
            self._state.runner = self._state.model

    def _compiled(self, runner: nn.Module) -> Any:
        return runner if self._options is None else torch.compile(runner, **self._options)
