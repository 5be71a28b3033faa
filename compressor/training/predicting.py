"""Outputs of a task for the batches of a loader."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

import torch

from compressor.errors import ConfigError
from compressor.interfaces.data import kept_generators, move
from compressor.interfaces.evaluation import evaluating
from compressor.seeding import derive_seed, isolated_rng
from compressor.training.state import State
from compressor.training.tasks.base import TaskModel


def predict(state: State, dataloader: Iterable[Any]) -> list[Any]:
    """Outputs of the task that is trained, batch by batch, on the CPU, in eval mode.

    Raises:
        ConfigError: if the model is no `TaskModel`.
    """
    task = state.model
    if not isinstance(task, TaskModel):
        raise ConfigError(
            f"How {type(task).__name__} is called on a batch is known only to its loss. "
            "Wrap it in a task, such as ClassifierTask(model), to predict."
        )
    task.to(state.device)
    cpu = torch.device("cpu")
    with ExitStack() as stack:
        stack.enter_context(kept_generators(dataloader))
        stack.enter_context(isolated_rng(derive_seed(state.seed, "predict")))
        stack.enter_context(evaluating(task))
        stack.enter_context(torch.no_grad())
        batches = (move(batch, state.device) for batch in dataloader)
        return [move(task.eval_forward(batch, None), cpu) for batch in batches]
