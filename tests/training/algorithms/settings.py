"""The settings table: an entry here buys an algorithm all the generic tests."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from compressor.interfaces.inputs import ModelInputs
from compressor.structure.groups import ChannelGroup, Member
from compressor.testing.models import TinyResNet
from compressor.training import Algorithm, TaskModel, Trainer
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
    ProgressiveResizing,
    RandAugment,
    SelectiveBackprop,
    SeqLengthWarmup,
    SqueezeExcite,
    StochasticDepth,
    WeightClustering,
    WeightStandardization,
)


class Images(TaskModel):
    """A small net for images, classified with indices or soft targets."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.model = nn.Sequential(
                nn.Conv2d(3, 8, 3, padding=1),
                nn.BatchNorm2d(8),
                nn.ReLU(),
                nn.MaxPool2d(2),
                nn.Conv2d(8, 16, 3, stride=2, padding=1),
                nn.ReLU(),
                nn.AdaptiveAvgPool2d(1),
                nn.Flatten(),
                nn.Dropout(0.2),
                nn.Linear(16, 4),
            )

    def forward(self, batch: Any) -> Tensor:
        return self.model(batch[0])  # type: ignore[no-any-return]

    def loss(self, outputs: Tensor, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(outputs, batch[1])


class Residuals(Images):
    """A residual net for the same images."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.model = TinyResNet(num_classes=4, width=4, in_channels=3)


BRANCHES = ("model.layer1.0.bn2", "model.layer2.1.bn2")
"""The modules of `Residuals` whose outputs are added."""

CHANNELS = tuple((channel,) for channel in range(8))
INNER = ChannelGroup(
    "model.0",
    8,
    (
        Member("model.0.weight", 0, "out", CHANNELS, 8),
        Member("model.0.bias", 0, "out", CHANNELS, 8),
        Member("model.1.weight", 0, "out", CHANNELS, 8),
        Member("model.1.bias", 0, "out", CHANNELS, 8),
        Member("model.1.running_mean", 0, "out", CHANNELS, 8),
        Member("model.1.running_var", 0, "out", CHANNELS, 8),
        Member("model.4.weight", 1, "in", CHANNELS, 8),
    ),
)
"""The channels between the two convolutions of `Images`."""

LAST_CHANNELS = tuple((channel,) for channel in range(16))
LAST = ChannelGroup(
    "model.4",
    16,
    (
        Member("model.4.weight", 0, "out", LAST_CHANNELS, 16),
        Member("model.4.bias", 0, "out", LAST_CHANNELS, 16),
        Member("model.9.weight", 1, "in", LAST_CHANNELS, 16),
    ),
)
"""The channels that the last layer of `Images` reads."""

MASK = torch.rand(16, 8, 3, 3, generator=torch.Generator().manual_seed(3)) > 0.6
"""What a mask keeps of the second convolution."""


def make_images(samples: int = 16) -> DataLoader[Any]:
    random = torch.Generator().manual_seed(1)
    x = torch.randn(samples, 3, 8, 8, generator=random)
    y = torch.randint(0, 4, (samples,), generator=random)
    return DataLoader(TensorDataset(x, y), batch_size=4, shuffle=True)


class Words(TaskModel):
    """A tiny GPT-2 that predicts the next of its tokens."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        from transformers import GPT2Config, GPT2LMHeadModel

        config = GPT2Config(
            vocab_size=16, n_positions=8, n_embd=8, n_layer=1, n_head=2, use_cache=False
        )
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.model = GPT2LMHeadModel(config)

    def forward(self, batch: Any) -> Tensor:
        return self.model(batch[0]).logits  # type: ignore[no-any-return]

    def loss(self, outputs: Tensor, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(outputs.flatten(0, 1), batch[1].flatten())


def make_words() -> list[tuple[Tensor, Tensor]]:
    tokens = torch.randint(0, 16, (4, 4, 9), generator=torch.Generator().manual_seed(2))
    return [(batch[:, :8], batch[:, 1:]) for batch in tokens]


class GroupNormImages(Images):
    """The same net with a group norm for the batch norm."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        self.model[1] = nn.GroupNorm(2, 8)


class Sentences(TaskModel):
    """A tiny BERT that tells sequences of tokens apart."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        from transformers import BertConfig, BertForSequenceClassification

        config = BertConfig(
            vocab_size=16,
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=12,
            max_position_embeddings=8,
            attention_probs_dropout_prob=0.0,
            num_labels=4,
        )
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.model = BertForSequenceClassification(config)

    def forward(self, batch: Any) -> Tensor:
        return self.model(batch[0]).logits  # type: ignore[no-any-return]

    def loss(self, outputs: Tensor, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(outputs, batch[1])


def make_sentences() -> list[tuple[Tensor, Tensor]]:
    random = torch.Generator().manual_seed(2)
    tokens = torch.randint(0, 16, (4, 4, 8), generator=random)
    return list(zip(tokens, torch.randint(0, 4, (4, 4), generator=random), strict=True))


@dataclass(frozen=True)
class Case:
    """How an algorithm is tested.

    Attributes:
        make: the algorithm; called again for every trainer.
        task: what is trained.
        loader: makes what it is trained on.
        changes_weights: the result differs from a training without it by more than rounding.
        is_per_sample: a gradient is the mean of those of the samples, each on its own, so that
            micro-batches are the same as whole ones.
        is_surgery: acts at SETUP, and a second one finds nothing to do.
        is_alone: refuses a second one of its kind.
    """

    make: Callable[[], Algorithm]
    task: Callable[[], TaskModel] = Images
    loader: Callable[[], Iterable[Any]] = make_images
    changes_weights: bool = True
    is_per_sample: bool = True
    is_surgery: bool = False
    is_alone: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    def make_trainer(
        self, algorithms: Iterable[Algorithm] | None = None, **options: Any
    ) -> Trainer:
        """A trainer with the algorithm, or with those given."""
        chosen = [self.make()] if algorithms is None else list(algorithms)
        task = options.pop("task", None) or self.task()
        options = {
            "train_dataloader": self.loader(),
            "optimizers": {"name": "SGD", "lr": 0.05, "momentum": 0.9},
            "max_duration": "2ep",
            **self.options,
            **options,
        }
        return Trainer(task, algorithms=chosen, **options)


SETTINGS: dict[str, Case] = {
    "ALiBi": Case(ALiBi, Words, make_words, is_surgery=True),
    "AugMix": Case(lambda: AugMix(mean=0.5, std=0.1)),
    "BatchNormReestimation": Case(lambda: BatchNormReestimation(count=2)),
    "BlurPool": Case(lambda: BlurPool(min_channels=1), is_surgery=True),
    "ChannelsLast": Case(ChannelsLast, changes_weights=False, is_surgery=True),
    "ColOut": Case(lambda: ColOut(0.3, 0.3)),
    "CutMix": Case(CutMix, is_per_sample=False),
    "CutMix, of losses": Case(
        lambda: CutMix(interpolate_loss=True), is_per_sample=False, is_alone=True
    ),
    "CutOut": Case(CutOut),
    "Distillation": Case(lambda: Distillation(Images(seed=3).model)),
    "Distillation, of features": Case(
        lambda: Distillation(Images(seed=3), features={"model.4": "model.4"}),
        is_per_sample=False,  # its scale is that of the batch
    ),
    "Distillation, one of two": Case(
        lambda: Distillation([Images(seed=3), Images(seed=4)], sample=True), is_per_sample=False
    ),
    "EMA": Case(lambda: EMA(0.9, period=2), is_alone=True),
    "Factorize": Case(
        lambda: Factorize(factorize_convs=False, min_features=4, latent_features=0.5),
        is_surgery=True,
    ),
    "Factorize, convolutions": Case(
        lambda: Factorize(min_channels=8, latent_channels=0.5), GroupNormImages, is_surgery=True
    ),
    "GatedLinearUnits": Case(GatedLinearUnits, Sentences, make_sentences, is_surgery=True),
    "GhostBatchNorm": Case(lambda: GhostBatchNorm(2), is_per_sample=False, is_surgery=True),
    "GradientClipping": Case(lambda: GradientClipping(0.05)),
    "GradientClipping, value": Case(lambda: GradientClipping(0.01, kind="value")),
    "GradientClipping, adaptive": Case(lambda: GradientClipping(0.01, kind="adaptive")),
    "GradualPruning": Case(lambda: GradualPruning([LAST], 0.5, updates=3)),
    "GradualPruning, by gradients": Case(
        lambda: GradualPruning(
            [LAST],
            macs_fraction=0.8,
            importance="hessian",
            inputs=ModelInputs((torch.zeros(1, 3, 8, 8),)),
        )
    ),
    "GradualSparsity": Case(lambda: GradualSparsity(0.5, updates=3)),
    "GradualSparsity, 2:4": Case(lambda: GradualSparsity(pattern="2:4", end="2ba")),
    "GroupRegularization": Case(lambda: GroupRegularization([LAST, INNER], 0.01)),
    "GyroDropout": Case(lambda: GyroDropout(sigma=6, tau=2), is_surgery=True),
    "HoldMasks": Case(lambda: HoldMasks(masks={"model.4": MASK})),
    "LabelSmoothing": Case(LabelSmoothing),
    "LayerFreezing": Case(lambda: LayerFreezing(start="0.2dur", level=0.7)),
    "LowPrecisionGroupNorm": Case(
        LowPrecisionGroupNorm, GroupNormImages, changes_weights=False, is_surgery=True
    ),
    "LowPrecisionLayerNorm": Case(
        LowPrecisionLayerNorm, Sentences, make_sentences, changes_weights=False, is_surgery=True
    ),
    "MixUp": Case(MixUp, is_per_sample=False),
    "MixUp, of losses": Case(
        lambda: MixUp(interpolate_loss=True), is_per_sample=False, is_alone=True
    ),
    "ProgressiveResizing": Case(ProgressiveResizing),
    "RandAugment": Case(lambda: RandAugment(mean=0.5, std=0.1)),
    "SAM": Case(SAM),
    "SAM, now and then": Case(lambda: SAM(interval=3)),
    "SelectiveBackprop": Case(SelectiveBackprop),
    "SelectiveBackprop, of small images": Case(
        lambda: SelectiveBackprop(start=0, end=1, scale_factor=0.5, interrupt=0)
    ),
    "SeqLengthWarmup": Case(
        lambda: SeqLengthWarmup(0.6, min_seq_length=2, step_size=2), Words, make_words
    ),
    "StochasticDepth": Case(
        lambda: StochasticDepth(0.5, warmup="2ba", branches=BRANCHES),
        Residuals,
        is_per_sample=False,  # draws for the samples of a micro-batch
        is_surgery=True,
    ),
    "SWA": Case(lambda: SWA(start="0dur", interval="2ba", batchnorm_batches=2), is_alone=True),
    "SqueezeExcite": Case(
        lambda: SqueezeExcite(0.5, min_channels=3), GroupNormImages, is_surgery=True
    ),
    "WeightClustering": Case(lambda: WeightClustering(3)),
    "WeightStandardization": Case(WeightStandardization, GroupNormImages, is_surgery=True),
}
