"""Values in an MLflow experiment on this machine."""

from __future__ import annotations

import os
import posixpath
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from compressor.optional import require
from compressor.training.events import Event
from compressor.training.loggers.base import Logger, is_first_process
from compressor.training.state import State

DATABASE = "mlflow.db"
MAX_POINTS = 1000  # of one call: MLflow's own limits
MAX_PARAMETERS = 100
MAX_VALUE_CHARACTERS = 6000
ODD_CHARACTERS = re.compile(r"[^\w\-. :/]")


class MLflowLogger(Logger):
    """A run of an experiment, in a database `mlflow.db` in a folder: no server and no network.

    Look with `mlflow ui --backend-store-uri sqlite:///folder/mlflow.db` (of the whole of MLflow).
    MLflow's usage statistics are switched off in this process, unless it was imported before.
    Characters that it does not allow in names become "_"; infinity is stored as the largest float.

    A resumed training goes on with its run. If the run has values from after the checkpoint, which
    MLflow cannot delete, the others are copied to a new run and the old run goes to the deleted
    ones, from which it can be restored. A run is FAILED if its last fit did not come to its end.

    Args:
        experiment: its name; made if there is none.
        folder: of the database; made if there is none.
        run_name: None lets MLflow invent one.

    Raises:
        MissingDependencyError: without the extra "mlflow".
    """

    events = frozenset({Event.FIT_START, Event.FIT_END})

    def __init__(
        self,
        experiment: str,
        folder: str | os.PathLike[str] = "mlruns",
        run_name: str | None = None,
    ) -> None:
        # Read when MLflow is imported; without it, it asks a server how much it may report.
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        for module in ("mlflow", "sqlalchemy", "alembic"):
            require(module, extra="mlflow")
        self.experiment = experiment
        self.folder = Path(folder)
        self.run_name = run_name
        self.run_id: str | None = None
        self._last_step = -1
        self._is_resumed = False
        self._is_fitting = False
        self._client: Any = None

    @property
    def tracking_uri(self) -> str:
        """What `mlflow.MlflowClient` and `mlflow ui` want to know."""
        return f"sqlite:///{self.folder.resolve() / DATABASE}"

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Write to the run."""
        if not is_first_process():
            return
        entities = require("mlflow.entities", extra="mlflow")
        now_ms = time.time_ns() // 1_000_000
        points = [
            entities.Metric(clean_name(name), float(value), now_ms, step)
            for name, value in metrics.items()
        ]
        self._write(points)
        self._last_step = max(self._last_step, step)

    def log_hyperparameters(self, values: Mapping[str, Any]) -> None:
        """Write the parameters that the run does not have yet; MLflow lets none be changed."""
        if not is_first_process():
            return
        entities = require("mlflow.entities", extra="mlflow")
        client, run_id = self._open()
        known = client.get_run(run_id).data.params
        parameters = [
            entities.Param(clean_name(name), str(value)[:MAX_VALUE_CHARACTERS])
            for name, value in values.items()
            if clean_name(name) not in known
        ]
        for part in _parts(parameters, MAX_PARAMETERS):
            client.log_batch(run_id, params=part)

    def on(self, event: Event, state: State) -> None:
        """Note whether a fit comes to its end."""
        del state
        self._is_fitting = event is Event.FIT_START
        if self._is_fitting and self.run_id is not None and is_first_process():
            client, run_id = self._open()
            client.update_run(run_id, "RUNNING")

    def close(self) -> None:
        """End the run; a second fit goes on with it."""
        if self._client is not None and self.run_id is not None:
            self._client.set_terminated(self.run_id, "FAILED" if self._is_fitting else "FINISHED")
        self._is_fitting = False

    def state_dict(self) -> dict[str, Any]:
        """Which run, and how far it is."""
        return {"run_id": self.run_id, "last_step": self._last_step}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Go on with that run."""
        self.run_id, self._last_step = saved["run_id"], saved["last_step"]
        self._is_resumed = True

    def _write(self, points: Sequence[Any]) -> None:
        client, run_id = self._open()
        for part in _parts(points, MAX_POINTS):
            client.log_batch(run_id, metrics=part)

    def _open(self) -> tuple[Any, str]:
        """The client, and the run to write to."""
        if self._client is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            mlflow = require("mlflow", extra="mlflow")
            self._client = mlflow.MlflowClient(tracking_uri=self.tracking_uri)
        if self.run_id is not None and self._is_resumed:
            self._is_resumed = False
            self.run_id = self._resume(self.run_id)
        if self.run_id is None:
            self.run_id = self._create_run()
        return self._client, self.run_id

    def _create_run(self) -> str:
        client = self._client
        found = client.get_experiment_by_name(self.experiment)
        if found is None:
            artifacts = (self.folder.resolve() / "artifacts").as_uri()
            experiment_id = client.create_experiment(self.experiment, artifact_location=artifacts)
        else:
            experiment_id = found.experiment_id
        run_id: str = client.create_run(experiment_id, run_name=self.run_name).info.run_id
        return run_id

    def _resume(self, old_id: str) -> str | None:
        """The run to go on with: the old one, a copy of its beginning, or None: it is not here."""
        client = self._client
        exceptions = require("mlflow.exceptions", extra="mlflow")
        try:
            old = client.get_run(old_id)
        except exceptions.MlflowException:  # resumed with another folder
            return None
        points = [
            point for name in old.data.metrics for point in client.get_metric_history(old_id, name)
        ]
        kept = [point for point in points if point.step <= self._last_step]
        if len(kept) == len(points) and old.info.lifecycle_stage == "active":
            return old_id
        self.run_id = self._create_run()
        self._write(kept)
        self.log_hyperparameters(old.data.params)
        client.delete_run(old_id)
        return self.run_id


def clean_name(name: str) -> str:
    """A name that MLflow takes: letters, digits, and `_ - . : /` and spaces.

    >>> clean_name("val/f1@0.5")
    'val/f1_0.5'
    """
    name = ODD_CHARACTERS.sub("_", name)
    is_path = posixpath.normpath(name) == name and not name.startswith(("/", "..")) and name != "."
    return name if is_path else re.sub(r"[./]", "_", name)


def _parts(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
