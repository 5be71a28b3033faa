from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compressor.errors import ConfigError, DataError
from compressor.training import Algorithm, Event, State, TaskModel, Trainer
from compressor.training.algorithms import ColOut, CutMix, MixUp, SelectiveBackprop
from compressor.training.algorithms.sample_losses import sample_losses
from compressor.training.algorithms.selective_backprop import (
    draw_by_loss,
    select_using_loss,
    should_selective_backprop,
    take_samples,
)
from compressor.training.step import make_step
from tests.training.helpers import make_trainer, weights_of


def test_it_is_done_in_a_stretch_of_training_and_leaves_batches_whole() -> None:
    chosen = [should_selective_backprop(batch / 20, batch, interrupt=3) for batch in range(20)]
    assert [batch for batch in range(20) if chosen[batch]] == [10, 11, 13, 14, 16, 17]
    every = [should_selective_backprop(batch / 4, batch, 0, 1, interrupt=0) for batch in range(4)]
    assert all(every)


def test_the_probabilities_are_those_of_drawing_without_replacement_by_rank() -> None:
    losses, keep = torch.tensor([5.0, 1.0, 9.0, 2.0]), 0.5
    weights = dict(zip((1, 3, 0, 2), (1 / 8, 3 / 8, 5 / 8, 7 / 8), strict=True))  # ** (1/0.5 - 1)
    total = sum(weights.values())
    expected = {
        pair: weights[pair[0]] * weights[pair[1]] / total
        * (1 / (total - weights[pair[0]]) + 1 / (total - weights[pair[1]]))
        for pair in combinations(range(4), 2)
    }  # fmt: skip
    generator, counts = torch.Generator().manual_seed(0), dict.fromkeys(expected, 0)
    for _ in range(8000):
        counts[tuple(draw_by_loss(losses, keep, generator).tolist())] += 1
    for pair, probability in expected.items():
        # 4 standard deviations of a mean of 8,000 draws
        assert counts[pair] / 8000 == pytest.approx(probability, abs=0.023), pair


def test_a_small_part_is_that_of_the_highest_losses() -> None:
    losses = torch.randperm(1000, generator=torch.Generator().manual_seed(0)).float()
    chosen = losses[draw_by_loss(losses, 0.02, torch.Generator().manual_seed(0))]
    assert len(chosen) == 20
    assert chosen.min() > 800  # a rank below has the weight 0.8 ** 49
    assert len(draw_by_loss(torch.ones(3), 0.1)) == 1


class Labelled(nn.Module):
    """Gives scores by which the loss of each sample is known; batch norms and dropout watch."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.dropout(self.norm(x))
        return scores


def make_batch(samples: int = 8) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(0)
    x = 3 * torch.randn(samples, 3, generator=random)
    return x, torch.randint(3, (samples,), generator=random)


def test_the_function_takes_the_samples_by_their_own_losses_and_leaves_the_model() -> None:
    model, (x, y) = Labelled(), make_batch(100)
    before = weights_of(model)
    loss = nn.CrossEntropyLoss(reduction="none")
    random = torch.Generator().manual_seed(0)
    chosen, labels = select_using_loss(x, y, model, loss, keep=0.1, generator=random)
    expected = F.cross_entropy(x / (1 + 1e-5) ** 0.5, y, reduction="none")  # as it is in eval mode
    random = torch.Generator().manual_seed(0)
    indices = draw_by_loss(expected, 0.1, random)
    assert torch.equal(chosen, x[indices])
    assert torch.equal(labels, y[indices])
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in weights_of(model).items())


def test_images_may_be_small_for_the_losses_alone() -> None:
    sizes: list[tuple[int, ...]] = []
    model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2))
    model.register_forward_pre_hook(lambda _, args: sizes.append(tuple(args[0].shape)))
    x, y = torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 0, 1])
    loss = nn.CrossEntropyLoss(reduction="none")
    chosen, _ = select_using_loss(x, y, model, loss, scale_factor=0.5)
    assert sizes == [(4, 3, 4, 4)]
    assert chosen.shape == (2, 3, 8, 8)


def test_losses_of_maps_are_means_and_a_mean_of_all_is_refused() -> None:
    x, y = torch.randn(4, 3, 2, 2), torch.randint(3, (4, 2, 2))
    model = nn.Identity()
    select_using_loss(x, y, model, nn.CrossEntropyLoss(reduction="none"))
    with pytest.raises(DataError, match=r'shape \(\).*reduction="none"'):
        select_using_loss(x, y, model, nn.CrossEntropyLoss())


class Task(TaskModel):
    """Cross entropy of `Labelled`, the mean over the batch, and a second term."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Labelled()

    def forward(self, batch: Any) -> Tensor:
        return self.model(batch[0])  # type: ignore[no-any-return]

    def loss(self, outputs: Tensor, batch: Any) -> dict[str, Tensor]:
        return {"loss": F.cross_entropy(outputs, batch[1]), "size": outputs.square().mean()}


def expected_losses(x: Tensor, y: Tensor) -> Tensor:
    scores = x / (1 + 1e-5) ** 0.5
    return F.cross_entropy(scores, y, reduction="none") + scores.square().mean(1)


def test_the_loss_of_each_sample_comes_from_that_of_the_batch() -> None:
    batch = make_batch()
    state = State(Task(), "1ba")
    torch.testing.assert_close(sample_losses(state, batch), expected_losses(*batch))
    assert state.calls == []


def test_a_loss_function_of_ones_own_is_asked_with_the_outputs_of_one_call() -> None:
    calls: list[int] = []
    seen: list[int] = []

    class Counting(Labelled):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(len(x))
            return super().forward(x)

    def step(model: nn.Module, batch: Any) -> Tensor:
        scores = model(batch[0])
        calls.append(len(scores))
        return F.cross_entropy(scores, batch[1]) + scores.square().mean()

    model, batch = Counting(), make_batch()
    state = State(model, "1ba", step=make_step(model, step, is_observed=False))
    torch.testing.assert_close(sample_losses(state, batch), expected_losses(*batch))
    assert seen == [8]
    assert calls == [8, *[1] * 8]


def test_a_loss_that_the_model_computes_is_asked_for_sample_by_sample() -> None:
    """Outputs that hold the loss of the batch, as those of transformers do, hold it for each."""

    class WithLoss(Labelled):
        def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
            scores = super().forward(x)
            loss = F.cross_entropy(scores, y) + scores.square().mean()
            return {"loss": loss, "scores": scores}

    model, batch = WithLoss(), make_batch()
    step = make_step(model, lambda model, batch: model(*batch)["loss"], is_observed=False)
    state = State(model, "1ba", step=step)
    torch.testing.assert_close(sample_losses(state, batch), expected_losses(*batch))


def test_losses_may_be_given() -> None:
    batch = make_batch()

    def losses(outputs: Tensor, batch: Any) -> Tensor:
        return F.cross_entropy(outputs, batch[1], reduction="none")

    found = sample_losses(State(Task(), "1ba"), batch, losses)
    scores = batch[0] / (1 + 1e-5) ** 0.5
    torch.testing.assert_close(found, F.cross_entropy(scores, batch[1], reduction="none"))


def test_outputs_that_are_not_of_samples_are_refused() -> None:
    class Pooled(Task):
        def forward(self, batch: Any) -> Tensor:
            return super().forward(batch)[:3]

    with pytest.raises(DataError, match="outputs for 3 samples, and the batch has 8"):
        sample_losses(State(Pooled(), "1ba"), make_batch())


def test_all_that_is_of_a_sample_is_taken() -> None:
    batch = {"x": torch.arange(3), "pair": (torch.ones(3, 2), 0.5), "name": ["a", "b", "c"]}
    taken = take_samples(batch, torch.tensor([0, 2]))
    assert taken["x"].tolist() == [0, 2]
    assert taken["pair"][0].shape == (2, 2)
    assert (taken["pair"][1], taken["name"]) == (0.5, ["a", "c"])
    assert batch["name"] == ["a", "b", "c"]


class Noting(Algorithm):
    """Writes down how many samples are trained."""

    events = frozenset({Event.AFTER_LOSS})

    def __init__(self) -> None:
        self.samples: list[int] = []

    def on(self, event: Event, state: State) -> None:
        self.samples.append(len(state.batch[0]))


def test_a_training_selects_where_it_is_to() -> None:
    noting = Noting()
    selective = SelectiveBackprop(start=0.25, end=0.75, keep=0.25)
    trainer = make_trainer(algorithms=[selective, noting], max_duration="2ep")
    trainer.fit()
    assert noting.samples == [8, 8, 8, 2, 8, 2, 8, 8]
    assert trainer.state.clock.sample == sum(noting.samples)


def test_samples_are_selected_before_they_are_changed_or_mixed() -> None:
    order: list[str] = []

    class Watching(Task):
        def loss(self, outputs: Tensor, batch: Any) -> dict[str, Tensor]:
            # A mixed or cropped image has other values than it was loaded with.
            order.append("loaded" if bool((batch[0] == batch[0].round()).all()) else "mixed")
            return super().loss(outputs, batch)

    x = torch.randint(-9, 9, (8, 3), generator=torch.Generator().manual_seed(0)).float()
    for mixing in (MixUp(alpha=1.0), MixUp(alpha=1.0, interpolate_loss=True)):
        order.clear()
        Trainer(
            Watching(),
            train_dataloader=[(x, make_batch()[1])] * 2,
            algorithms=[mixing, SelectiveBackprop(start=0, end=1, interrupt=0)],
            max_duration="1ba",
            optimizers={"name": "SGD", "lr": 0.1},
        ).fit()
        assert order[:8] == ["loaded"] * 8
        assert order[8] == "mixed"
    trainer = make_trainer(algorithms=[CutMix(), ColOut(), SelectiveBackprop()])
    keys = [each.key for each in trainer.dispatch.order_at(Event.BATCH_START)]
    assert keys == ["SelectiveBackprop", "ColOut"]


@pytest.mark.parametrize("options", [{"start": 0.9}, {"interrupt": 1}, {"interrupt": -1}])
def test_stretches_that_never_come_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="never selects"):
        SelectiveBackprop(**options)


@pytest.mark.parametrize("options", [{"keep": 0.0}, {"keep": 1.5}, {"scale_factor": 0}])
def test_parts_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"={next(iter(options.values()))}"):
        SelectiveBackprop(**options)
