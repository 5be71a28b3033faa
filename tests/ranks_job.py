"""The job of `tests.test_engine_ranks`: alone, in two spawned processes, and under torchrun."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from compressor import Engine, LossFunction, TorchForwardPass, TorchFramework
from compressor.cli.digits import digit_loaders
from compressor.quantization import plan
from compressor.quantization.scheme import WEIGHT
from compressor.result import Result
from compressor.structure.describe import diff
from tests.brevity import be_brief

be_brief()  # in every process that imports the job

KILL = "RANKS_JOB_KILL"  # of the environment: "rank,steps": kills that rank after so many steps
SGD = {"name": "SGD", "lr": 0.02, "momentum": 0.9}
JOB: dict[str, Any] = {
    "delta": 15.0,
    "optimization": "compression",
    "techniques": ["channel_pruning"],
    "target": {"runtime": "eager"},
    "device": "CPU",
    "progress": False,
    "budget": {"trials": 1},
    "full_trainer": {"optimizer": SGD, "epochs": 3},
    "fine_tuner": {"optimizer": SGD, "epochs": 2},
    "export": {"formats": []},
}


class PlainNet(nn.Module):
    """No batch norm: its statistics would be those of each process's part of a batch."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, 32, 3, padding=1, stride=2)
        self.conv3 = nn.Conv2d(32, 32, 3, padding=1)
        self.linear = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.conv1, self.conv2, self.conv3):
            x = F.relu(layer(x))
        out: Tensor = self.linear(x.mean((2, 3)))
        return out


class CrossEntropy(LossFunction):
    """Counts the steps of training, to die in one of them."""

    steps = 0

    def __call__(self, model: nn.Module, batch: Any) -> dict[str, Tensor]:
        CrossEntropy.steps += model.training
        rank, steps = os.environ.get(KILL, "-1,0").split(",")
        if os.environ.get("RANK", "0") == rank and CrossEntropy.steps == int(steps):
            os.kill(os.getpid(), signal.SIGKILL)
        return {"loss": F.cross_entropy(model(batch[0]), batch[1])}


class Accuracy:
    """In percent; remembers how often it was called."""

    calls = 0

    def __call__(self, model: nn.Module, loader: Any) -> dict[str, float]:
        Accuracy.calls += 1
        right = [(model(images).argmax(1) == labels).float() for images, labels in loader]
        return {"accuracy": 100 * float(torch.cat(right).mean())}


def make_data() -> dict[str, DataLoader[tuple[Tensor, ...]]]:
    """The last batch of an epoch has 9 samples, an odd number."""
    loaders = digit_loaders()
    train, test = (loaders[split].dataset for split in ("train", "test"))
    return {
        "train": DataLoader(TensorDataset(*train[:329]), 32, shuffle=True),
        "test": DataLoader(TensorDataset(*test[:200]), 100),
    }


def train_reference(path: Path) -> None:
    """Write the weights of a network that is about 90 % right."""
    torch.manual_seed(0)
    model, data = PlainNet(), make_data()
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(25):
        for images, labels in data["train"]:
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
    torch.save(model.state_dict(), path)


def make_engine(weights: Path, run_dir: Path, **changes: Any) -> Engine:
    model, loss = changes.pop("model", None), changes.pop("loss", CrossEntropy)
    data, judge = changes.pop("data", None) or make_data(), changes.pop("judge", None)
    if model is None:
        model = PlainNet()
        model.load_state_dict(torch.load(weights, weights_only=True))
    return Engine(
        framework=TorchFramework(),
        data=data,
        model=model.eval(),
        config={**JOB, "run_dir": str(run_dir), **changes},
        forward_pass=TorchForwardPass(model_input_pattern=(0, "_")),
        eval_func=judge or Accuracy(),
        loss_function_cls=loss,
    )


def run(weights: Path, run_dir: Path, **changes: Any) -> dict[str, Any]:
    """What comes of a run, without what a clock decides; how often this process evaluated."""
    before = Accuracy.calls
    with coarse_numbers():
        engine = make_engine(weights, run_dir, **changes)
        model = engine.run()
    assert engine.result is not None
    return {**outcome(engine.result, model), "evaluations": Accuracy.calls - before}


def outcome(result: Result, model: nn.Module) -> dict[str, Any]:
    certificate = result.certificate
    return {
        "plan": result.plan.to_json(),
        "structure": json.dumps(diff(PlainNet(), model)),
        "weights": dict(model.state_dict()),
        "metric": certificate.metric,
        "reference_metric": certificate.reference_metric,
        "size_bytes": certificate.size_bytes,
        "macs": certificate.macs,
        "looks": certificate.looks,
        "variants": [[r.plan.digest, r.status, r.epochs, r.is_final] for r in result.variants],
        "is_quantized": hasattr(model, "compressor_quantization"),
    }


@contextmanager
def coarse_numbers() -> Iterator[None]:
    """What is called int8 has 2 bits and no corrections: it is outside of delta until trained."""
    coarse = {"static_int8": plan.LayerFormat(WEIGHT.with_bits(2))}
    with (
        mock.patch.object(plan, "FILE_FORMATS", {**plan.FILE_FORMATS, **coarse}),
        mock.patch("compressor.targets.onnxruntime.default_corrections", return_value=()),
    ):
        yield


def main() -> None:
    """`torchrun -m tests.ranks_job WEIGHTS RUN_DIR OUT_DIR`; each rank has a run_dir of its own."""
    weights, run_dir, out_dir = map(Path, sys.argv[1:])
    torch.set_num_threads(1)
    rank = os.environ.get("RANK", "0")
    found = run(weights, run_dir if rank == "0" else run_dir / f"of-rank-{rank}")
    assert not torch.distributed.is_initialized(), "what the engine opens it closes"
    torch.save(found, out_dir / f"{rank}.pt")


if __name__ == "__main__":
    main()
