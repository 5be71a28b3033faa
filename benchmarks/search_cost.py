"""What a search costs: minutes of each phase, a second delta, and memory.

python -m benchmarks.search_cost --data DIR --json search_cost.json

CIFAR ResNets of three depths on all exact images, and the smallest one on three amounts of them.
Each row is a run of the engine in a process of its own, with trials and epochs as given, then a
second one in the same run_dir for another delta. Peak memory is the process's resident set against
that of a process that does nothing but train the same reference on the same batches; both hold the
same libraries and data, and `above both imports` takes away what they had before they began.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import ROOT, finish, make_parser
from compressor import Engine, TorchFramework

sys.path.insert(0, str(ROOT / "examples"))

from cifar_data import load_pretrained, make_loaders
from cifar_resnet import CifarAccuracy, CifarForwardPass, CifarLoss
from cifar_resnet_model import DEPTHS

DELTAS = (1.0, 2.0)  # of the first run and the second
IMAGES = (1000, 2500, 5085)
PHASES = ("check", "sense", "search", "finish", "certify")
STEPS = 8  # of training the reference
MEBIBYTE = 2**20
SGD = {"name": "SGD", "lr": 0.02, "momentum": 0.9, "weight_decay": 5e-4, "nesterov": True}


def main() -> None:
    arguments = parse_arguments()
    started = time.monotonic()
    jobs = [(model, max(arguments.images)) for model in arguments.models]
    jobs += [(arguments.models[0], images) for images in arguments.images[:-1]]
    rows = [measure(arguments, model, images) for model, images in jobs]
    finish(rows, summarize(rows), arguments, started)


def measure(arguments: argparse.Namespace, model: str, images: int) -> dict[str, Any]:
    """One row."""
    with tempfile.TemporaryDirectory() as folder:
        first, second = (
            in_process(compress, arguments, model, images, folder, delta) for delta in DELTAS
        )
    training = in_process(train_reference, arguments, model, images)
    row = {
        "model": model,
        "images": images,
        **{f"{phase} min": first["phases"].get(phase, 0.0) / 60 for phase in PHASES},
        "minutes": first["seconds"] / 60,
        "second delta %": 100 * second["seconds"] / first["seconds"],
        "peak MiB": first["peak"] / MEBIBYTE,
        "training MiB": training["peak"] / MEBIBYTE,
        "memory ratio": first["peak"] / training["peak"],
        "memory ratio above imports": above_imports(first) / above_imports(training),
    }
    print(row, file=sys.stderr, flush=True)
    return row


def compress(
    arguments: argparse.Namespace, model: str, images: int, folder: str, delta: float
) -> dict[str, Any]:
    """One run of the engine: seconds in all and of each phase, and memory."""
    began, before = time.monotonic(), resident_bytes("VmRSS")
    engine = Engine(
        framework=TorchFramework(),
        data=loaders(arguments, images),
        model=load_pretrained(arguments.data, model),
        config={
            "delta": delta,
            "optimization": arguments.optimization,
            "techniques": arguments.techniques,
            "eval_key": "accuracy",
            "device": "CPU",
            "target": {"runtime": "onnxruntime", "threads": 1, "batch_size": 1},
            "budget": {"trials": arguments.trials},
            "fine_tuner": {"optimizer": SGD, "epochs": arguments.epochs},
            "full_trainer": {"optimizer": SGD, "epochs": arguments.final_epochs},
            "precision": arguments.precision,
            "run_dir": folder,
            "seed": arguments.seed,
            "progress": False,
        },
        forward_pass=CifarForwardPass(),
        eval_func=CifarAccuracy(),
        loss_function_cls=CifarLoss,
        loss_function_kwargs={},
    )
    engine.run()
    assert engine.result is not None
    return {
        "seconds": time.monotonic() - began,
        "phases": dict(engine.result.info["phases"]),
        "before": before,
        "peak": resident_bytes("VmHWM"),
    }


def train_reference(arguments: argparse.Namespace, model: str, images: int) -> dict[str, Any]:
    """A few steps of the reference's own training, as its user would write them."""
    before = resident_bytes("VmRSS")
    network, batches = load_pretrained(arguments.data, model).train(), loaders(arguments, images)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.02, momentum=0.9, nesterov=True)
    for _, batch in zip(range(STEPS), batches["train"], strict=False):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=arguments.precision == "bf16"):
            loss = torch.stack([*CifarLoss()(network, batch).values()]).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    CifarAccuracy().apply(network, batches["test"])
    return {"before": before, "peak": resident_bytes("VmHWM")}


def loaders(arguments: argparse.Namespace, images: int) -> dict[str, Any]:
    """The first so many training images, and the test images."""
    found = make_loaders(arguments.data)
    train = found["train"]
    train.images, train.labels = train.images[:images], train.labels[:images]
    return dict(found)


def in_process(function: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """What `function` returns in a fresh process: memory of earlier work does not count."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=answer, args=(sender, function, arguments))
    process.start()
    sender.close()
    try:
        return dict(receiver.recv())
    except EOFError:
        raise SystemExit(f"{function.__name__} ended without an answer; see above.") from None
    finally:
        process.join()
        receiver.close()


def answer(sender: Connection, function: Callable[..., Any], arguments: Sequence[Any]) -> None:
    torch.set_num_threads(1)
    sender.send(function(*arguments))


def resident_bytes(which: str) -> int:
    """Of this process, by Linux: "VmRSS" is now, "VmHWM" the most there was."""
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == which:
            return int(value.split()[0]) * 1024
    raise SystemExit(f"/proc/self/status has no {which}: memory is measured on Linux only.")


def above_imports(measured: Mapping[str, Any]) -> int:
    return int(measured["peak"] - measured["before"])


def summarize(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    return {
        "most_minutes": max(row["minutes"] for row in rows),
        "most_second_delta_percent": max(row["second delta %"] for row in rows),
        "most_memory_ratio": max(row["memory ratio"] for row in rows),
    }


def parse_arguments() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--models", nargs="+", choices=DEPTHS, default=sorted(DEPTHS))
    parser.add_argument("--images", nargs="+", type=int, default=list(IMAGES))
    parser.add_argument("--techniques", nargs="+", help="default: all")
    parser.add_argument("--optimization", default="latency")
    parser.add_argument("--trials", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=2, help="of each trial")
    parser.add_argument("--final-epochs", type=int, default=10, help="of each finalist")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="bf16")
    arguments = parser.parse_args()
    if arguments.data is None:
        parser.error("give the folder of the images and weights: --data DIR")
    arguments.data = Path(arguments.data)
    if arguments.quick:
        arguments.models, arguments.images = ["resnet20"], [500]
        arguments.trials, arguments.epochs, arguments.final_epochs = 1, 1, 1
        arguments.techniques, arguments.optimization = ["block_removal"], "macs"
    return arguments


if __name__ == "__main__":
    main()
