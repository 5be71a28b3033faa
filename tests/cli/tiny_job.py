"""Factories that the tests of the console program name: a small classifier of four blobs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compressor import Engine, TorchForwardPass, TorchFramework
from compressor.frameworks.base import Job, Judged
from compressor.progress import Progress
from compressor.seeding import isolated_rng
from compressor.testing.models import TinyMLP
from tests.fakes import FakeBench, FakeFramework
from tests.runs import accuracy

CLASSES = 4
UNTRAINED = {"optimizer": {"name": "SGD", "lr": 0.01}, "epochs": 0}
CONFIG: dict[str, Any] = {
    "delta": 30.0,
    "optimization": "compression",
    "device": "CPU",
    "budget": {"trials": 1},
    "techniques": ["quantization"],
    "full_trainer": UNTRAINED,
    "fine_tuner": UNTRAINED,
    "export": {"formats": ["onnx"]},
}


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def batches(seed: int) -> list[tuple[Tensor, Tensor]]:
    """Two batches of 64 points around the corners that belong to their class."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(128) % CLASSES
    centers = torch.eye(16)[labels] * 4
    points = centers + torch.randn(128, 16, generator=generator)
    return [(points[i : i + 64], labels[i : i + 64]) for i in (0, 64)]


def make(hidden: int = 64, **changes: Any) -> dict[str, Any]:
    """All parts of a job."""
    with isolated_rng(0):
        model = TinyMLP(16, hidden, CLASSES)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        for _ in range(10):
            for batch in batches(0):
                optimizer.zero_grad()
                loss(model, batch).backward()
                optimizer.step()
    return {
        "model": model.eval(),
        "data": {"train": batches(0), "test": batches(1)},
        "config": {**CONFIG, **changes},
        "forward_pass": TorchForwardPass(model_input_pattern=(0, "_")),
        "eval_func": accuracy,
        "loss_function_cls": loss,
    }


def make_engine(run_dir: Path) -> Engine:
    """The same as an engine, in the folder that it is given."""
    parts = make()
    parts["config"] = {**parts["config"], "run_dir": str(run_dir)}
    return Engine(framework=TorchFramework(), **parts)


def make_pair() -> tuple[nn.Module, Tensor]:
    """A model and the inputs of one call."""
    return nn.Linear(16, 4), torch.zeros(3, 16)


def make_three() -> tuple[nn.Module, Tensor, Tensor]:
    """One thing too many."""
    return (*make_pair(), torch.zeros(3, 16))


def make_from_file(hidden: int = 8) -> dict[str, Any]:
    """A job whose configuration is a file."""
    return {**make(hidden), "config": "beside.yaml"}


def make_nothing() -> int:
    """No job."""
    return 7


def make_fake(run_dir: Path, mark: str = "", delta: float = 3.0, epochs: int = 8) -> Engine:
    """A job without networks; with `mark` Ctrl-C at its third variant, until that file is there."""
    framework = InterruptedFramework(Path(mark)) if mark else FakeFramework()
    trainer = {"epochs": epochs}
    config = {
        "optimization": "macs",
        "delta": delta,
        "full_trainer": trainer,
        "fine_tuner": {"epochs": min(epochs, 1)},
        "run_dir": str(run_dir),
    }
    return Engine(framework, {"train": [0]}, model=None, config=config)


class InterruptedFramework(FakeFramework):
    """Its user grows impatient once."""

    def __init__(self, mark: Path) -> None:
        super().__init__()
        self.mark = mark

    def open(self, job: Job, run_dir: Path, progress: Progress) -> FakeBench:
        bench = super().open(job, run_dir, progress)
        judge = bench.judge

        def interrupted(*words: Any) -> Judged:
            if bench.calls.count("judge") == 2 and not self.mark.exists():
                self.mark.touch()
                raise KeyboardInterrupt
            return judge(*words)

        bench.judge = interrupted  # type: ignore[method-assign]
        return bench
