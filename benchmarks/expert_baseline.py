"""What a competent engineer gets in an afternoon from torch-pruning and ONNX Runtime.

Prune by Taylor importance to widths that the runtime likes, distil from the reference, export,
quantize statically; sweep the ratio. None of it uses this package. The data and the augmentation
are those of `examples/cifar_resnet.py`.

Every row is a file for ONNX Runtime; ratios are of the reference's float32 file, above 1 is better.
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
import torch.nn.functional as F
import torch_pruning as tp
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quantize_static,
)
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch import Tensor, nn

from benchmarks.common import ROOT, finish, interleave, make_parser

sys.path.insert(0, str(ROOT / "examples"))

from cifar_data import TestLoader, TrainLoader, load_pretrained, make_loaders
from cifar_resnet_model import DEPTHS

CALIBRATION_BATCHES = 4
TAYLOR_BATCHES = 8
ROUND_TO = 16  # ONNX Runtime's float kernels step there
TEMPERATURE = 4.0
TASK_WEIGHT = 0.1
LEARNING_RATE = 0.02
DELTA = 1.0  # points of accuracy that the summary's rows may lose

Loaders = dict[str, TrainLoader | TestLoader]


def main() -> None:
    arguments = parse_arguments()
    torch.manual_seed(arguments.seed)
    started = time.monotonic()
    loaders = make_loaders(arguments.data, jpeg=arguments.jpeg)
    rows: list[dict[str, Any]] = []
    for name in arguments.models:
        with tempfile.TemporaryDirectory() as folder:
            rows += compare(name, loaders, Path(folder), arguments)
    summary = {
        f"{name}_best_latency_ratio": max(
            row["latency ratio, batch 1"]
            for row in rows
            if row["model"] == name and row["accuracy %"] >= float_accuracy(rows, name) - DELTA
        )
        for name in arguments.models
    }
    finish(rows, summary, arguments, started)


def float_accuracy(rows: list[dict[str, Any]], name: str) -> float:
    """Of the float32 file."""
    return float(
        next(r["accuracy %"] for r in rows if r["model"] == name and r["file"] == "float32")
    )


def compare(
    name: str, loaders: Loaders, folder: Path, arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    """The rows of one model: float, plain int8, and pruned int8 at each ratio."""
    reference = load_pretrained(arguments.data, name)
    began = time.monotonic()
    files = {"float32": export_float(reference, folder / "reference.onnx")}
    files["int8"] = quantize(files["float32"], loaders["train"], folder / "int8.onnx")
    models = {"float32": reference, "int8": reference}
    minutes = {"float32": 0.0, "int8": (time.monotonic() - began) / 60}
    for ratio in arguments.ratios:
        began = time.monotonic()
        row = f"pruned {ratio:g}, int8"
        models[row] = prune(reference, loaders["train"], ratio)
        distil(models[row], reference, loaders["train"], arguments.epochs)
        float_file = export_float(models[row], folder / f"{ratio}.onnx")
        files[row] = quantize(float_file, loaders["train"], folder / f"{ratio}-int8.onnx")
        minutes[row] = (time.monotonic() - began) / 60

    times = {size: measure(files, size, arguments.quick) for size in (1, 32)}
    return [
        {
            "model": name,
            "file": row,
            "accuracy %": round(accuracy(path, loaders["test"]), 2),
            "latency ratio, batch 1": times[1]["float32"] / times[1][row],
            "latency ratio, batch 32": times[32]["float32"] / times[32][row],
            "ms, batch 1": times[1][row],
            "size ratio": files["float32"].stat().st_size / path.stat().st_size,
            "MACs ratio": count_macs(reference) / count_macs(models[row]),
            "minutes": minutes[row],
        }
        for row, path in files.items()
    ]


def prune(reference: nn.Module, loader: TrainLoader | TestLoader, ratio: float) -> nn.Module:
    """A copy with `ratio` of the channels between the two convolutions of each block removed.

    The stream between the blocks is left alone: torch-pruning does not understand shortcuts that
    pad channels, and makes models of them that raise.
    """
    model = copy.deepcopy(reference).eval()
    stream = [
        module
        for name, module in model.named_modules()
        if name in ("conv1", "linear") or name.endswith("conv2")
    ]
    pruner = tp.pruner.BasePruner(
        model,
        torch.zeros(1, 3, 32, 32),
        importance=tp.importance.GroupTaylorImportance(),
        pruning_ratio=ratio,
        global_pruning=True,
        isomorphic=True,
        round_to=ROUND_TO,
        ignored_layers=stream,
    )
    model.zero_grad()
    for number, (images, labels) in enumerate(loader):
        if number == TAYLOR_BATCHES:
            break
        F.cross_entropy(model(images), labels).backward()
    pruner.step()
    model.zero_grad()
    return model


def distil(
    model: nn.Module, reference: nn.Module, loader: TrainLoader | TestLoader, epochs: int
) -> None:
    """Fine-tune `model` in place towards the labels and the reference's softened outputs."""
    optimizer = torch.optim.SGD(
        model.parameters(), LEARNING_RATE, momentum=0.9, weight_decay=5e-4, nesterov=True
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(loader))
    model.train()
    for _ in range(epochs):
        for images, labels in loader:
            with torch.no_grad():
                wanted = F.softmax(reference(images) / TEMPERATURE, dim=1)
            outputs = model(images)
            soft = F.log_softmax(outputs / TEMPERATURE, dim=1)
            distance = F.kl_div(soft, wanted, reduction="batchmean") * TEMPERATURE**2
            loss = TASK_WEIGHT * F.cross_entropy(outputs, labels) + (1 - TASK_WEIGHT) * distance
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    model.eval()


def export_float(model: nn.Module, path: Path) -> Path:
    torch.onnx.export(
        model,
        (torch.zeros(2, 3, 32, 32),),
        path,
        dynamo=True,
        input_names=["input"],
        output_names=["output"],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        external_data=False,
        verbose=False,
    )
    return path


def quantize(float_file: Path, loader: TrainLoader | TestLoader, path: Path) -> Path:
    """Static QDQ: uint8 activations, int8 weights per channel, ranges by minimum and maximum."""
    prepared = path.with_suffix(".prepared.onnx")
    quant_pre_process(str(float_file), str(prepared))
    quantize_static(
        str(prepared),
        str(path),
        Batches(images for images, _ in loader),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        calibrate_method=CalibrationMethod.MinMax,
    )
    return path


class Batches(CalibrationDataReader):
    """The first batches of images, as the calibration asks for them."""

    def __init__(self, batches: Iterable[Tensor]) -> None:
        self.batches = zip(range(CALIBRATION_BATCHES), batches, strict=False)

    def get_next(self) -> dict[str, np.ndarray] | None:
        """The next feed, None at the end."""
        _, images = next(self.batches, (0, None))
        return None if images is None else {"input": images.numpy()}


def measure(files: dict[str, Path], batch_size: int, quick: bool) -> dict[str, float]:
    """Milliseconds of each file at one thread, in turns."""
    images = np.random.default_rng(0).standard_normal((batch_size, 3, 32, 32), np.float32)
    sessions = {name: open_session(path) for name, path in files.items()}
    calls = {
        name: lambda session=session: session.run(None, {"input": images})
        for name, session in sessions.items()
    }
    return interleave(calls, rounds=2 if quick else 11, block_seconds=0.05 if quick else 0.3)


def accuracy(path: Path, loader: TrainLoader | TestLoader) -> float:
    """Of the file in ONNX Runtime, in percent."""
    session = open_session(path)
    correct = count = 0
    for images, labels in loader:
        (outputs,) = session.run(None, {"input": images.numpy()})
        correct += int((outputs.argmax(1) == labels.numpy()).sum())
        count += len(labels)
    return 100 * correct / count


def open_session(path: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def count_macs(model: nn.Module) -> float:
    macs, _ = tp.utils.count_ops_and_params(model, torch.zeros(1, 3, 32, 32))
    return float(macs)


def parse_arguments() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--models", nargs="+", choices=DEPTHS, default=["resnet20", "resnet56"])
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.25, 0.5, 0.75])
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--jpeg", action="store_true", help="as in the example")
    arguments = parser.parse_args()
    if arguments.data is None:
        parser.error("say where the images and weights are: --data DIR, or COMPRESSOR_DATA")
    if arguments.quick:
        arguments.models = ["resnet20"]
        arguments.ratios, arguments.epochs = [0.5], 1
    return arguments


if __name__ == "__main__":
    main()
