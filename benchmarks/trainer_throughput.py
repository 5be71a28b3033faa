"""Images per second, accuracy and memory of the trainer against a hand-written loop, on CIFAR-10.

A CIFAR ResNet from scratch in bfloat16 and channels-last, with all images on the device, cropped
and flipped there. Rates are of blocks of batches that take turns in one process; the accuracy is of
the exact test images after a fit of its own. Runs on the GPU where there is one.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR

from benchmarks.common import ROOT, finish, make_parser

sys.path.insert(0, str(ROOT / "examples"))

from cifar_data import JpegImages, make_loaders, normalize, random_crop_and_flip
from cifar_resnet_model import DEPTHS, CifarResNet

from compressor.training import TaskModel, Trainer
from compressor.training.algorithms import ChannelsLast
from compressor.training.evaluator import Evaluator
from compressor.training.schedules import warmup_cosine

SGD = {"lr": 0.2, "momentum": 0.9, "nesterov": True, "weight_decay": 5e-4}


def main() -> None:
    arguments = parse_arguments()
    started = time.monotonic()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    images, labels, test = load(arguments, device)
    rates = measure_rates(images, labels, device, arguments)
    accuracy, minutes = train(images, labels, test, device, arguments)
    rows = [{"loop": name, **values} for name, values in rates.items()]
    summary = {
        "throughput_ratio": rates["trainer"]["of by hand"],
        "accuracy": accuracy,
        "epochs": arguments.epochs,
        "training_minutes": minutes,
    }
    finish(rows, summary, arguments, started)


def parse_arguments() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--model", choices=DEPTHS, default="resnet56")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--jpeg", action="store_true", help="all of CIFAR-10, from JPEG files")
    arguments = parser.parse_args()
    if arguments.data is None:
        parser.error("give the folder of the images: --data DIR")
    if arguments.quick:
        arguments.model, arguments.epochs, arguments.batch_size = "resnet20", 1, 128
    return arguments


class Images(TaskModel):
    """Cross entropy, and the share of right answers in percent."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.model = net

    def forward(self, batch: Any) -> Tensor:
        return self.model(batch[0])

    def loss(self, outputs: Tensor, batch: Any) -> Tensor:
        return F.cross_entropy(outputs, batch[1])


class DeviceLoader:
    """All images in random order, cropped and flipped, where they lie."""

    def __init__(
        self, images: Tensor, labels: Tensor, batch_size: int, batches: int | None = None
    ) -> None:
        self.images, self.labels, self.batch_size = images, labels, batch_size
        self.batches = batches or len(labels) // batch_size

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self.labels)).to(self.labels.device)
        chunks = itertools.cycle(order.split(self.batch_size)[: len(order) // self.batch_size])
        for chosen in itertools.islice(chunks, self.batches):
            yield augment(self.images[chosen]), self.labels[chosen]


def augment(images: Tensor) -> Tensor:
    if images.device.type == "cpu":
        return normalize(random_crop_and_flip(images))
    with torch.device(images.device):  # the same, drawn and computed there
        moved = random_crop_and_flip(images)
    mean = moved.new_tensor([123.675, 116.28, 103.53], dtype=torch.float32).view(3, 1, 1)
    std = moved.new_tensor([58.395, 57.12, 57.375], dtype=torch.float32).view(3, 1, 1)
    return (moved.float() - mean) / std


def load(
    arguments: argparse.Namespace, device: torch.device
) -> tuple[Tensor, Tensor, list[tuple[Tensor, Tensor]]]:
    """Training images and labels on the device, and test batches."""
    loaders = make_loaders(arguments.data, batch_size=500)
    images, labels = loaders["train"].images, loaders["train"].labels
    if arguments.jpeg:
        extra = JpegImages(arguments.data / "cifar10_jpeg.npz")
        images, labels = extra.images, extra.labels
    test = [(x.to(device), y.to(device)) for x, y in loaders["test"]]
    if arguments.quick:
        images, labels, test = images[:1280], labels[:1280], test[:1]
    return images.to(device), labels.long().to(device), test


def measure_rates(
    images: Tensor, labels: Tensor, device: torch.device, arguments: argparse.Namespace
) -> dict[str, dict[str, float]]:
    """Rows by the kind of loop; the ratio is a median over rounds, each within a round."""
    batches, rounds = (4, 3) if arguments.quick else (60, 9)
    data = DeviceLoader(images, labels, arguments.batch_size, batches)
    loops = {
        "by hand": make_loop(make_net(arguments), data, device),
        "trainer": make_fit(make_net(arguments), data, device),
    }
    seconds: dict[str, list[float]] = {name: [] for name in loops}
    peaks: dict[str, float] = {}
    for number in range(rounds + 1):
        for name, run in loops.items():
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            began = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize()
                peaks[name] = torch.cuda.max_memory_allocated() / 2**20
            if number:  # the first warms up
                seconds[name].append(time.perf_counter() - began)
    count = batches * arguments.batch_size
    base = seconds["by hand"]
    return {
        name: {
            "images per second": count / statistics.median(own),
            "of by hand": statistics.median(b / a for a, b in zip(own, base, strict=True)),
            "peak MiB on the GPU": peaks.get(name, 0.0),
        }
        for name, own in seconds.items()
    }


def make_net(arguments: argparse.Namespace) -> nn.Module:
    torch.manual_seed(arguments.seed)
    return CifarResNet(DEPTHS[arguments.model])


def make_loop(model: nn.Module, data: DeviceLoader, device: torch.device) -> Callable[[], None]:
    """An epoch by hand: what the trainer does, and no more."""
    model.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), **SGD)
    schedule = LambdaLR(optimizer, lambda done: warmup_cosine(min(1.0, done / len(data))))

    def run() -> None:
        model.train()
        total = torch.zeros((), device=device, dtype=torch.float64)
        for inputs, targets in data:
            inputs = inputs.to(memory_format=torch.channels_last)
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(device.type, torch.bfloat16):
                loss = F.cross_entropy(model(inputs), targets)
            total += loss.detach()
            loss.backward()
            optimizer.step()
            schedule.step()
        total.item()

    return run


def make_trainer(
    model: nn.Module, data: DeviceLoader, device: torch.device, **options: Any
) -> Trainer:
    return Trainer(
        Images(model),
        train_dataloader=data,
        optimizers={"name": "SGD", **SGD},
        algorithms=[ChannelsLast()],
        device=device,
        precision="bf16",
        **options,
    )


def make_fit(model: nn.Module, data: DeviceLoader, device: torch.device) -> Callable[[], None]:
    trainer = make_trainer(model, data, device)
    return lambda: trainer.fit("1ep")


def train(
    images: Tensor,
    labels: Tensor,
    test: list[tuple[Tensor, Tensor]],
    device: torch.device,
    arguments: argparse.Namespace,
) -> tuple[float, float]:
    """Percent of the test images that are right after a fit from scratch, and its minutes."""

    def evaluate(task: nn.Module) -> dict[str, float]:
        right = sum(int((task.model(x).argmax(1) == y).sum()) for x, y in test)
        return {"accuracy": 100 * right / sum(len(y) for _, y in test)}

    trainer = make_trainer(
        make_net(arguments),
        DeviceLoader(images, labels, arguments.batch_size),
        device,
        eval_dataloader=Evaluator(function=evaluate),
        eval_interval=f"{arguments.epochs}ep",
        max_duration=f"{arguments.epochs}ep",
        seed=arguments.seed,
    )
    began = time.monotonic()
    trainer.fit()
    return trainer.state.metrics["accuracy"], (time.monotonic() - began) / 60


if __name__ == "__main__":
    main()
