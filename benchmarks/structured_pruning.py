"""A CIFAR ResNet at half its work and less: this package against torch-pruning, trained alike.

Both prune a copy of one trained network to the same number of multiply-accumulates, rank channels
by each of the criteria, and get the same fine-tuning: trainer, epochs, rates, distillation from the
unpruned network. Each side is judged by its best criterion. Latencies are of ONNX Runtime at one
thread, measured in turns; ratios are of the unpruned network, above 1 is better.

torch-pruning leaves the stream between the blocks alone: it does not understand shortcuts that pad
channels, and makes models of them that raise. This package is run both ways: with the stream kept
(`ignored`) and pruned. Widths of both sides are multiples of the same number: of --round-to, or of
the largest of 4 and 1 with which torch-pruning reaches the ratio.
"""

from __future__ import annotations

import argparse
import copy
import io
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
import torch_pruning as tp
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.common import ROOT, finish, interleave, make_parser
from benchmarks.quantization_peers import open_session
from benchmarks.trainer_throughput import DeviceLoader, Images
from compressor.export.onnx import export_onnx
from compressor.interfaces.inputs import ModelInputs
from compressor.profiling.counts import count
from compressor.structure.selection import Scope
from compressor.techniques.one_shot import prune
from compressor.training import Trainer
from compressor.training.algorithms import ChannelsLast, Distillation

sys.path.insert(0, str(ROOT / "examples"))

from cifar_data import load_pretrained, make_loaders, normalize
from cifar_resnet_model import DEPTHS

GRADIENT_BATCHES = 8
BATCH_SIZE = 128
TEMPERATURE = 4.0
SHARES = [0.2 + 0.01 * step for step in range(71)]  # of the channels that torch-pruning removes
EXAMPLE = torch.zeros(2, 3, 32, 32)
PEER_CRITERIA: dict[str, Callable[[], Any]] = {
    "taylor": tp.importance.GroupTaylorImportance,
    "l2": tp.importance.GroupMagnitudeImportance,
    "lamp": tp.importance.LAMPImportance,
    "hessian": tp.importance.GroupHessianImportance,
}
Batches = Sequence[tuple[Tensor, Tensor]]


def main() -> None:
    arguments = parse_arguments()
    started = time.monotonic()
    torch.manual_seed(arguments.seed)
    bench = Bench(arguments)
    entries = [bench.entry("unpruned", "", bench.reference)]
    for ratio in arguments.ratios:
        for criterion in arguments.criteria:
            peer, round_to = bench.prune_by_peer(criterion, ratio)
            entries.append(bench.entry(f"torch-pruning, {ratio:g}x", criterion, peer))
            for what in arguments.stream:
                ours = bench.prune(criterion, ratio, round_to, keep_stream=what == "kept")
                name = f"{criterion}, stream {what}"
                entries.append(bench.entry(f"ours, {ratio:g}x", name, ours))
    times = measure_latencies([model for model, _ in entries], arguments.quick)
    rows = [
        {
            **row,
            **{f"latency ratio, batch {size}": t["0"] / t[str(i)] for size, t in times.items()},
        }
        for i, (_, row) in enumerate(entries)
    ]
    finish(rows, summarize(rows, arguments.ratios), arguments, started)


class Bench:
    """The trained network, its data, and what is done to every pruned copy."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.images, self.labels, self.test = load(arguments)
        chosen = torch.arange(GRADIENT_BATCHES * BATCH_SIZE) % len(self.labels)
        pixels, labels = normalize(self.images[chosen]), self.labels[chosen]
        self.batches = list(zip(pixels.split(BATCH_SIZE), labels.split(BATCH_SIZE), strict=True))
        self.reference: nn.Module = load_pretrained(arguments.data, arguments.model)
        if arguments.reference_epochs:
            self.fine_tune(self.reference, arguments.reference_epochs, teacher=None)
        self.macs = count(self.reference, ModelInputs((EXAMPLE,))).macs

    def prune(self, criterion: str, ratio: float, round_to: int, *, keep_stream: bool) -> nn.Module:
        """By this package's one call."""
        norms = [name for name, _ in self.reference.named_modules() if is_of_stream(name)]
        return prune(
            self.reference,
            self.batches[0][0][:2],
            macs_fraction=1 / ratio,
            importance=criterion,
            scope=self.arguments.scope,
            round_to=round_to,
            ignored=norms if keep_stream else (),
            backward=self.backward,
        ).model

    def prune_by_peer(self, criterion: str, ratio: float) -> tuple[nn.Module, int]:
        """By torch-pruning: global, isomorphic, the least share of channels that is enough.

        A layer that would lose all its rounded channels is left whole by it, so that above some
        share the work grows again, and a finer rounding must be tried.

        Returns:
            The model, and what its widths are multiples of.
        """
        gradients = copy.deepcopy(self.reference)
        self.backward(gradients)
        for round_to in dict.fromkeys((self.arguments.round_to, 4, 1)):
            for share in SHARES:
                model = self.cut_by_peer(criterion, share, round_to, gradients)
                if count(model, ModelInputs((EXAMPLE,))).macs * ratio <= self.macs:
                    return model, round_to
        raise SystemExit(f"torch-pruning does not reach {ratio}x without the stream.")

    def cut_by_peer(
        self, criterion: str, share: float, round_to: int, gradients: nn.Module
    ) -> nn.Module:
        model = copy.deepcopy(self.reference).eval()
        stream = [
            module
            for name, module in model.named_modules()
            if name in ("conv1", "linear") or name.endswith("conv2")
        ]
        importance = PEER_CRITERIA[criterion]()
        pruner = tp.pruner.BasePruner(
            model,
            EXAMPLE,
            importance=importance,
            pruning_ratio=share,
            global_pruning=True,
            isomorphic=True,
            round_to=round_to,
            ignored_layers=stream,
        )
        for parameter, seen in zip(model.parameters(), gradients.parameters(), strict=True):
            parameter.grad = seen.grad.clone()
        if criterion == "hessian":
            self.accumulate_squares(model, importance)
        pruner.step()
        model.zero_grad()
        return model

    def backward(self, model: nn.Module) -> None:
        """Add the gradients of a few batches, without augmentation."""
        model.eval()
        for images, labels in self.batches:
            F.cross_entropy(model(images), labels).backward()

    def accumulate_squares(self, model: nn.Module, importance: Any) -> None:
        """As torch-pruning's examples do: a gradient of each sample of a batch."""
        images, labels = self.batches[0]
        for loss in F.cross_entropy(model(images), labels, reduction="none"):
            model.zero_grad()
            loss.backward(retain_graph=True)
            importance.accumulate_grad(model)

    def fine_tune(self, model: nn.Module, epochs: int, teacher: nn.Module | None) -> None:
        """Train `model` in place; it ends on the CPU, in eval mode."""
        sgd = {"name": "SGD", "lr": self.arguments.lr, "momentum": 0.9, "nesterov": True}
        algorithms: list[Any] = [ChannelsLast()]
        if teacher is not None and not self.arguments.no_distillation:
            task = Images(copy.deepcopy(teacher).to(self.device))
            algorithms.append(Distillation(task, temperature=TEMPERATURE))
        images, labels = self.images.to(self.device), self.labels.to(self.device)
        Trainer(
            Images(model),
            train_dataloader=DeviceLoader(images, labels, BATCH_SIZE),
            optimizers={**sgd, "weight_decay": 5e-4},
            algorithms=algorithms,
            max_duration=f"{epochs}ep",
            device=self.device,
            precision=self.arguments.precision,
            seed=self.arguments.seed,
        ).fit()
        model.to("cpu", memory_format=torch.contiguous_format).eval()

    def entry(
        self, name: str, criterion: str, model: nn.Module
    ) -> tuple[nn.Module, dict[str, Any]]:
        """Fine-tune `model`, unless it is the reference, and say what became of it."""
        before = self.accuracy(model)
        began = time.monotonic()
        if model is not self.reference:
            self.fine_tune(model, self.arguments.epochs, self.reference)
        counts = count(model, ModelInputs((EXAMPLE,)))
        row = {
            "network": name,
            "criterion": criterion,
            "MACs ratio": self.macs / counts.macs,
            "parameters": counts.params,
            "accuracy %, pruned": before,
            "accuracy %, trained": self.accuracy(model),
            "minutes": (time.monotonic() - began) / 60,
        }
        print(row, file=sys.stderr, flush=True)
        return model, row

    @torch.no_grad()
    def accuracy(self, model: nn.Module) -> float:
        """Percent of the test images, in float32."""
        model.to(self.device).eval()
        right = sum(
            int((model(x.to(self.device)).argmax(1).cpu() == y).sum()) for x, y in self.test
        )
        model.to("cpu")
        return 100 * right / sum(len(y) for _, y in self.test)


def is_of_stream(name: str) -> bool:
    """Whether a module is a batch norm of what runs past the blocks."""
    return name == "bn1" or name.endswith(".bn2")


def load(arguments: argparse.Namespace) -> tuple[Tensor, Tensor, Batches]:
    """Training images (uint8) and labels, and test batches."""
    if not arguments.jpeg:
        loaders = make_loaders(arguments.data, batch_size=500)
        images, labels = loaders["train"].images, loaders["train"].labels
        test = list(loaders["test"])
    else:
        images, labels = decode(arguments.data / "cifar10_jpeg.npz", "train")
        held, answers = decode(arguments.data / "cifar10_jpeg.npz", "test")
        test = [(normalize(x), y) for x, y in zip(held.split(500), answers.split(500), strict=True)]
    if arguments.quick:
        images, labels, test = images[:512], labels[:512], test[:1]
    return images, labels.long(), test


def decode(path: Path, split: str) -> tuple[Tensor, Tensor]:
    """The images (N, 3, 32, 32) uint8 and labels of a split of JPEG files."""
    with np.load(path) as file:
        offsets, joined = file[f"{split}_offsets"], file[f"{split}_jpeg"]
        labels = torch.from_numpy(file[f"{split}_labels"])
    pixels = np.empty((len(labels), 32, 32, 3), np.uint8)
    for index, (start, end) in enumerate(pairwise(offsets)):
        pixels[index] = Image.open(io.BytesIO(joined[start:end].tobytes())).convert("RGB")
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), labels


def measure_latencies(models: Sequence[nn.Module], quick: bool) -> dict[int, dict[str, float]]:
    """Batch size -> number of the model -> milliseconds, at one thread, in turns."""
    sessions = {}
    with tempfile.TemporaryDirectory() as folder:
        for number, model in enumerate(models):
            path = export_onnx(model, ModelInputs((EXAMPLE,)), Path(folder) / f"{number}.onnx")
            sessions[str(number)] = open_session(path)
    return {size: time_sessions(sessions, size, quick) for size in (1, 32)}


def time_sessions(sessions: Mapping[str, Any], batch_size: int, quick: bool) -> dict[str, float]:
    images = np.random.default_rng(0).standard_normal((batch_size, 3, 32, 32), np.float32)
    calls = {
        name: lambda session=session: session.run(None, {session.get_inputs()[0].name: images})
        for name, session in sessions.items()
    }
    rounds, seconds = (2, 0.05) if quick else (11, 0.3)
    return interleave(calls, rounds=rounds, block_seconds=seconds)


def summarize(rows: Sequence[Mapping[str, Any]], ratios: Sequence[float]) -> dict[str, float]:
    """For each ratio, of the best of each side: the drop in accuracy and the latency."""
    reference = rows[0]["accuracy %, trained"]
    summary = {"reference_accuracy": reference}
    for ratio in ratios:
        for key, side in (("ours", "ours"), ("peer", "torch-pruning")):
            own = [row for row in rows if row["network"] == f"{side}, {ratio:g}x"]
            best = max(own, key=lambda row: row["accuracy %, trained"])
            name = f"{key}_{ratio:g}x"
            summary[f"{name}_drop"] = reference - best["accuracy %, trained"]
            summary[f"{name}_latency_ratio"] = best["latency ratio, batch 1"]
            summary[f"{name}_latency_ratio_batch_32"] = best["latency ratio, batch 32"]
    return summary


def parse_arguments() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--model", choices=DEPTHS, default="resnet56")
    parser.add_argument("--ratios", nargs="+", type=float, default=[2.0, 2.5])
    parser.add_argument("--criteria", nargs="+", choices=PEER_CRITERIA, default=["taylor", "l2"])
    parser.add_argument("--scope", choices=get_args(Scope), default="isomorphic", help="of ours")
    parser.add_argument(
        "--stream", nargs="+", choices=["kept", "pruned"], default=["kept", "pruned"]
    )
    parser.add_argument("--round-to", type=int, default=8, help="widths are multiples of it")
    parser.add_argument("--epochs", type=int, default=12, help="of fine-tuning")
    parser.add_argument("--lr", type=float, default=0.02)
    parser.add_argument("--no-distillation", action="store_true", help="train on the labels only")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="bf16")
    parser.add_argument("--jpeg", action="store_true", help="all of CIFAR-10, from JPEG files")
    parser.add_argument(
        "--reference-epochs", type=int, default=0, help="first train the unpruned network so long"
    )
    arguments = parser.parse_args()
    if arguments.data is None:
        parser.error("give the folder of the images and weights: --data DIR")
    arguments.data = Path(arguments.data)
    if arguments.quick:
        arguments.model, arguments.ratios = "resnet20", [2.0]
        arguments.criteria, arguments.epochs = ["taylor"], 1
    return arguments


if __name__ == "__main__":
    main()
