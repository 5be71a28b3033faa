"""A model that does nothing, to see what is left of the time of a training."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from compressor.training.card import Card
from compressor.training.tasks.base import TaskModel


class NoOpModel(TaskModel):
    """Takes any batch and learns nothing of it: a tool, to be given in place of the model.

    A fit with it takes the time of the loader, of the transfer to the device, and of the trainer.
    If the real model takes hardly longer, the loader is what holds it up: give it more workers.
    Leave out algorithms that ask for layers or outputs of a model.

    >>> from compressor.training import Trainer
    >>> trainer = Trainer(NoOpModel(), train_dataloader=[torch.zeros(4, 2)] * 3, max_duration=1)
    >>> trainer.fit()
    >>> trainer.state.clock.batch, trainer.state.clock.sample
    (3, 12)
    """

    card: ClassVar[Card] = Card(
        summary="Does nothing in place of a model, to see what is left of the time of a training.",
        source="MosaicML Composer, NoOpModel",
        functional=None,
        settings="None.",
        use_when="A GPU waits, and it is not known whether for the loader.",
        avoid_when="Anything is to be learnt.",
        cost="That of the loader, the transfer to the device, and the trainer.",
    )

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))  # a trainer wants something to train

    def forward(self, batch: Any) -> Tensor:
        """0, of shape (), whatever the batch is."""
        return self.weight * 0

    def loss(self, outputs: Tensor, batch: Any) -> Tensor:
        """0, with a gradient of 0."""
        return outputs
