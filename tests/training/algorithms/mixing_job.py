"""A job in which inputs tell their targets: channel k of an image of class k is 1, the rest 0.

However such images are mixed, the mean over their pixels is what the targets must be.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compressor.training import Algorithm, TaskModel, Trainer

CLASSES, SIZE = 4, 8


def make_batch(samples: int = 8, seed: int = 0) -> tuple[Tensor, Tensor]:
    labels = torch.randint(CLASSES, (samples,), generator=torch.Generator().manual_seed(seed))
    return telling_images(labels), labels


def telling_images(labels: Tensor) -> Tensor:
    planes = F.one_hot(labels, CLASSES).float()
    return planes[:, :, None, None].expand(-1, -1, SIZE, SIZE).contiguous()


class TellingTask(TaskModel):
    """Notes what it was called with, and which targets the loss saw first."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.model = nn.Linear(CLASSES, CLASSES)
        self.shares: list[Tensor] = []
        self.targets: list[Tensor] = []

    def forward(self, batch: Any) -> Tensor:
        shares = batch[0].mean((2, 3))
        self.shares.append(shares)
        scores: Tensor = self.model(shares)
        return scores

    def loss(self, outputs: Tensor, batch: Any) -> Tensor:
        if len(self.targets) < len(self.shares):
            self.targets.append(batch[1])
        return F.cross_entropy(outputs, batch[1])


def make_job(*algorithms: Algorithm, **options: Any) -> tuple[Trainer, TellingTask]:
    """Three batches."""
    task = TellingTask()
    trainer = Trainer(
        task,
        train_dataloader=[make_batch(seed=seed) for seed in range(3)],
        max_duration="1ep",
        optimizers={"name": "SGD", "lr": 0.1},
        algorithms=algorithms,
        **options,
    )
    return trainer, task


def train(*algorithms: Algorithm, **options: Any) -> tuple[Trainer, TellingTask]:
    """The job, done."""
    trainer, task = make_job(*algorithms, **options)
    trainer.fit()
    return trainer, task
