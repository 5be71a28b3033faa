"""Callbacks of recipes that run another recipe, tell of metrics, or write files."""

from __future__ import annotations

import logging
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from torch import Tensor, nn

from compressor.distributed import current_context
from compressor.errors import ConfigError, MetricError, suggest
from compressor.logs import get_logger
from compressor.training.callbacks.watched import Mode, is_better
from compressor.training.checkpoint import write_checkpoint
from compressor.training.inspection.classifier import check_classes, inspect_classifier
from compressor.training.loggers.base import Logger
from compressor.training.recipes.hooks import Lane
from compressor.training.recipes.loop import Recipe

logger = get_logger(__name__)

AT_EPOCH_END = -1
TEST_EVERY = 100
LOG_EVERY = 10


class _Reporter(ABC):
    """Base: tells of the metrics after every so many batches, and when an epoch ends."""

    lane = Lane.EPILOGUE

    def __init__(self, log_every: int, prefix: str) -> None:
        self.log_every = _check_every(log_every)
        self.prefix = prefix
        self._told: list[Any] = []

    def on_batch_end(self, state: dict[str, Any]) -> None:
        """Tell, if it is time."""
        if self.log_every != AT_EPOCH_END and state["iters"] % self.log_every == 0:
            self._tell_of(state)

    def on_epoch_end(self, state: dict[str, Any]) -> None:
        """Tell, unless all was told after the last batch."""
        if [state["iters"], numbers(state["metrics"])] != self._told:
            self._tell_of(state)

    def state_dict(self) -> dict[str, Any]:
        """What was told last."""
        return {"told": self._told}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Take it."""
        self._told = list(saved["told"])

    def _tell_of(self, state: dict[str, Any]) -> None:
        metrics = numbers(state["metrics"])
        self._told = [state["iters"], metrics]
        if metrics and current_context().rank == 0:
            self._tell(metrics, state)

    @abstractmethod
    def _tell(self, metrics: Mapping[str, float], state: Mapping[str, Any]) -> None:
        """Tell of `metrics`, of which there are some."""


class StdoutLogger(_Reporter):
    """Writes the metrics as a line of text.

    Args:
        log_every: batches; -1 writes only when an epoch ends, when there always is a line.
        prefix: begins the line.
        to: a stream, or a logger of `logging`, which gets the line at level info. None is
            `sys.stdout`: who adds this asks for it; the presets write to the package's log.
    """

    def __init__(
        self,
        log_every: int = LOG_EVERY,
        prefix: str = "",
        *,
        to: TextIO | logging.Logger | None = None,
    ) -> None:
        super().__init__(log_every, prefix)
        self.to_stream = to

    def _tell(self, metrics: Mapping[str, float], state: Mapping[str, Any]) -> None:
        parts = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())
        place = f"epoch {state['epoch']}, batch {state['iters']}: {parts}"
        line = f"{self.prefix} {place}" if self.prefix else place
        if isinstance(self.to_stream, logging.Logger):
            self.to_stream.info("%s", line)
        else:
            (self.to_stream or sys.stdout).write(f"{line}\n")


class ToLogger(_Reporter):
    """Hands the metrics to a logger, as of the finished batches of this recipe.

    Args:
        logger: of `compressor.training.loggers`; closed when a run ends, and saved.
        log_every: batches; -1 logs only when an epoch ends, when it always does.
        prefix: comes before each name: "prefix/name".
    """

    def __init__(self, logger: Logger, log_every: int = LOG_EVERY, prefix: str = "") -> None:
        super().__init__(log_every, prefix)
        self.logger = logger

    def state_dict(self) -> dict[str, Any]:
        """What was told last, and the state of the logger."""
        return {**super().state_dict(), "logger": self.logger.state_dict()}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Take them."""
        super().load_state_dict(saved)
        self.logger.load_state_dict(saved["logger"])

    def close(self) -> None:
        """Close the logger."""
        self.logger.close()

    def _tell(self, metrics: Mapping[str, float], state: Mapping[str, Any]) -> None:
        self.logger.log(_prefixed(metrics, self.prefix), state["iters"])


class CallRecipe:
    """Runs another recipe for one epoch, and posts its metrics under a prefix.

    It is run after every `run_every` batches, and when an epoch ends, so that the last weights are
    never left out. What it draws does not disturb this recipe. Register it too, so that it is
    saved and moved. `state["test_seconds"]` is what all its runs took.

    Args:
        recipe: is run.
        run_every: batches; -1 runs only when an epoch ends.
        prefix: comes before the names of its metrics: "prefix/name".
    """

    lane = Lane.TEST

    def __init__(self, recipe: Recipe, run_every: int = TEST_EVERY, prefix: str = "test") -> None:
        self.recipe = recipe
        self.run_every = _check_every(run_every)
        self.prefix = prefix
        self._ran_at = -1

    def on_batch_end(self, state: dict[str, Any]) -> None:
        """Run it, if it is time."""
        if self.run_every != AT_EPOCH_END and state["iters"] % self.run_every == 0:
            self._run(state)

    def on_epoch_end(self, state: dict[str, Any]) -> None:
        """Run it, unless it ran after the last batch."""
        if self._ran_at != state["iters"]:
            self._run(state)

    def state_dict(self) -> dict[str, Any]:
        """When it ran last."""
        return {"ran_at": self._ran_at}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Take it."""
        self._ran_at = saved["ran_at"]

    def _run(self, state: dict[str, Any]) -> None:
        began = time.perf_counter()
        found = self.recipe.run(self.recipe.state["epoch"] + 1)
        self._ran_at = state["iters"]
        state["metrics"].update(_prefixed(found["metrics"], self.prefix))
        seconds = time.perf_counter() - began
        state["test_seconds"] = state.get("test_seconds", 0.0) + seconds


class Checkpoint:
    """Writes checkpoints of a recipe, each to a file of its own, when all other callbacks are done.

    `recipe(save_dir=...)` keeps the latest one without this.

    Args:
        recipe: this callback is added to; `recipe.resume(path)` reads the files.
        folder: of the files; made if it is missing.
        save_every: batches; -1 saves only when an epoch ends.
        keep: how many of the last to keep; None: all.
        best: name of a metric; the checkpoint where it was best, of those that were written, is
            also "best.ckpt".
        mode: "max" if more of it is better.

    Raises:
        ConfigError: if none is kept, or `mode` is none.
    """

    lane = Lane.SAVE

    def __init__(
        self,
        recipe: Recipe,
        folder: str | Path,
        save_every: int = AT_EPOCH_END,
        *,
        keep: int | None = 1,
        best: str | None = None,
        mode: Mode = "max",
    ) -> None:
        if keep is not None and keep < 1:
            raise ConfigError(f"keep={keep} leaves no checkpoint. Write 1 or more.")
        if mode not in ("max", "min"):
            raise ConfigError(f"mode={mode!r} is none. Known: max, min.")
        self.recipe = recipe
        self.folder = Path(folder)
        self.save_every = _check_every(save_every)
        self.keep = keep
        self.best = best
        self.mode: Mode = mode
        self._value: float | None = None
        self._written: list[str] = []

    def on_batch_end(self, state: dict[str, Any]) -> None:
        """Save, if it is time."""
        if self.save_every != AT_EPOCH_END and state["iters"] % self.save_every == 0:
            self._save(state)

    def on_epoch_end(self, state: dict[str, Any]) -> None:
        """Save, if it is by epochs."""
        if self.save_every == AT_EPOCH_END:
            self._save(state)

    def state_dict(self) -> dict[str, Any]:
        """The best value, and the files."""
        return {"value": self._value, "written": list(self._written)}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Take them."""
        self._value, self._written = saved["value"], list(saved["written"])

    def _save(self, state: Mapping[str, Any]) -> None:
        is_best = self.best is not None and self._is_best(state["metrics"], self.best)
        name = f"epoch{state['epoch']:04d}-batch{state['iters']:07d}.ckpt"
        self._written = [*(other for other in self._written if other != name), name]
        old = [] if self.keep is None else self._written[: -self.keep]
        self._written = [other for other in self._written if other not in old]
        saved = self.recipe.state_dict()  # a matter of all processes
        if current_context().rank:
            return
        write_checkpoint(self.folder / name, saved)
        if is_best:
            write_checkpoint(self.folder / "best.ckpt", saved)
        for other in old:
            (self.folder / other).unlink(missing_ok=True)

    def _is_best(self, metrics: Mapping[str, Any], name: str) -> bool:
        if name not in metrics:
            raise MetricError(
                f"There is no metric {name!r} to find the best checkpoint by. "
                f"{suggest(name, metrics)}"
            )
        value = float(metrics[name])
        if not is_better(value, self._value, self.mode):
            return False
        self._value = value
        return True


class InspectionPage:
    """Writes `folder/inspection.html` about a classifier of images when the run is complete.

    See `compressor.training.inspection`: confusion matrix, best, worst and most confused samples,
    and what their predictions hang on. It makes a pass of its own over the data.

    Args:
        call: a batch to scores (N, K).
        loader: what is looked at.
        classes: K names, by index.
        folder: of the page; made if it is missing.
        model: that `call` runs, in eval mode.
        options: of `inspect_classifier`, such as `denormalize` and `samples`.

    Raises:
        ConfigError: fewer than two classes.
    """

    lane = Lane.EPILOGUE

    def __init__(
        self,
        call: Callable[[Any], Any],
        loader: Iterable[Any],
        classes: Sequence[object],
        folder: str | Path,
        *,
        model: nn.Module | None = None,
        **options: Any,
    ) -> None:
        self.call = call
        self.loader = loader
        self.classes = check_classes(classes)
        self.path = Path(folder) / "inspection.html"
        self.model = model
        self.options = options

    def on_epoch_end(self, state: dict[str, Any]) -> None:
        """Inspect and write, after the last epoch, in the first process."""
        if state["fraction"] < 1 or current_context().rank:
            return
        title = f"Inspection after epoch {state['epoch']}, batch {state['iters']}"
        options = {"title": title, **self.options}
        found = inspect_classifier(
            self.call, self.loader, self.classes, model=self.model, **options
        )
        found.save(self.path)
        logger.info("inspection: %s", self.path)


def numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Those of `metrics` that are a number, as floats.

    >>> numbers({"loss": 1, "name": "run", "table": [1, 2]})
    {'loss': 1.0}
    """
    return {
        name: float(value)
        for name, value in metrics.items()
        if isinstance(value, (int, float)) or (isinstance(value, Tensor) and value.numel() == 1)
    }


def _prefixed(metrics: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {f"{prefix}/{name}" if prefix else name: value for name, value in metrics.items()}


def _check_every(interval: int) -> int:
    if interval < 1 and interval != AT_EPOCH_END:
        raise ConfigError(
            f"{interval} is no interval. Write 1 batch or more, or -1 for the end of each epoch."
        )
    return interval
