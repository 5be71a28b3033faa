"""Where training methods are tried: ResNet-20 untrained and pruned, a small BERT on SST-2.

All use the exact images of CIFAR-10 or the sentences of SST-2, and end with the accuracy on samples
that were not trained on: 1,017 images, 872 sentences.
"""

from __future__ import annotations

import copy
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.common import ROOT
from compressor import prune
from compressor.functional import reestimate_batchnorm
from compressor.interfaces.inputs import ModelInputs
from compressor.profiling.counts import count
from compressor.seeding import derive_seed, isolated_rng
from compressor.structure.channels import find_groups
from compressor.structure.groups import ChannelGroup
from compressor.structure.trace import eval_mode
from compressor.training import Algorithm, Trainer
from compressor.training.tasks.classifier import ClassifierTask

sys.path.insert(0, str(ROOT / "examples"))

from cifar_data import load_pretrained, normalize, random_crop_and_flip
from cifar_resnet_model import CifarResNet

KEPT_MACS, ROUND_TO = 0.5, 4  # work that is left of the pruned network, multiples of its widths
GROUPS = 4  # of a group norm, each of 4 to 16 channels
LENGTH = 32  # words of a sentence, the first of which stands for all of it
PADDING, UNKNOWN, FIRST = 0, 1, 2
WORD = re.compile(r"\w+|[^\w\s]")


class Samples(NamedTuple):
    """Inputs (N, ...) and class indices (N,)."""

    inputs: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Schedule:
    """How long and how fast is trained.

    Attributes:
        epochs: of all samples.
        samples: of the training split, the first ones; None: all.
        batch_size: of training.
        optimizer: {"name": class of torch.optim, ...its arguments}; the rate has a short warm-up
            and falls to 0 as a cosine.
    """

    epochs: int
    samples: int | None
    batch_size: int
    optimizer: Mapping[str, Any]


@dataclass(frozen=True)
class Place:
    """A network and its samples.

    Attributes:
        name: of the network.
        make_net: a new one, drawn from torch's global generator.
        train: what is trained on.
        test: what is judged on.
        schedule: of training.
        precision: of training; what is judged computes in float32.
        augment: what is done to all inputs of an epoch.
        finish: what is done to the inputs of a batch.
        is_fast: images and filters are stored pixel by pixel, as `ChannelsLast` has them.
        task: wraps the network.
        teacher: a trained network for the same samples; None: there is none.
        whole: what the network was pruned from, for methods that prune it themselves.
    """

    name: str
    make_net: Callable[[], nn.Module]
    train: Samples
    test: Samples
    schedule: Schedule
    precision: Literal["fp32", "bf16"] = "fp32"
    augment: Callable[[Tensor], Tensor] = lambda inputs: inputs
    finish: Callable[[Tensor], Tensor] = lambda inputs: inputs
    is_fast: bool = False
    task: Callable[[nn.Module], ClassifierTask] = field(default=lambda net: make_task(net))
    teacher: nn.Module | None = None
    whole: nn.Module | None = None

    @cached_property
    def inputs(self) -> ModelInputs:
        """Of one call of the network."""
        return ModelInputs((self.prepare(self.test.inputs[:2]),))

    @cached_property
    def groups(self) -> Sequence[ChannelGroup]:
        """Channels of the network that are pruned together."""
        return find_groups(self.net(0), self.inputs).groups

    def net(self, seed: int) -> nn.Module:
        """A new network."""
        with isolated_rng(derive_seed(seed, "network")):
            net = self.make_net()
        return net.to(memory_format=torch.channels_last) if self.is_fast else net

    def prepare(self, inputs: Tensor) -> Tensor:
        """Of a batch, what the network is called with."""
        inputs = self.finish(inputs)
        return inputs.contiguous(memory_format=torch.channels_last) if self.is_fast else inputs

    def epochs(self) -> Epochs:
        """What a trainer iterates over."""
        chosen = Samples(*(each[: self.schedule.samples] for each in self.train))
        return Epochs(chosen, self.schedule.batch_size, self.augment, self.prepare)

    def trainer(
        self,
        task: nn.Module,
        algorithms: Sequence[Algorithm],
        loader: Any,
        seed: int,
        epochs: int | None = None,
    ) -> Trainer:
        """One that trains `task` on `loader` by the schedule, and evaluates nothing."""
        return Trainer(
            task,
            train_dataloader=loader,
            optimizers=dict(self.schedule.optimizer),
            max_duration=f"{self.schedule.epochs if epochs is None else epochs}ep",
            algorithms=algorithms,
            precision=self.precision,
            seed=seed,
        )

    def judge(self, task: nn.Module) -> float:
        """Accuracy on the test samples, in percent."""
        right = 0
        with eval_mode(task), torch.no_grad():
            for inputs, labels in zip(*(each.split(256) for each in self.test), strict=True):
                outputs = task((self.prepare(inputs), labels))
                right += int((getattr(outputs, "logits", outputs).argmax(1) == labels).sum())
        return 100 * right / len(self.test.labels)


class Epochs:
    """Shuffled and augmented anew in every epoch: the same for all methods, as the seed says.

    An epoch is drawn when it begins, so that what a method draws changes nothing in it.
    """

    def __init__(
        self,
        samples: Samples,
        batch_size: int,
        augment: Callable[[Tensor], Tensor],
        prepare: Callable[[Tensor], Tensor],
    ) -> None:
        self.samples, self.batch_size = samples, batch_size
        self.augment, self.prepare = augment, prepare

    def __len__(self) -> int:
        return len(self.samples.labels) // self.batch_size  # what is left over is not trained on

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self.samples.labels))[: len(self) * self.batch_size]
        inputs = self.augment(self.samples.inputs[order]).split(self.batch_size)
        labels = self.samples.labels[order].split(self.batch_size)
        return ((self.prepare(x), y) for x, y in zip(inputs, labels, strict=True))


def make_task(net: nn.Module) -> ClassifierTask:
    """A classifier that measures nothing while it trains."""
    return ClassifierTask(net, train_metrics=(), eval_metrics=())


class SentenceTask(ClassifierTask):
    """A network of transformers that is given tokens (N, L) and where they are padding."""

    def forward(self, batch: Any) -> Any:
        """Scores (N, K) as the attribute `logits`."""
        return self.model(batch[0], attention_mask=(batch[0] != PADDING).long())


def make_sentence_task(net: nn.Module) -> ClassifierTask:
    """A `SentenceTask` that measures nothing while it trains."""
    return SentenceTask(net, train_metrics=(), eval_metrics=())


@dataclass(frozen=True)
class Places:
    """All of them, made when they are first asked for.

    Attributes:
        data: folder of images, weights and sentences.
        schedules: by "scratch", "recovery", "levels", "text".
        is_quick: a few samples of each split.
    """

    data: Path
    schedules: Mapping[str, Schedule]
    is_quick: bool = False

    @cached_property
    def scratch(self) -> Place:
        """ResNet-20, untrained; in bf16, which takes two thirds of the time."""
        train, test = self.images
        return Place(
            "ResNet-20",
            lambda: CifarResNet(20),
            train,
            test,
            self.schedules["scratch"],
            augment=random_crop_and_flip,
            finish=normalize,
            precision="bf16",
            is_fast=True,
            teacher=self.reference,
        )

    @cached_property
    def group_norms(self) -> Place:
        """ResNet-20 with group norms, untrained."""
        return replace(
            self.scratch,
            name="ResNet-20 with group norms",
            make_net=lambda: with_group_norms(CifarResNet(20)),
        )

    @cached_property
    def recovery(self) -> Place:
        """The trained ResNet-20 without half of its work, to be recovered."""
        return replace(
            self.scratch,
            name="pruned ResNet-20",
            make_net=lambda: copy.deepcopy(self.pruned),
            schedule=self.schedules["recovery"],
            whole=self.reference,
        )

    @cached_property
    def text(self) -> Place:
        """A small BERT, untrained."""
        train, test, words = read_sentences(self.data / "sst2", self.is_quick)
        return Place(
            "small BERT",
            lambda: small_bert(words),
            train,
            test,
            self.schedules["text"],
            task=make_sentence_task,
        )

    @cached_property
    def text_bf16(self) -> Place:
        """The same in bf16."""
        return replace(self.text, name="small BERT, bf16", precision="bf16")

    @cached_property
    def images(self) -> tuple[Samples, Samples]:
        """Pixels (N, 3, 32, 32), 0 to 255, of training and of test."""
        with np.load(self.data / "cifar10_exact_subset.npz") as file:
            splits = [
                Samples(*(torch.from_numpy(file[f"{s}_{k}"]) for k in ("images", "labels")))
                for s in ("train", "test")
            ]
        few = 256 if self.is_quick else None
        train, test = (Samples(x[:few], y[:few]) for x, y in splits)
        return train, test

    @cached_property
    def reference(self) -> nn.Module:
        """ResNet-20 as it was trained."""
        return load_pretrained(self.data, "resnet20").to(memory_format=torch.channels_last)

    @cached_property
    def pruned(self) -> nn.Module:
        """The reference without the channels of the least norm, as many as halve its work."""
        example = normalize(self.images[1].inputs[:2])
        pruned = prune(self.reference, example, macs_fraction=KEPT_MACS, round_to=ROUND_TO)
        return pruned.model

    def plan_facts(self) -> dict[str, float]:
        """What the plan of `recovery` does, before anything is recovered."""
        place = self.recovery
        reestimated = copy.deepcopy(self.pruned)
        with isolated_rng(0):
            reestimate_batchnorm(reestimated, place.epochs(), call_on_inputs)
        before, after = (count(net, place.inputs) for net in (self.reference, self.pruned))
        return {
            "reference_accuracy": place.judge(place.task(copy.deepcopy(self.reference))),
            "pruned_accuracy": place.judge(place.task(copy.deepcopy(self.pruned))),
            "reestimated_accuracy": place.judge(place.task(reestimated)),
            "pruned_macs_fraction": after.macs / before.macs,
            "pruned_params_fraction": after.params / before.params,
        }


def call_on_inputs(net: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """What a network of images says of a batch."""
    outputs: Tensor = net(batch[0])
    return outputs


def with_group_norms(net: nn.Module) -> nn.Module:
    """The network with a group norm in place of each batch norm, in place."""
    for name, module in list(net.named_modules()):
        if isinstance(module, nn.BatchNorm2d):
            owner, _, attribute = name.rpartition(".")
            norm = nn.GroupNorm(GROUPS, module.num_features)
            setattr(net.get_submodule(owner), attribute, norm)
    return net


def small_bert(words: int) -> nn.Module:
    """Two layers, 64 wide."""
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(
        BertConfig(
            vocab_size=words,
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=128,
            max_position_embeddings=LENGTH,
            num_labels=2,
            pad_token_id=PADDING,
        )
    )


@cache
def read_sentences(folder: Path, is_quick: bool) -> tuple[Samples, Samples, int]:
    """Training and dev sentences as numbers of words (N, `LENGTH`), and how many words there are.

    A word is known if the training sentences have it twice.
    """
    lines = [(folder / f"{split}.tsv").read_text().splitlines() for split in ("train", "dev")]
    train, dev = ([line.rsplit("\t", 1) for line in split] for split in lines)
    counts = Counter(word for sentence, _ in train for word in WORD.findall(sentence.lower()))
    known = sorted(word for word, times in counts.items() if times >= 2)
    numbers = {word: number for number, word in enumerate(known, start=FIRST + 1)}
    few = 256 if is_quick else None
    splits = (as_numbers(split[:few], numbers) for split in (train, dev))
    return *splits, len(numbers) + FIRST + 1  # type: ignore[return-value]


def as_numbers(lines: Sequence[Sequence[str]], numbers: Mapping[str, int]) -> Samples:
    """Sentences and labels; what is longer is cut off, what is shorter padded."""
    inputs = torch.full((len(lines), LENGTH), PADDING)
    for row, (sentence, _) in zip(inputs, lines, strict=True):
        words = [numbers.get(word, UNKNOWN) for word in WORD.findall(sentence.lower())]
        chosen = [FIRST, *words][:LENGTH]
        row[: len(chosen)] = torch.tensor(chosen)
    return Samples(inputs, torch.tensor([int(label) for _, label in lines]))
