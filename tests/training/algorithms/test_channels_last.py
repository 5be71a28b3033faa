from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compressor.structure import surgery
from compressor.testing.models import TinyResNet
from compressor.training import Algorithm, Event, State, Trainer
from compressor.training.algorithms.channels_last import ChannelsLast, apply_channels_last

LAST = torch.channels_last


def make_trainer(*algorithms: Algorithm, seen: list[Any] | None = None, **options: Any) -> Trainer:
    def step(model: nn.Module, batch: Any) -> Tensor:
        if seen is not None:
            seen.append(batch)
        return F.cross_entropy(model(batch["image"]), batch["label"])

    generator = torch.Generator().manual_seed(0)
    batch = {
        "image": torch.randn(4, 3, 8, 8, generator=generator),
        "label": torch.arange(4),
        "mask": torch.ones(4, 3, 8, 8, dtype=torch.long),
        "scale": torch.ones(4),
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = TinyResNet(in_channels=3, width=4)
    return Trainer(
        model,
        step,
        train_dataloader=[batch] * 2,
        max_duration="1ep",
        optimizers={"name": "SGD", "lr": 0.1, "momentum": 0.9},
        algorithms=algorithms,
        **options,
    )


def test_the_layout_changes_and_nothing_else() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 2))
    before = dict(model.named_parameters())
    values = {name: value.clone() for name, value in model.state_dict().items()}
    apply_channels_last(model)
    assert model[0].weight.is_contiguous(memory_format=LAST)
    assert all(value is before[name] for name, value in model.named_parameters())
    assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())


def test_images_come_channels_last_and_other_tensors_as_they_were() -> None:
    seen: list[Any] = []
    trainer = make_trainer(ChannelsLast(), seen=seen, micro_batch_size=2)
    trainer.fit()
    assert len(seen) == 4
    for batch in seen:
        assert batch["image"].is_contiguous(memory_format=LAST)
        assert batch["mask"].is_contiguous()
    assert trainer.train_dataloader[0]["image"].is_contiguous()  # type: ignore[index]


def test_training_arrives_at_the_same_weights() -> None:
    plain, last = make_trainer(), make_trainer(ChannelsLast())
    for trainer in (plain, last):
        trainer.fit()
    for ours, theirs in zip(plain.model.parameters(), last.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)  # sums in another order
    assert last.model.conv1.weight.is_contiguous(memory_format=LAST)


def test_a_layer_that_is_put_in_later_is_laid_out_too() -> None:
    class Widen(Algorithm):
        events = frozenset({Event.BATCH_END})

        def on(self, event: Event, state: State) -> None:
            new = nn.Conv2d(4, 4, 3, padding=1)
            assert not new.weight.is_contiguous(memory_format=LAST)
            state.edit(lambda model: surgery.replace(model, "layer1.0.conv1", new))

    trainer = make_trainer(ChannelsLast(), Widen())
    trainer.fit()
    assert trainer.model.layer1[0].conv1.weight.is_contiguous(memory_format=LAST)
