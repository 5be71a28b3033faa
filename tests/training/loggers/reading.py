"""What was logged, read back by the libraries' own readers: points by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

Curves = dict[str, list[tuple[int, float]]]


def read_events(folder: Path) -> Curves:
    """As TensorBoard shows a folder."""
    events = event_accumulator(folder)
    return {
        name: [(point.step, point.value) for point in events.Scalars(name)]
        for name in events.Tags()["scalars"]
    }


def event_accumulator(folder: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    accumulator.Reload()
    return accumulator


def read_mlflow(folder: Path) -> Curves:
    """Of the newest run that is not deleted."""
    client, run = mlflow_run(folder)
    return {
        name: [(p.step, p.value) for p in client.get_metric_history(run.info.run_id, name)]
        for name in run.data.metrics
    }


def mlflow_run(folder: Path) -> tuple[Any, Any]:
    import mlflow

    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{folder}/mlflow.db")
    experiment = client.get_experiment_by_name("digits")
    return client, client.search_runs([experiment.experiment_id])[0]
