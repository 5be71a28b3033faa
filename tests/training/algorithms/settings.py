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
from compressor.training import Algorithm, TaskModel, Trainer
from compressor.training.algorithms import (
    EMA,
    SAM,
    SWA,
    ALiBi,
    BatchNormReestimation,
    BlurPool,
    ChannelsLast,
    CutMix,
    Distillation,
    GradientClipping,
    GradualPruning,
    GradualSparsity,
    GroupRegularization,
    HoldMasks,
    LabelSmoothing,
    LayerFreezing,
    MixUp,
    ProgressiveResizing,
    WeightClustering,
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
    "BatchNormReestimation": Case(lambda: BatchNormReestimation(count=2)),
    "BlurPool": Case(lambda: BlurPool(min_channels=1), is_surgery=True),
    "ChannelsLast": Case(ChannelsLast, changes_weights=False, is_surgery=True),
    "CutMix": Case(CutMix, is_per_sample=False),
    "CutMix, of losses": Case(
        lambda: CutMix(interpolate_loss=True), is_per_sample=False, is_alone=True
    ),
    "Distillation": Case(lambda: Distillation(Images(seed=3).model)),
    "Distillation, of features": Case(
        lambda: Distillation(Images(seed=3), features={"model.4": "model.4"}),
        is_per_sample=False,  # its scale is that of the batch
    ),
    "Distillation, one of two": Case(
        lambda: Distillation([Images(seed=3), Images(seed=4)], sample=True), is_per_sample=False
    ),
    "EMA": Case(lambda: EMA(0.9, period=2), is_alone=True),
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
    "HoldMasks": Case(lambda: HoldMasks(masks={"model.4": MASK})),
    "LabelSmoothing": Case(LabelSmoothing),
    "LayerFreezing": Case(lambda: LayerFreezing(start="0.2dur", level=0.7)),
    "MixUp": Case(MixUp, is_per_sample=False),
    "MixUp, of losses": Case(
        lambda: MixUp(interpolate_loss=True), is_per_sample=False, is_alone=True
    ),
    "ProgressiveResizing": Case(ProgressiveResizing),
    "SAM": Case(SAM),
    "SAM, now and then": Case(lambda: SAM(interval=3)),
    "SWA": Case(lambda: SWA(start="0dur", interval="2ba", batchnorm_batches=2), is_alone=True),
    "WeightClustering": Case(lambda: WeightClustering(3)),
}
