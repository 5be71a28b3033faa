from __future__ import annotations

from typing import Any

import torch

from compressor.training import Trainer
from compressor.training.algorithms import EMA, GradientClipping, NoOpModel
from tests.training.helpers import make_loader


def test_it_takes_any_batch_and_learns_nothing() -> None:
    batches: list[Any] = [torch.zeros(4, 2), {"text": torch.zeros(3, 5)}, (torch.zeros(2), "name")]
    task = NoOpModel()
    trainer = Trainer(task, train_dataloader=batches, max_duration="2ep", micro_batch_size=2)
    trainer.fit()
    assert trainer.state.clock.batch == 6
    assert trainer.state.clock.sample == 18
    assert task.weight.item() == 0
    assert trainer.state.train_metrics["train/loss"] == 0


def test_algorithms_that_ask_nothing_of_a_model_act_on_it() -> None:
    trainer = Trainer(
        NoOpModel(),
        train_dataloader=make_loader(),
        eval_dataloader=make_loader(),
        max_duration="1ep",
        algorithms=[EMA(), GradientClipping()],
    )
    trainer.fit()
    assert trainer.state.clock.batch == 4
