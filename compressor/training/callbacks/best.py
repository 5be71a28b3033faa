"""The weights that evaluated best."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from compressor.errors import CheckpointError
from compressor.structure.describe import apply_difference
from compressor.training.algorithm import Callback
from compressor.training.callbacks.watched import Mode, WatchedMetric, check_mode, is_better
from compressor.training.checkpoint import read_checkpoint, write_checkpoint
from compressor.training.events import Event
from compressor.training.fitting import check_structure, check_weights
from compressor.training.state import State

BEST = "best.ckpt"


class KeepBest(Callback):
    """Keeps a copy of the weights of the best evaluation, on the CPU and in the checkpoint.

    They are the weights as evaluated: the average, if an algorithm averages. To count the weights
    that a fit begins with, call `trainer.eval()` before it. An evaluation of NaN is never the best.

    Args:
        metric: its name in what the evaluation gives; "label/name" if its evaluator has a label.
        mode: "max" if more is better.
        folder: gets `best.ckpt`, which `load_best` reads; None writes none.

    Attributes:
        value: of the best evaluation; None before the first.
        epoch: finished epochs at that time.
    """

    events = frozenset({Event.EVAL_END, Event.FIT_END})

    def __init__(
        self, metric: str, mode: Mode = "max", folder: str | os.PathLike[str] | None = None
    ) -> None:
        check_mode(mode)
        self.mode = mode
        self.path = None if folder is None else Path(folder) / BEST
        self.value: float | None = None
        self.epoch = 0
        self.evaluations = 0
        self._metric = WatchedMetric(metric)
        self._weights: dict[str, Any] = {}

    def on(self, event: Event, state: State) -> None:
        """Keep the weights if they are the best."""
        if event is Event.FIT_END:
            self._metric.end()
            return
        self.evaluations += 1
        value = self._metric.value(state)
        if value is None or not is_better(value, self.value, self.mode):
            return
        self.value, self.epoch = value, state.clock.epoch
        self._weights = _copy_weights(state.model)
        if self.path is not None and state.rank == 0:
            document = {
                "model": self._weights,
                "structure": state.structure(),
                "metrics": dict(state.metrics),
                "clock": state.clock.state_dict(),
            }
            write_checkpoint(self.path, document)

    def restore(self, model: nn.Module) -> None:
        """Put the best weights into `model`, in place; nothing, if there was no evaluation.

        Raises:
            CheckpointError: if its structure has changed since.
        """
        if self.value is None:
            return
        try:
            check_weights(model, self._weights)
        except CheckpointError as error:
            raise CheckpointError(
                f"The best weights are of epoch {self.epoch}, and the model has changed its "
                f"structure since: {error} Keep the best of each structure on its own, or give a "
                "folder and use load_best on a model as it was at first."
            ) from error
        model.load_state_dict(self._weights)

    def close(self) -> None:
        """See that the metric was there.

        Raises:
            MetricError: if no evaluation of a whole fit gave it.
        """
        self._metric.close()

    def state_dict(self) -> dict[str, Any]:
        """The best, and its weights."""
        return {
            "value": self.value,
            "epoch": self.epoch,
            "evaluations": self.evaluations,
            "weights": self._weights,
        }

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Take them."""
        self.value, self.epoch = saved["value"], saved["epoch"]
        self.evaluations = saved.get("evaluations", 0)
        self._weights = dict(saved["weights"])


def load_best(path: str | os.PathLike[str], model: nn.Module) -> dict[str, float]:
    """Put the weights that `KeepBest` wrote into `model`, in place.

    Args:
        path: of `best.ckpt`.
        model: as it was then; or, if the trainer had a `save_dir`, as it was before training: it is
            edited as it was edited then.

    Returns:
        The metrics of that evaluation.

    Raises:
        CheckpointError: if the file is missing, altered, or of another model, which is then as it
            was.
    """
    saved = read_checkpoint(Path(path))
    if not {"model", "structure", "metrics"} <= saved.keys():
        raise CheckpointError(f"{path} holds no weights of KeepBest. Name its {BEST}.")
    weights, structure = saved["model"], saved["structure"]
    if structure is not None and _can_be_edited(model, structure, weights):
        apply_difference(model, structure)
    check_weights(model, weights)
    model.load_state_dict(weights)
    metrics: dict[str, float] = saved["metrics"]
    return metrics


def _can_be_edited(
    model: nn.Module, structure: Mapping[str, Any], weights: Mapping[str, Any]
) -> bool:
    """Whether the edits can be made; if not, it may be that `model` has them already."""
    try:
        check_structure(model, structure, weights)
    except CheckpointError:
        return False
    return True


def _copy_weights(model: nn.Module) -> dict[str, Any]:
    return {
        name: value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else value
        for name, value in model.state_dict().items()
    }
