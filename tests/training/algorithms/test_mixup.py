from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn
from torch.nn import functional as F

from compressor.errors import ConfigError, DataError, ModelError
from compressor.training import Algorithm, Event, EventEngine, State, Window
from compressor.training.algorithms.cutmix import CutMix
from compressor.training.algorithms.label_smoothing import LabelSmoothing
from compressor.training.algorithms.mixing import draw_mixing
from compressor.training.algorithms.mixup import MixUp, mixup_batch
from compressor.training.algorithms.sam import SAM
from compressor.training.algorithms.soft_targets import class_scores
from tests.training.algorithms.mixing_job import (
    CLASSES,
    TellingTask,
    make_batch,
    make_job,
    train,
)
from tests.training.algorithms.resuming import Saving
from tests.training.helpers import are_equal, make_model, make_trainer, weights_of


def test_each_sample_is_mixed_with_the_one_that_is_named() -> None:
    inputs = torch.randn(5, 3, 2, generator=torch.Generator().manual_seed(0))
    before = inputs.clone()
    order = torch.tensor([3, 0, 4, 1, 2])
    mixed, permuted, mixing = mixup_batch(inputs, torch.arange(5), mixing=0.3, indices=order)
    for sample, other in enumerate(order.tolist()):
        expected = 0.7 * inputs[sample] + 0.3 * inputs[other]
        torch.testing.assert_close(mixed[sample], expected)
        assert permuted[sample] == other
    assert mixing == 0.3
    assert torch.equal(inputs, before)


@pytest.mark.slow
def test_the_arithmetic_is_torchvisions() -> None:
    from torchvision.transforms import v2

    images, labels = make_batch()
    order = torch.arange(len(labels)).roll(1)
    mixed, permuted, _ = mixup_batch(images, labels, mixing=0.25, indices=order)
    theirs = v2.MixUp(num_classes=CLASSES)
    parameters = {"lam": 0.75, "labels": labels, "batch_size": len(labels)}
    torch.testing.assert_close(mixed, theirs.transform(images, parameters))
    targets = 0.75 * F.one_hot(labels, CLASSES) + 0.25 * F.one_hot(permuted, CLASSES)
    torch.testing.assert_close(targets, theirs.transform(labels, parameters))


def test_shares_are_of_the_beta_distribution() -> None:
    generator = torch.Generator().manual_seed(0)
    draws = [draw_mixing(0.4, generator) for _ in range(1000)]
    assert stats.kstest(draws, stats.beta(0.4, 0.4).cdf).pvalue > 0.01
    assert draw_mixing(0.0, generator) == 0.0


def test_a_sample_weighs_at_least_as_much_as_the_other() -> None:
    generator = torch.Generator().manual_seed(0)
    images, labels = make_batch()
    shares = [mixup_batch(images, labels, 1.0, generator=generator)[2] for _ in range(50)]
    assert 0 < min(shares) < 0.2
    assert 0.3 < max(shares) <= 0.5


def test_the_draws_come_from_the_generator_or_from_torchs_own() -> None:
    images, labels = make_batch()

    def mixed(generator: torch.Generator | None = None) -> Tensor:
        return mixup_batch(images, labels, 1.0, generator=generator)[0]

    with torch.random.fork_rng():
        state, numpys = torch.get_rng_state(), np.random.get_state()[1].tolist()
        first = mixed(torch.Generator().manual_seed(1))
        assert torch.equal(torch.get_rng_state(), state)
        assert torch.equal(first, mixed(torch.Generator().manual_seed(1)))
        torch.manual_seed(1)
        assert torch.equal(first, mixed())
        assert np.random.get_state()[1].tolist() == numpys


def test_the_loop_of_the_tour_trains() -> None:
    model = make_model()
    generator = torch.Generator().manual_seed(0)
    inputs, targets = torch.randn(8, 4, generator=generator), torch.arange(8) % 2
    inputs, permuted, mixing = mixup_batch(inputs, targets, alpha=0.2, generator=generator)
    outputs = model(inputs)
    loss = (1 - mixing) * F.cross_entropy(outputs, targets)
    (loss + mixing * F.cross_entropy(outputs, permuted)).backward()
    assert model[0].weight.grad is not None


@pytest.mark.parametrize("mixer", [MixUp, CutMix])
def test_targets_are_mixed_as_the_inputs_are(mixer: type[MixUp | CutMix]) -> None:
    _, task = train(mixer(alpha=1.0))
    for shares, targets in zip(task.shares, task.targets, strict=True):
        torch.testing.assert_close(targets, shares)
    assert any(0.05 < share < 0.95 for share in torch.cat(task.shares).flatten().tolist())


@pytest.mark.parametrize(
    "algorithms",
    [
        (MixUp(1.0), CutMix(1.0), LabelSmoothing(0.2)),
        (LabelSmoothing(0.2), CutMix(1.0), MixUp(1.0)),
        (CutMix(1.0), LabelSmoothing(0.2), MixUp(1.0)),
    ],
    ids=["smoothed last", "smoothed first", "smoothed between"],
)
def test_mixing_twice_and_smoothing_compose_in_any_order(algorithms: list[Algorithm]) -> None:
    _, task = train(*algorithms)
    for shares, targets in zip(task.shares, task.targets, strict=True):
        torch.testing.assert_close(targets.sum(1), torch.ones(len(targets)))
        torch.testing.assert_close(targets, 0.8 * shares + 0.2 / CLASSES)


@pytest.mark.parametrize("mixer", [MixUp, CutMix])
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_mixed_losses_equal_the_loss_of_mixed_targets(
    mixer: type[MixUp | CutMix], smoothing: float
) -> None:
    results = []
    for interpolate_loss in (False, True):
        algorithms: list[Algorithm] = [mixer(1.0, interpolate_loss=interpolate_loss)]
        if smoothing:
            algorithms.append(LabelSmoothing(smoothing))
        trainer, task = train(*algorithms)
        results.append((trainer.state.train_metrics["train/loss"], task.model.weight.detach()))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)
    torch.testing.assert_close(results[0][1], results[1][1])


def test_mixed_losses_leave_the_targets_as_they_are() -> None:
    _, task = train(MixUp(1.0, interpolate_loss=True))
    assert all(torch.equal(task.targets[i], make_batch(seed=i)[1]) for i in range(3))


@pytest.mark.parametrize("interpolate_loss", [False, True])
def test_a_step_that_is_a_function_sees_the_same(interpolate_loss: bool) -> None:
    def step(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        outputs = {"logits": model(batch["image"].mean((2, 3)))}
        return F.cross_entropy(outputs["logits"], batch["label"])

    class Function(nn.Linear):
        pass

    loader = [dict(zip(("image", "label"), make_batch(seed=seed), strict=True)) for seed in (0, 1)]
    options = {"input_key": "image", "target_key": "label", "interpolate_loss": interpolate_loss}
    losses = []
    for algorithms in ([MixUp(1.0, **options)], []):  # type: ignore[arg-type]
        torch.manual_seed(0)
        trainer = make_trainer(
            Function(CLASSES, CLASSES), step=step, train_dataloader=loader, algorithms=algorithms
        )
        trainer.fit()
        losses.append(trainer.state.train_metrics["train/loss"])
    assert losses[0] != losses[1]
    assert isinstance(loader[0]["label"], Tensor)
    assert loader[0]["label"].dtype == torch.int64


def test_samples_are_mixed_within_their_micro_batch() -> None:
    _, task = train(MixUp(1.0), micro_batch_size=2)
    assert len(task.shares) == 12
    for index, shares in enumerate(task.shares):
        labels = make_batch(seed=index // 4)[1][index % 4 * 2 :][:2]
        assert set(shares.nonzero()[:, 1].tolist()) <= set(labels.tolist())


def test_a_training_that_goes_on_within_an_epoch_mixes_the_same() -> None:
    algorithms = (MixUp(1.0), CutMix(1.0), LabelSmoothing())
    saving = Saving([1, 2])
    trainer, _ = make_job(*algorithms, callbacks=[saving])
    saving.trainer = trainer
    trainer.fit()
    for saved in saving.saved.values():
        resumed, _ = make_job(*algorithms, callbacks=[Saving()])
        resumed.load_state_dict(saved)
        resumed.fit()
        assert are_equal(weights_of(trainer.model), weights_of(resumed.model))


def test_a_second_pass_over_a_batch_mixes_it_as_the_first() -> None:
    _, task = train(MixUp(1.0), SAM())
    assert len(task.shares) == 6
    for first, second in zip(task.shares[::2], task.shares[1::2], strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("interpolate_loss", [False, True])
def test_a_loop_of_ones_own_fires_the_events(interpolate_loss: bool) -> None:
    task = TellingTask()
    state = State(model=task, max_duration="1ep")
    engine = EventEngine(state, [MixUp(1.0, interpolate_loss=interpolate_loss)])
    with torch.random.fork_rng():
        torch.manual_seed(3)
        engine.run_event("setup")
        state.batch = make_batch()
        engine.run_event("before_forward")
        state.outputs = state.model(state.batch)
        engine.run_event("after_forward")
        state.loss = state.model.loss(state.outputs, state.batch)
        engine.run_event("after_loss")
    expected = F.cross_entropy(state.outputs, task.shares[0])
    torch.testing.assert_close(state.loss, expected)


def test_outside_its_window_nothing_is_mixed() -> None:
    mixup = MixUp(1.0)
    mixup.window = Window.parse("2ba", "1dur")
    _, task = train(mixup)
    assert [bool(targets.is_floating_point()) for targets in task.targets] == [False, False, True]


def test_two_that_mix_may_not_interpolate_the_loss() -> None:
    with pytest.raises(ConfigError, match="interpolate_loss=False"):
        train(MixUp(), CutMix(interpolate_loss=True))


def test_what_cannot_be_mixed_is_refused() -> None:
    images, labels = make_batch()
    with pytest.raises(DataError, match=r"torch\.uint8"):
        mixup_batch(images.byte(), labels)
    with pytest.raises(DataError, match="8 inputs and 7 targets"):
        mixup_batch(images, labels[:7])
    with pytest.raises(DataError, match="targets are a dict"):
        mixup_batch(images, {"boxes": labels})  # type: ignore[arg-type]
    for make in (lambda: mixup_batch(images, labels, -0.1), lambda: MixUp(-0.1)):
        with pytest.raises(ConfigError, match=r"alpha=-0\.1"):
            make()
    with pytest.raises(ConfigError, match=r"mixing=1\.5"):
        mixup_batch(images, labels, mixing=1.5)


def test_ignored_targets_are_mixed_as_the_losses_of_both() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(4, 3, 5, generator=generator)
    labels = torch.randint(3, (4, 5), generator=generator)
    labels[1, 2:] = labels[3] = 7
    state = State(nn.Linear(1, 1), "1ep")  # type: ignore[arg-type]
    mixup = MixUp(1.0, ignore_index=7)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        state.batch = (torch.randn(4, 2), labels)
        mixup.on(Event.BEFORE_FORWARD, state)
        state.outputs = scores
        mixup.on(Event.AFTER_FORWARD, state)
        torch.manual_seed(3)
        torch.randn(4, 2)
        mixing = draw_mixing(1.0)
        order = torch.randperm(4)
    mixing = min(mixing, 1 - mixing)
    own, other = (F.cross_entropy(scores, each, ignore_index=7) for each in (labels, labels[order]))
    torch.testing.assert_close(
        F.cross_entropy(scores, state.batch[1]), (1 - mixing) * own + mixing * other
    )


def test_outputs_without_class_scores_are_refused_with_the_way_out() -> None:
    for outputs in ((torch.zeros(2, 3),), {"boxes": torch.zeros(2, 4)}, torch.zeros(2)):
        with pytest.raises(ModelError, match="interpolate_loss=True"):
            class_scores(outputs)
