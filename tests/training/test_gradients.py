from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compressor.errors import ConfigError
from compressor.training import Algorithm, Callback, Event, OutOfMemoryError, State
from compressor.training.gradients import is_out_of_memory
from tests.training.helpers import are_equal, make_loader, make_model, make_trainer, weights_of

TOO_MUCH = 2**60  # bytes: refused by the allocator of any machine


class Hungry(nn.Module):
    """A net that asks for more memory than there is when a batch has more than `fits` samples."""

    def __init__(self, fits: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.fits = fits
        self.net = make_model(dropout=dropout)
        if fits < 2:
            self.net[1] = nn.Identity()  # a batch norm takes no single sample
        self.sizes: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.sizes.append(len(x))
        out = self.net(x)
        if len(x) > self.fits:
            torch.empty(TOO_MUCH, dtype=torch.uint8)
        return out


def without_batchnorm() -> nn.Module:
    model = make_model()
    model[1] = nn.Identity()
    return model


@pytest.mark.parametrize("size", [1, 2, 3, 4, 8, 100])
def test_micro_batches_give_the_gradient_of_the_whole(size: int) -> None:
    whole = make_trainer(without_batchnorm())
    parts = make_trainer(without_batchnorm(), micro_batch_size=size)
    whole.fit()
    parts.fit()
    for name, value in weights_of(whole.model).items():
        # 1e-6: float32 sums in another order, over 8 steps
        torch.testing.assert_close(parts.model.state_dict()[name], value, rtol=0, atol=1e-6)
    assert parts.state.train_metrics == pytest.approx(whole.state.train_metrics, abs=1e-6)
    assert parts.state.clock.sample == whole.state.clock.sample == 64


def test_events_inside_a_batch_come_for_every_micro_batch() -> None:
    seen: list[tuple[Event, int]] = []

    class Watch(Callback):
        events = frozenset(Event)

        def on(self, event: Event, state: State) -> None:
            if state.batch is not None:
                seen.append((event, len(state.batch[0])))

    make_trainer(callbacks=[Watch()], micro_batch_size=3, max_duration="1ba").fit()
    inner = [Event.BEFORE_FORWARD, Event.AFTER_FORWARD, Event.AFTER_LOSS]
    parts = [(event, size) for size in (3, 3, 2) for event in inner]
    outer = [(event, 8) for event in (Event.BEFORE_STEP, Event.AFTER_STEP, Event.BATCH_END)]
    assert seen[:13] == [(Event.BATCH_START, 8), *parts, *outer]


def test_the_loss_of_a_batch_is_the_mean_over_its_micro_batches() -> None:
    seen: list[float] = []

    class Watch(Callback):
        events = frozenset({Event.BEFORE_STEP})

        def on(self, event: Event, state: State) -> None:
            seen.append(state.losses["loss"].item())

    for size in (None, 3):
        make_trainer(
            without_batchnorm(), callbacks=[Watch()], micro_batch_size=size, max_duration="1ba"
        ).fit()
    assert seen[0] == pytest.approx(seen[1], abs=1e-6)


@pytest.mark.parametrize(("fits", "found"), [(8, None), (4, 4), (3, 2), (1, 1)])
def test_auto_halves_until_a_batch_fits_and_repeats_it(fits: int, found: int | None) -> None:
    model = Hungry(fits, dropout=0.5)
    trainer = make_trainer(model, micro_batch_size="auto")
    trainer.fit()
    assert trainer.micro_batch_size == found
    calm = Hungry(fits, dropout=0.5)
    calm.fits = 8
    plain = make_trainer(calm, micro_batch_size=found)
    plain.fit()
    # Bit for bit: what failed has left nothing behind, in generators, buffers, gradients, meters.
    assert are_equal(weights_of(trainer.model), weights_of(plain.model))
    assert trainer.state.train_metrics == plain.state.train_metrics
    assert trainer.state.clock.batch == 8


def test_a_sample_that_does_not_fit_alone_is_an_error_with_a_way_out() -> None:
    with pytest.raises(OutOfMemoryError, match="A single sample does not fit"):
        make_trainer(Hungry(0), micro_batch_size="auto").fit()


def test_without_auto_the_lack_of_memory_passes() -> None:
    with pytest.raises(RuntimeError) as caught:
        make_trainer(Hungry(4)).fit()
    assert is_out_of_memory(caught.value)


def test_another_error_is_not_taken_for_a_lack_of_memory() -> None:
    def step(model: nn.Module, batch: Any) -> Tensor:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        make_trainer(step=step, micro_batch_size="auto").fit()


@pytest.mark.parametrize("size", [0, -1, 2.5, "all", True])
def test_a_size_that_is_none_is_refused(size: Any) -> None:
    with pytest.raises(ConfigError, match="micro_batch_size"):
        make_trainer(micro_batch_size=size)


@pytest.mark.parametrize("size", [None, 3])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_gradients_computed_anew_are_the_same(size: int | None, precision: str) -> None:
    class Twice(Algorithm):
        events = frozenset({Event.BEFORE_STEP})
        recomputes = True

        def on(self, event: Event, state: State) -> None:
            first = [p.grad.clone() for p in state.model.parameters()]
            losses = dict(state.losses)
            state.recompute_gradients()
            assert state.event is Event.BEFORE_STEP
            assert state.losses.keys() == losses.keys()
            for one, parameter in zip(first, state.model.parameters(), strict=True):
                torch.testing.assert_close(parameter.grad, one, rtol=0, atol=0)

    model = make_model(dropout=0.5)
    model[1] = nn.Identity()
    trainer = make_trainer(
        model,
        algorithms=[Twice()],
        micro_batch_size=size,
        precision=precision,
        train_dataloader=make_loader(shuffle=True),
    )
    trainer.fit()
    plain_model = make_model(dropout=0.5)
    plain_model[1] = nn.Identity()
    plain = make_trainer(
        plain_model,
        micro_batch_size=size,
        precision=precision,
        train_dataloader=make_loader(shuffle=True),
    )
    plain.fit()
    assert are_equal(weights_of(trainer.model), weights_of(plain.model))
    assert trainer.state.train_metrics == plain.state.train_metrics


def test_gradients_are_computed_anew_only_before_a_step() -> None:
    class Late(Algorithm):
        events = frozenset({Event.AFTER_STEP})
        recomputes = True

        def on(self, event: Event, state: State) -> None:
            state.recompute_gradients()

    with pytest.raises(ConfigError, match="only at BEFORE_STEP"):
        make_trainer(algorithms=[Late()]).fit()
