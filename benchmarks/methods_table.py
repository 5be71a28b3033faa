"""Which training methods are tried where, with which settings.

Settings are the defaults, but where these are for other sizes: wide networks, thousands of steps.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from benchmarks.methods_places import KEPT_MACS, Place
from compressor.training import Algorithm
from compressor.training.algorithms import (
    EMA,
    SAM,
    SWA,
    ALiBi,
    AugMix,
    BatchNormReestimation,
    BlurPool,
    ChannelsLast,
    ColOut,
    CutMix,
    CutOut,
    Distillation,
    Factorize,
    GatedLinearUnits,
    GhostBatchNorm,
    GradientClipping,
    GradualPruning,
    GradualSparsity,
    GroupRegularization,
    GyroDropout,
    HoldMasks,
    LabelSmoothing,
    LayerFreezing,
    LowPrecisionGroupNorm,
    LowPrecisionLayerNorm,
    MixUp,
    NoOpModel,
    ProgressiveResizing,
    RandAugment,
    SelectiveBackprop,
    SeqLengthWarmup,
    SqueezeExcite,
    StochasticDepth,
    WeightClustering,
    WeightStandardization,
    magnitude_mask,
)
from compressor.training.recipes import hot_algorithms, medium_algorithms, mild_algorithms

PLAIN = "plain"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # that the images are normalised with
PIXELS = {"mean": MEAN, "std": STD}
SPARSITY = 0.5
IMAGES, TEXT = ("scratch",), ("text",)
BOTH = (*IMAGES, *TEXT)


@dataclass(frozen=True)
class Method:
    """One row: a training method, or several together.

    Attributes:
        name: of the class, or of the combination.
        make: the algorithms for a place; called for every training.
        settings: in words.
        places: attributes of `Places` where it trains from scratch, and where its steps are timed.
        is_for_recovery: the pruned network is recovered with it as well.
        is_only_timed: its accuracy is no question.
        task: trained in place of the network's; None: the network's.
        net: of a place and a seed, the network that it begins with; None: the place's.
        lr: in place of the schedule's; None: the schedule's.
    """

    name: str
    make: Callable[[Place], Sequence[Algorithm]]
    settings: str = ""
    places: tuple[str, ...] = IMAGES
    is_for_recovery: bool = True
    is_only_timed: bool = False
    task: Callable[[], nn.Module] | None = None
    net: Callable[[Place, int], nn.Module] | None = None
    lr: float | None = None


def method(
    algorithm: type[Algorithm],
    places: tuple[str, ...] = IMAGES,
    *,
    found: Callable[[Place], Mapping[str, Any]] | None = None,
    **options: Any,
) -> Method:
    """An algorithm alone.

    Args:
        algorithm: its class.
        places: attributes of `Places`.
        found: options that depend on the place.
        options: for all places.
    """

    def make(place: Place) -> list[Algorithm]:
        return [algorithm(**options, **(found(place) if found else {}))]

    chosen = ", ".join(f"{name}={value!r}" for name, value in options.items())
    return Method(algorithm.__name__, make, chosen, places, "scratch" in places)


def masks_of(place: Place) -> Mapping[str, Any]:
    """Half of the weights of every convolution but the first, by magnitude."""
    net = place.net(0)
    layers = [name for name, m in net.named_modules() if isinstance(m, nn.Conv2d)][1:]
    weights = {name: net.get_submodule(name).weight for name in layers}
    return {"masks": {f"model.{n}": magnitude_mask(w, SPARSITY) for n, w in weights.items()}}


def gradually_pruned(place: Place) -> list[Algorithm]:
    """Of the network before it was pruned, half of the work in the first half of the fit."""
    groups = place.groups if place.whole is None else place_of_whole(place).groups
    return [
        GradualPruning(groups, macs_fraction=KEPT_MACS, inputs=place.inputs, updates=5),
        BatchNormReestimation(),
    ]


def place_of_whole(place: Place) -> Place:
    """The place with the network that its own was pruned from."""
    return replace(place, make_net=lambda: copy.deepcopy(place.whole))  # type: ignore[arg-type]


METHODS: tuple[Method, ...] = (
    Method(PLAIN, lambda _: [], "", (*BOTH, "group_norms", "text_bf16")),
    method(ALiBi, TEXT),
    method(AugMix, **PIXELS),
    method(BatchNormReestimation),
    method(BlurPool, min_channels=4),
    # Images are trained on channels last in any case, so that only its time is measured.
    replace(method(ChannelsLast), is_for_recovery=False, is_only_timed=True),
    method(ColOut),
    method(CutMix),
    method(CutOut),
    method(Distillation, found=lambda place: {"teacher": place.teacher}),
    method(EMA, BOTH, decay_rate=0.98, period=20),
    method(
        Factorize,
        BOTH,
        min_channels=24,
        latent_channels=0.5,
        min_features=64,
        latent_features=0.25,
    ),
    method(GatedLinearUnits, TEXT),
    method(GhostBatchNorm),
    method(GradientClipping, BOTH),
    Method(
        "GradualPruning",
        gradually_pruned,
        f"macs_fraction={KEPT_MACS}, updates=5, of the whole network",
        net=lambda place, seed: (place if place.whole is None else place_of_whole(place)).net(seed),
    ),
    method(GradualSparsity, final_sparsity=SPARSITY),
    method(GroupRegularization, found=lambda place: {"groups": place.groups}),
    method(GyroDropout, TEXT),
    replace(method(HoldMasks, found=masks_of), settings="half of the weights, by magnitude"),
    method(LabelSmoothing, BOTH),
    method(LayerFreezing, BOTH),
    method(LowPrecisionGroupNorm, ("group_norms",)),
    method(LowPrecisionLayerNorm, ("text_bf16",)),
    method(MixUp),
    Method(
        "NoOpModel",
        lambda _: [],
        "in place of the network",
        is_for_recovery=False,
        is_only_timed=True,
        task=NoOpModel,
    ),
    method(ProgressiveResizing),
    method(RandAugment, **PIXELS),
    method(SAM, BOTH),
    method(SelectiveBackprop, BOTH),
    method(SeqLengthWarmup, TEXT),
    method(SqueezeExcite, min_channels=16, latent_channels=0.25),
    method(StochasticDepth),
    method(SWA, BOTH, interval="10ba"),
    method(WeightClustering, bits=4),
    method(WeightStandardization),
)


def taught(
    *others: Callable[[], Algorithm], task_weight: float = 0.0
) -> Callable[[Place], Sequence[Algorithm]]:
    """Makes a distillation, and others beside.

    Args:
        others: makers of them.
        task_weight: of the labels; that of the teacher is 1.
    """

    def make(place: Place) -> list[Algorithm]:
        assert place.teacher is not None
        distillation = Distillation(place.teacher, weight=1.0, task_weight=task_weight)
        return [distillation, *(each() for each in others)]

    return make


def mix() -> MixUp:
    """MixUp by any share, all being as likely."""
    return MixUp(alpha=1.0)


def augment() -> RandAugment:
    """RandAugment of these images."""
    return RandAugment(mean=MEAN, std=STD)


def now_and_then() -> SAM:
    """SAM at every fourth batch."""
    return SAM(interval=4)


COMBINATIONS: tuple[Method, ...] = (
    Method(PLAIN, lambda _: []),
    Method("teacher", taught()),
    Method("mild", lambda place: mild_algorithms(place.teacher)),
    Method("medium", lambda place: medium_algorithms(place.teacher)),
    Method("hot", lambda place: hot_algorithms(place.teacher)),
    Method("labels, teacher", taught(task_weight=1.0)),
    Method("teacher, MixUp", taught(mix)),
    Method("teacher, CutMix", taught(CutMix)),
    Method("teacher, RandAugment", taught(augment)),
    Method("teacher, SAM", taught(now_and_then)),
    Method("labels, teacher, EMA, clipping", taught(GradientClipping, EMA, task_weight=1.0)),
    Method(
        "labels, teacher, EMA, clipping, MixUp, smoothing",
        taught(GradientClipping, EMA, MixUp, LabelSmoothing, task_weight=1.0),
    ),
    Method(
        "labels, teacher, EMA, clipping, MixUp, smoothing, CutMix, SAM",
        taught(GradientClipping, EMA, MixUp, LabelSmoothing, CutMix, now_and_then, task_weight=1.0),
    ),
)
"""What `finetune_compressed` is made of, may be made of, and, the last three, was made of."""


def with_rates() -> Iterator[Method]:
    """Plain training and distillation at other rates than that of the schedule."""
    for method in METHODS:
        if method.name in (PLAIN, "Distillation"):
            for lr in RATES:
                yield replace(
                    method,
                    name=f"{method.name}, rate {lr}",
                    settings=f"learning rate {lr}",
                    lr=lr,
                )


RATES = (0.01, 0.04)
