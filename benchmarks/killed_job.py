"""The job of `benchmarks.kill_test`: each start a process of its own, and what comes of it."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import re
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from compressor import Engine, TorchForwardPass, TorchFramework
from compressor.cli.demo import train
from compressor.cli.digits import digit_loaders
from compressor.interfaces import Accuracy
from compressor.testing.models import TinyResNet

POLL_SECONDS = 0.002
UNEQUAL = {"latency", "seconds", "minutes", "phases", "eta"}  # in a name: a clock decided the value
SGD = {"name": "SGD", "lr": 0.05, "momentum": 0.9}
JOB: dict[str, Any] = {
    "delta": 3.0,
    "optimization": "compression",
    "techniques": ["channel_pruning", "block_removal", "quantization"],
    "eval_key": "accuracy",
    "device": "CPU",
    "target": {"runtime": "onnxruntime", "threads": 1},
    "full_trainer": {"optimizer": SGD, "epochs": 16},
    "fine_tuner": {"optimizer": SGD, "epochs": 8},
    "budget": {"trials": 3},
    "progress": False,
}
IMPORTED = ["compressor", "compressor.testing", "onnxruntime", "onnxscript", "sklearn"]


def start(run_dir: Path, reference: Path, job: Mapping[str, Any]) -> BaseProcess:
    """A process that begins the run, or goes on with it."""
    return start_process(compress, run_dir, reference, dict(job))


def start_process(function: Callable[..., None], *arguments: Any) -> BaseProcess:
    """A process of `function`, a module's own.

    It is forked from one that has imported everything and has no threads, so that a start takes no
    seconds of imports.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    process = context.Process(target=function, args=arguments)
    process.start()
    return process


def wait(process: BaseProcess, moment: Callable[[], bool]) -> None:
    """Until `moment()` has come or the process has ended."""
    while process.is_alive() and not moment():
        time.sleep(POLL_SECONDS)


def compress(run_dir: Path, reference: Path, job: dict[str, Any]) -> None:
    """The whole job, in this process."""
    multiprocessing.set_start_method("fork", force=True)  # locks of others have no names to leak
    torch.set_num_threads(1)
    model = TinyResNet()
    model.load_state_dict(load_file(reference))
    Engine(
        framework=TorchFramework(),
        data=digit_loaders(),
        model=model.eval(),
        config={**job, "run_dir": str(run_dir)},
        forward_pass=TorchForwardPass(model_input_pattern=(0, "_")),
        eval_func=Accuracy(),
        loss_function_cls=loss,
    ).run()


def loss(model: nn.Module, batch: Any) -> torch.Tensor:
    images, labels = batch
    return F.cross_entropy(model(images), labels)


def train_reference(path: Path, seed: int, epochs: int = 6) -> Path:
    """Weights of a network that is about 98 % right on the digits."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    model = TinyResNet()
    train(model, digit_loaders()["train"], epochs=epochs, device=torch.device("cpu"))
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), path)
    return path


def outcome(run_dir: Path) -> dict[str, Any]:
    """All that must not depend on kills, name to value."""
    values: dict[str, Any] = {}
    result = json.loads((run_dir / "result.json").read_text())
    certificate = result.get("certificate")
    if certificate is not None:
        certificate["notes"] = untimed(certificate.get("notes", ()))
    flatten("result", result, values)
    with closing(sqlite3.connect(run_dir / "study.db")) as study:
        for key, value in study.execute("SELECT key, value FROM facts"):
            flatten(f"study.{key}", json.loads(value), values)
    for path in files(run_dir, ["variants/*/*", "exports/**/*"]):
        if path.name != "metrics.json":  # the record, which the result has
            content = path.read_bytes()
            values[str(path.relative_to(run_dir))] = hashlib.sha256(content).hexdigest()
    place = str(run_dir)
    return {
        name: value.replace(place, "") if isinstance(value, str) else value
        for name, value in values.items()
        if UNEQUAL.isdisjoint(re.split(r"\W|_", name))
    }


def untimed(sentences: Iterable[str]) -> list[str]:
    """Those that do not speak of latency: a clock decided whether the others are there."""
    return [sentence for sentence in sentences if "latency" not in sentence]


def flatten(name: str, value: Any, into: dict[str, Any]) -> None:
    """Give `into` every leaf of a JSON value under the path that leads to it."""
    if isinstance(value, (Mapping, list)) and value:
        items = value.items() if isinstance(value, Mapping) else enumerate(value)
        for key, item in items:
            flatten(f"{name}.{key}", item, into)
    else:
        into[name] = value


def differences(expected: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """A line for each name whose values differ, or which one of both lacks."""
    return [
        f"{name}: {expected.get(name, 'absent')} and {found.get(name, 'absent')}"
        for name in sorted({*expected, *found})
        if expected.get(name, "absent") != found.get(name, "absent")
    ]


def files(folder: Path, patterns: tuple[str, ...] | list[str]) -> Iterator[Path]:
    """Those that are complete."""
    for pattern in patterns:
        for path in sorted(folder.glob(pattern)):
            if path.is_file() and path.suffix != ".part":
                yield path
