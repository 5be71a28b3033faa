from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler, StepLR
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler

from compressor.errors import ConfigError, DataError, LossError, SurgeryError
from compressor.interfaces.optimizers import NativeSchedulerFactory, SchedulerConfig
from compressor.structure import surgery
from compressor.training import (
    Algorithm,
    Callback,
    DivergedError,
    Duration,
    Event,
    ManualStep,
    State,
    Trainer,
)
from compressor.training.algorithms import LabelSmoothing
from compressor.training.callbacks import History
from compressor.training.loggers import InMemoryLogger
from compressor.training.schedules import warmup_cosine
from tests.training.helpers import (
    accuracy,
    are_equal,
    cross_entropy,
    make_dataset,
    make_loader,
    make_model,
    make_trainer,
    weights_of,
)


class Recording(Callback):
    events = frozenset(Event)

    def __init__(self) -> None:
        self.seen: list[Event] = []
        self.closed = 0

    def on(self, event: Event, state: State) -> None:
        self.seen.append(event)

    def close(self) -> None:
        self.closed += 1


class Acting(Algorithm):
    """Calls a function at one event."""

    def __init__(self, event: Event, act: Any) -> None:
        self.events, self.act = {event}, act

    def on(self, event: Event, state: State) -> None:
        self.act(state)


def test_events_come_as_the_loop_is_drawn() -> None:
    recording = Recording()
    trainer = make_trainer(callbacks=[recording], evaluate=accuracy)
    trainer.fit()
    batch = [
        Event.BATCH_START,
        Event.BEFORE_FORWARD,
        Event.AFTER_FORWARD,
        Event.AFTER_LOSS,
        Event.BEFORE_STEP,
        Event.AFTER_STEP,
        Event.BATCH_END,
    ]
    epoch = [Event.EPOCH_START, *(4 * batch), Event.EPOCH_END]
    evaluation = [Event.EVAL_START, Event.EVAL_END]
    assert recording.seen == [
        Event.SETUP,
        Event.FIT_START,
        *epoch,
        *evaluation,
        *epoch,
        Event.FIT_END,
        *evaluation,
    ]
    assert recording.closed == 1


def test_a_fit_is_the_hand_written_loop() -> None:
    model, by_hand = make_model(), make_model()
    trainer = make_trainer(model, schedulers={"name": "StepLR", "step_size": 1, "gamma": 0.5})
    trainer.fit()
    optimizer = torch.optim.SGD(by_hand.parameters(), lr=0.1)
    for epoch in range(2):
        optimizer.param_groups[0]["lr"] = 0.1 * 0.5**epoch
        for x, y in make_loader():
            optimizer.zero_grad()
            nn.functional.cross_entropy(by_hand(x), y).backward()
            optimizer.step()
    assert are_equal(weights_of(model), weights_of(by_hand))


def test_the_default_schedule_warms_up_and_ends_at_zero() -> None:
    rates: list[float] = []

    def note(state: State) -> None:
        assert state.optimizer is not None
        rates.append(state.optimizer.param_groups[0]["lr"])

    trainer = make_trainer(max_duration="10ep", algorithms=[Acting(Event.BATCH_START, note)])
    trainer.fit()
    assert rates == pytest.approx([0.1 * warmup_cosine(batch / 40) for batch in range(40)])
    assert trainer.optimizer.param_groups[0]["lr"] == 0


def test_training_lowers_the_loss() -> None:
    trainer = make_trainer(max_duration="20ep", evaluate=accuracy)
    before = trainer.eval()["accuracy"]
    trainer.fit()
    assert trainer.state.metrics["accuracy"] > max(0.9, before)
    assert trainer.state.train_metrics["train/loss"] < 0.5


def test_epochs_and_the_same_number_of_batches_are_the_same() -> None:
    epochs, batches = make_trainer(max_duration="2ep"), make_trainer(max_duration="8ba")
    epochs.fit()
    batches.fit()
    assert are_equal(weights_of(epochs.model), weights_of(batches.model))


def test_an_epoch_that_is_cut_short_still_ends() -> None:
    recording = Recording()
    trainer = make_trainer(max_duration="6ba", callbacks=[recording])
    trainer.fit()
    assert recording.seen.count(Event.BATCH_END) == 6
    assert recording.seen.count(Event.EPOCH_END) == 2


def test_a_fit_can_be_made_longer() -> None:
    trainer = make_trainer()
    trainer.fit()
    trainer.fit()  # complete: nothing to do
    assert trainer.state.clock.batch == 8
    trainer.fit("3ba")
    assert trainer.state.clock.batch == 11


def test_evaluations_come_at_their_interval_and_at_the_end() -> None:
    seen: list[int] = []

    def evaluate(model: nn.Module) -> dict[str, float]:
        assert not model.training
        assert not torch.is_grad_enabled()
        seen.append(trainer.state.clock.batch)
        return {"accuracy": 1.0}

    trainer = make_trainer(max_duration="5ep", eval_interval="2ep", evaluate=evaluate)
    trainer.fit()
    assert seen == [8, 16, 20]
    seen.clear()
    trainer = make_trainer(eval_interval="3ba", eval_skip="4ba", evaluate=evaluate)
    trainer.fit()
    assert seen == [6, 8]
    assert trainer.model.training


def test_global_generators_and_modes_are_left_as_they_were() -> None:
    model = make_model(dropout=0.5).eval()
    model[1].train()
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    make_trainer(model, train_dataloader=make_loader(shuffle=True), evaluate=accuracy).fit()
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.random.get_state()[1].tolist() == states[1]
    assert random.getstate() == states[2]
    assert [module.training for module in model] == [False, True, False, False, False]
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


def test_the_seed_decides_and_nothing_else() -> None:
    def train(seed: int, noise: int) -> dict[str, Tensor]:
        with torch.random.fork_rng():
            torch.manual_seed(noise)
            trainer = make_trainer(
                make_model(dropout=0.5), train_dataloader=make_loader(shuffle=True), seed=seed
            )
            trainer.fit()
        return weights_of(trainer.model)

    assert are_equal(train(0, noise=1), train(0, noise=2))
    assert not are_equal(train(0, noise=1), train(1, noise=1))


def test_how_often_is_evaluated_does_not_change_the_training() -> None:
    def evaluate(model: nn.Module) -> dict[str, float]:
        torch.rand(3)
        return {"accuracy": 0.0}

    results = []
    for options in ({}, {"evaluate": evaluate, "eval_interval": "1ba"}):
        trainer = make_trainer(make_model(dropout=0.5), **options)
        trainer.fit()
        results.append(weights_of(trainer.model))
    assert are_equal(*results)


def test_what_a_listener_puts_into_the_state_goes_on() -> None:
    seen: list[Tensor] = []

    def step(model: nn.Module, batch: Any) -> Tensor:
        out = model(batch[0])
        seen.append(out)
        return (out - batch[1].view(-1, 1)).square().mean()

    def zero_inputs(state: State) -> None:
        state.batch = (torch.zeros_like(state.batch[0]), state.batch[1])

    def double_outputs(state: State) -> None:
        state.outputs = 2 * state.outputs
        state.batch = (state.batch[0], torch.full_like(state.batch[1], 7))

    before, after = (
        Acting(Event.BEFORE_FORWARD, zero_inputs),
        Acting(Event.AFTER_FORWARD, double_outputs),
    )
    before.key = "before"
    model = nn.Linear(4, 1)
    trainer = make_trainer(model, step=step, max_duration="1ba", algorithms=[before, after])
    bias = model.bias.detach().clone()
    trainer.fit()
    assert torch.equal(seen[0], bias.expand(8, 1))
    assert torch.equal(seen[1], (2 * bias).expand(8, 1))  # the loss is asked for again
    assert trainer.state.train_metrics["train/loss"] == pytest.approx((2 * bias.item() - 7) ** 2)


def test_the_total_is_the_weighted_sum_of_named_terms() -> None:
    def add(state: State) -> None:
        state.add_loss("size", state.model[0].weight.square().sum(), weight=0.5)  # type: ignore

    trainer = make_trainer(max_duration="1ep", algorithms=[Acting(Event.AFTER_LOSS, add)])
    trainer.fit()
    metrics = trainer.state.train_metrics
    assert metrics["train/total"] == pytest.approx(
        metrics["train/loss"] + 0.5 * metrics["train/size"]
    )


def test_a_second_term_of_one_name_is_refused() -> None:
    add = Acting(Event.AFTER_LOSS, lambda state: state.add_loss("loss", torch.ones(()), 1.0))
    with pytest.raises(LossError, match="already a loss term 'loss'"):
        make_trainer(algorithms=[add]).fit()


def test_a_loss_that_is_no_number_ends_the_fit_before_the_weights_are_touched() -> None:
    count = 0

    def step(model: nn.Module, batch: Any) -> Tensor:
        nonlocal count
        count += 1
        loss = cross_entropy(model, batch)["loss"]
        return loss * float("nan") if count == 6 else loss

    recording = Recording()
    trainer = make_trainer(step=step, callbacks=[recording])
    with pytest.raises(DivergedError, match="nan in epoch 2, batch 2"):
        trainer.fit()
    assert all(torch.isfinite(value).all() for value in trainer.model.state_dict().values())
    assert recording.closed == 1


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (lambda m, b: m(b[0]), r"'loss' has shape \(8, 2\)"),
        (lambda m, b: {"a": m(b[0]).sum(), "b": m(b[0])[0]}, r"'b' has shape \(2,\)"),
        (lambda m, b: m(b[0]).sum().detach(), "does not depend on any parameter"),
        (lambda m, b: {}, "empty dict"),
        (lambda m, b: m(b[0]).sum().item(), "a float"),
    ],
)
def test_a_loss_that_cannot_be_trained_is_refused(step: Any, message: str) -> None:
    with pytest.raises(LossError, match=message):
        make_trainer(step=step).fit()


def test_a_loader_that_one_pass_uses_up_is_refused() -> None:
    with pytest.raises(DataError, match="no batch in epoch 2"):
        make_trainer(train_dataloader=iter(list(make_loader()))).fit()


def test_an_error_of_the_loader_says_where_and_everybody_is_closed() -> None:
    def broken() -> Any:
        yield from list(make_loader())[:2]
        raise OSError("disk gone")

    recording = Recording()
    trainer = make_trainer(train_dataloader=broken(), callbacks=[recording])
    with pytest.raises(DataError, match=r"epoch 1, at batch 3: OSError: disk gone") as caught:
        trainer.fit()
    assert isinstance(caught.value.__cause__, OSError)
    assert recording.closed == 1
    assert trainer.state.batch is None


def test_stop_ends_the_fit_after_the_batch() -> None:
    def stop(state: State) -> None:
        if state.clock.batch == 3:
            state.stop("enough")

    trainer = make_trainer(algorithms=[Acting(Event.BATCH_END, stop)])
    trainer.fit()
    assert trainer.state.clock.batch == 3
    trainer.fit()
    assert trainer.state.clock.batch == 3


class PlateauLike(NativeSchedulerFactory):
    def make(self, native_optimizer: torch.optim.Optimizer) -> LRScheduler:
        return StepLR(native_optimizer, 1, gamma=0.5)


def test_a_schedule_steps_at_its_own_interval() -> None:
    plateau = {"name": "ReduceLROnPlateau", "mode": "max", "patience": 0, "factor": 0.5}
    options = {"evaluate": lambda model: {"accuracy": 0.5}, "eval_key": "accuracy"}
    trainer = make_trainer(max_duration="3ep", schedulers=plateau, **options)
    trainer.fit()
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * 0.5**2)
    trainer = make_trainer(max_duration="3ep", schedulers=PlateauLike())
    trainer.fit()
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * 0.5**3)


def test_optimizer_and_schedule_may_be_objects_or_functions() -> None:
    def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=0.1)

    def make_schedule(optimizer: torch.optim.Optimizer) -> LRScheduler:
        return StepLR(optimizer, 1, gamma=0.5)

    plain = make_trainer(schedulers={"name": "StepLR", "step_size": 1, "gamma": 0.5})
    functions = make_trainer(optimizers=make_optimizer, schedulers=make_schedule)
    model = make_model()
    optimizer = make_optimizer(model)
    objects = make_trainer(model, optimizers=[optimizer], schedulers=make_schedule(optimizer))
    for trainer in (plain, functions, objects):
        trainer.fit()
    assert are_equal(weights_of(plain.model), weights_of(functions.model))
    assert are_equal(weights_of(plain.model), weights_of(objects.model))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizers": 3}, "A int is no optimizer"),
        ({"schedulers": 3}, "A int is no scheduler"),
        ({"optimizers": [{"name": "SGD"}, {"name": "SGD"}]}, "2 optimizers were given"),
        (
            {"schedulers": StepLR(torch.optim.SGD(make_model().parameters(), lr=0.1), 1)},
            "schedules another optimizer",
        ),
    ],
)
def test_what_is_no_optimizer_or_schedule_is_refused(options: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_trainer(**options)


def test_a_schedule_of_the_metric_without_a_metric_is_refused() -> None:
    with pytest.raises(ConfigError, match="steps with the metric"):
        make_trainer(schedulers={"name": "ReduceLROnPlateau"})


def test_setup_may_replace_parameters_and_the_optimizer_has_the_new_ones() -> None:
    def widen(state: State) -> None:
        state.model[4] = nn.Linear(8, 2)  # type: ignore[index,operator]

    trainer = make_trainer(algorithms=[Acting(Event.SETUP, widen)])
    before = weights_of(trainer.model)
    trainer.fit()
    assert not torch.equal(before["4.weight"], trainer.model.state_dict()["4.weight"])


def test_an_optimizer_of_other_parameters_is_refused() -> None:
    optimizer = torch.optim.SGD(make_model().parameters(), lr=0.1)
    with pytest.raises(SurgeryError, match=r"shape \(8, 4\)"):
        make_trainer(optimizers=optimizer)


def test_mixed_precision_computes_in_bfloat16_and_keeps_weights_in_float32() -> None:
    seen = []

    def step(model: nn.Module, batch: Any) -> dict[str, Tensor]:
        outputs = model(batch[0])
        seen.append(outputs.dtype)
        return {"loss": nn.functional.cross_entropy(outputs, batch[1])}

    trainer = make_trainer(step=step, precision="bf16", max_duration="20ep", evaluate=accuracy)
    trainer.fit()
    assert set(seen) == {torch.bfloat16}
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    assert trainer.state.metrics["accuracy"] > 0.9


def test_a_step_that_overflows_in_fp16_is_skipped_and_seen() -> None:
    skipped: list[bool] = []

    def step(model: nn.Module, batch: Any) -> Tensor:
        loss = cross_entropy(model, batch)["loss"]
        # The loss is finite; times the scale of 65536, its gradient is not.
        return loss * (1e36 if trainer.state.clock.batch == 1 else 1.0)

    note = Acting(Event.AFTER_STEP, lambda state: skipped.append(state.step_skipped))
    trainer = make_trainer(
        step=step,
        precision="fp16",
        max_duration="3ba",
        algorithms=[note],
        schedulers=SchedulerConfig({"name": "StepLR", "step_size": 1, "gamma": 0.5}, "iteration"),
    )
    trainer.fit()
    assert skipped == [False, True, False]
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * 0.5**2)
    assert all(torch.isfinite(value).all() for value in trainer.model.state_dict().values())


def test_gradients_are_unscaled_before_they_are_shown() -> None:
    def gradient(precision: str) -> Tensor:
        seen: list[Tensor] = []
        note = Acting(
            Event.BEFORE_STEP, lambda state: seen.append(state.model[4].weight.grad.clone())
        )
        make_trainer(precision=precision, max_duration="1ba", algorithms=[note]).fit()
        return seen[0]

    # 1e-2: half precision has 11 bits
    torch.testing.assert_close(gradient("fp16"), gradient("fp32"), rtol=1e-2, atol=1e-3)


def test_an_unknown_precision_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"'bf61'\. Did you mean 'bf16'"):
        make_trainer(precision="bf61")


def test_a_loss_that_is_asked_for_again_sees_the_model_itself() -> None:
    def step(model: nn.Module, batch: Any) -> dict[str, Tensor]:
        layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
        decay = sum(layer.weight.square().sum() for layer in layers)
        return {**cross_entropy(model, batch), "decay": decay + model[4].bias.sum()}

    plain, smoothed = make_trainer(step=step), make_trainer(step=step)
    smoothed = make_trainer(step=step, algorithms=[LabelSmoothing(0.0)])
    for trainer in (plain, smoothed):
        trainer.fit("1ba")
    assert smoothed.state.train_metrics["train/decay"] == pytest.approx(
        plain.state.train_metrics["train/decay"]
    )
    assert "forward" not in vars(smoothed.model)


def test_a_batch_sampler_is_told_the_epoch() -> None:
    sampler: Any = DistributedSampler(make_dataset(), num_replicas=1, rank=0)
    batch_sampler = BatchSampler(sampler, 8, drop_last=False)
    loader: Any = DataLoader(make_dataset(), batch_sampler=batch_sampler)
    seen: list[float] = []
    note = Acting(Event.BATCH_START, lambda state: seen.append(state.batch[0].sum().item()))
    make_trainer(train_dataloader=loader, algorithms=[note]).fit()
    assert seen[:4] != seen[4:]


def test_a_term_that_is_added_and_no_scalar_names_itself() -> None:
    add = Acting(Event.AFTER_LOSS, lambda s: s.add_loss("pen", torch.ones(4), weight=0.1))
    with pytest.raises(LossError, match=r"'pen': \(4,\).*Each must be a scalar"):
        make_trainer(algorithms=[add]).fit()


def test_an_optimizer_that_wants_a_closure_is_refused() -> None:
    with pytest.raises(ConfigError, match="LBFGS wants to compute the loss itself"):
        make_trainer(optimizers={"name": "LBFGS"})


@pytest.mark.parametrize(
    "options",
    [
        {"optimizers": {"name": "SGD"}},
        {"schedulers": {"name": "StepLR"}},
        {"micro_batch_size": 4},
        {"precision": "bf16"},
        {"compile": True},
    ],
    ids=str,
)
def test_what_a_manual_step_does_itself_is_refused(options: Any) -> None:
    with pytest.raises(ConfigError, match=f"so {next(iter(options))} would do nothing"):
        Trainer(make_model(), ManualStep(lambda batch: {}), **options)


def test_a_parameter_exchanged_behind_the_optimizer_is_noticed_at_the_next_fit() -> None:
    trainer = make_trainer()
    trainer.fit()
    trainer.model[4] = nn.Linear(8, 2)  # type: ignore[operator]
    with pytest.raises(SurgeryError, match="exchanged since the trainer was made"):
        trainer.fit("1ep")


@pytest.mark.parametrize("event", [Event.EVAL_END, Event.CHECKPOINT, Event.AFTER_LOSS])
def test_an_edit_at_the_wrong_moment_is_refused(event: Event, tmp_path: Any) -> None:
    def edit(state: State) -> None:
        state.edit(lambda model: surgery.replace(model, "2", nn.GELU()))

    trainer = make_trainer(algorithms=[Acting(event, edit)], evaluate=accuracy, save_dir=tmp_path)
    with pytest.raises(SurgeryError, match=f"at {event.name}"):
        trainer.fit()


def test_an_edit_that_returns_nothing_says_what_to_return() -> None:
    with pytest.raises(SurgeryError, match="Return what surgery returned"):
        make_trainer().state.edit(lambda model: None)  # type: ignore[arg-type,return-value]


def test_an_optimizer_of_your_own_keeps_its_rate() -> None:
    model = make_model()
    trainer = make_trainer(model, optimizers=torch.optim.SGD(model.parameters(), lr=0.1))
    rates: list[float] = []
    trainer.state.optimizer.register_step_pre_hook(
        lambda optimizer, *_: rates.append(optimizer.param_groups[0]["lr"])
    )
    trainer.fit()
    assert rates == 8 * [0.1]


def test_the_first_batch_of_a_further_fit_is_not_wasted() -> None:
    rates: list[float] = []
    note = Acting(
        Event.BATCH_START, lambda state: rates.append(state.optimizer.param_groups[0]["lr"])
    )
    trainer = make_trainer(algorithms=[note])
    trainer.fit()
    trainer.fit("2ep")
    assert rates[8] == pytest.approx(0.1 * warmup_cosine(0.5))


def test_a_logger_among_the_callbacks_is_told_too() -> None:
    logger = InMemoryLogger()
    make_trainer(callbacks=[logger]).fit()
    assert logger.get("train/loss")[0] == [4, 8]
    with pytest.raises(ConfigError, match="History in loggers is no Logger"):
        make_trainer(loggers=[History()])


def test_a_loop_of_your_own_knows_how_far_it_is() -> None:
    state = State(make_model(), Duration(2, "ep"), train_dataloader=make_loader())  # type: ignore
    fractions = []
    for _ in range(2):
        for batch in make_loader():
            state.clock.advance(len(batch[1]))
            fractions.append(state.fraction)
        state.clock.end_epoch()
    assert fractions == [n / 8 for n in range(1, 9)]
    assert state.is_finished
    with pytest.raises(ConfigError, match="no unit 'epoch'"):
        Duration(2, "epoch")  # type: ignore[arg-type]
