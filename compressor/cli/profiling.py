"""`compressor profile`: what a model costs, all of it and layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import typer
from torch import nn

from compressor.cli.endings import only_json, print_json
from compressor.cli.jobs import JobSpec, read_job
from compressor.config import Config, TargetConfig
from compressor.errors import ConfigError
from compressor.frameworks.base import Job
from compressor.frameworks.defaults import make_task
from compressor.interfaces.data import first_batch
from compressor.interfaces.inputs import ModelInputs
from compressor.profiling.latency import Timing
from compressor.profiling.profile import profile
from compressor.targets import Target, make_target
from compressor.units import times

INPUTS = "inputs"  # of what a factory returns, in place of data
PAIR = ("model", INPUTS)
TRACED_BATCH = 2  # so that an exporter can tell the batch from what is fixed


@dataclass(frozen=True)
class Subject:
    """What is profiled, and where."""

    model: nn.Module
    inputs: ModelInputs
    target: TargetConfig


def profile_job(
    named: str,
    overrides: Mapping[str, Any],
    *,
    runtime: str | None,
    threads: int | None,
    batch_size: int,
    is_timed: bool,
    as_json: bool,
) -> None:
    """Print what the model of a job, or of a factory, costs on its target."""
    with only_json(as_json):
        subject = open_subject(read_job(named, overrides))
        changes = {"runtime": runtime, "threads": threads}
        target = make_target(_changed(subject.target, changes, batch_size))
        inputs = subject.inputs.with_batch(batch_size)
        found = profile(
            subject.model,
            inputs,
            name=type(subject.model).__name__,
            latency=is_timed,
            measure=_on(target),
        )
    where = {
        "runtime": target.name,
        "device": target.device.type,
        "threads": target.threads,
        "batch_size": batch_size,
    }
    if as_json:
        print_json({**found.to_json(), "target": where})
        return
    typer.echo(found.table())
    typer.echo(f"\nFor {times(batch_size, 'sample')} a call.", nl=not is_timed)
    if is_timed:
        typer.echo(f" Latency in {target.name}, {times(target.threads, 'thread')}.")


def open_subject(job: JobSpec) -> Subject:
    """The model and the inputs of one call; of a job with data its first batch to train on.

    The factory may also return (model, inputs), or a mapping with "model" and "inputs".

    Raises:
        ConfigError: if it returns neither, nor a job.
    """
    made, _ = job.make()
    if isinstance(made, tuple):
        if len(made) != len(PAIR):
            raise ConfigError(
                f"{job.factory} returns a tuple of {len(made)}. Return (model, inputs); inputs of "
                "several tensors are a tuple of their own."
            )
        made = dict(zip(PAIR, made, strict=True))
    if isinstance(made, Mapping) and INPUTS in made:
        if not isinstance(made.get("model"), nn.Module):
            raise ConfigError(
                f"{job.factory} returns inputs and no model. Return (model, inputs), or a mapping "
                "with 'model' and 'inputs'."
            )
        given = {"target": job.config["target"]} if "target" in job.config else {}
        config = Config.from_dict({"device": "CPU", **given})
        return Subject(made["model"], ModelInputs.of(made[INPUTS]), config.target)
    engine, _ = job.engine(made)
    return Subject(engine.job.model, example_inputs(engine.job), engine.config.target)


def example_inputs(job: Job) -> ModelInputs:
    """What the model is called with for the first batch that it would be trained on."""
    batch = first_batch(job.open_data()["train"])
    return make_task(job).inputs(job.model, batch)


def _changed(target: TargetConfig, changes: Mapping[str, Any], batch_size: int) -> TargetConfig:
    given = {name: value for name, value in changes.items() if value is not None}
    values: dict[str, Any] = {**asdict(target), **given, "batch_size": batch_size}
    if values["runtime"] == "onnxruntime":
        values["device"] = "cpu"
    return TargetConfig(**values)


def _on(
    target: Target,
) -> Callable[[Mapping[str, nn.Module], ModelInputs], Mapping[str, Timing]]:
    def measure(models: Mapping[str, nn.Module], inputs: ModelInputs) -> Mapping[str, Timing]:
        traced = inputs.with_batch(max(inputs.batch_size, TRACED_BATCH))
        with TemporaryDirectory() as folder:
            deployed = {
                name: target.deploy(model, traced, Path(folder, name)).module
                for name, model in models.items()
            }
            return target.measure(deployed, inputs)

    return measure
