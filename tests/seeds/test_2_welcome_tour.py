"""The samples of document 2, from a loop to events that methods hang on: its code blocks 1 to 5."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim
from torch.nn import functional as F

from compressor import Algorithm, Callback, Event, EventEngine, State, TaskModel, Trainer
from compressor import functional as cf
from compressor.functional import mixup_batch
from compressor.training import Duration
from compressor.training.algorithms import MixUp as LibraryMixUp
from compressor.training.clock import Unit
from tests.seeds.digits import make_loader

NUM_EPOCHS = 3
ALPHA = 0.2


class Net(nn.Module):
    """Has its loss beside `forward`, both of inputs and targets."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.layers = nn.Sequential(nn.Flatten(), nn.Linear(192, 10))

    def forward(self, inputs: Tensor) -> Tensor:
        scores: Tensor = self.layers(inputs)
        return scores

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs, targets)


class Task(TaskModel):
    """The same network, as the trainer wants it."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Net()

    def forward(self, batch: Any) -> Tensor:
        scores: Tensor = self.model(batch[0])
        return scores

    def loss(self, outputs: Tensor, batch: Any) -> Tensor:
        return self.model.loss(outputs, batch[1])


def make_optimizer(model: nn.Module) -> optim.Optimizer:
    return optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def make_trainer(task: TaskModel, **options: Any) -> Trainer:
    return Trainer(
        task,
        train_dataloader=make_loader(),
        optimizers=make_optimizer(task),
        # Without this the learning rate would rise and fall: that is the trainer's default.
        schedulers={"name": "ConstantLR", "factor": 1.0},
        max_duration=NUM_EPOCHS,
        **options,
    )


def assert_same_weights(a: nn.Module, b: nn.Module) -> None:
    for mine, theirs in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)


# Block 1
def test_the_trainer_is_this_loop() -> None:
    model, dataloader = Net(), make_loader()
    optimizer = make_optimizer(model)

    for _epoch in range(NUM_EPOCHS):
        for inputs, targets in dataloader:
            outputs = model.forward(inputs)
            loss = model.loss(outputs, targets)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    task = Task()
    make_trainer(task).fit()
    assert_same_weights(task, model)


def fit_with_mixup_by_hand() -> tuple[Net, list[tuple[Tensor, Tensor]]]:
    """Block 2, and of every batch its loss and what that must be."""
    model, dataloader = Net(), make_loader()
    optimizer = make_optimizer(model)
    losses: list[tuple[Tensor, Tensor]] = []

    for _epoch in range(NUM_EPOCHS):
        for inputs, targets in dataloader:
            inputs, targets_perm, mixing = cf.mixup_batch(inputs, targets, alpha=ALPHA)
            outputs = model.forward(inputs)
            loss = (1 - mixing) * model.loss(outputs, targets) + mixing * model.loss(
                outputs, targets_perm
            )
            losses.append((loss.detach(), mixed_loss(outputs, targets, targets_perm, mixing)))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return model, losses


def mixed_loss(outputs: Tensor, targets: Tensor, permuted: Tensor, mixing: float) -> Tensor:
    """The cross entropy of the mixed targets, which is what mixing two losses amounts to."""
    eye = torch.eye(10)
    soft = (1 - mixing) * eye[targets] + mixing * eye[permuted]
    return -(soft * outputs.detach().log_softmax(1)).sum(1).mean()


# Block 2
def test_mixup_can_be_written_into_the_loop() -> None:
    _, losses = fit_with_mixup_by_hand()
    for loss, expected in losses:
        torch.testing.assert_close(loss, expected)
    assert losses[-1][0] < losses[0][0] - 0.5


class Witness(Callback):
    """Notes each event, and what there is at that moment."""

    events = frozenset(Event)

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.weights: list[Tensor] = []

    def on(self, event: Event, state: State) -> None:
        self.seen.append(event.name)
        weight = next(state.model.parameters())
        if event is Event.SETUP:
            assert state.optimizer is None or not state.optimizer.state
        if event is Event.BATCH_START:
            assert state.batch[0].shape == (8, 3, 8, 8)
            self.weights.append(weight.detach().clone())
        if event is Event.AFTER_FORWARD:
            assert state.outputs.shape == (8, 10)
        if event is Event.AFTER_LOSS:
            assert weight.grad is None
            torch.testing.assert_close(state.loss, F.cross_entropy(state.outputs, state.batch[1]))
        if event is Event.BEFORE_STEP:
            assert weight.grad is not None
            assert torch.equal(weight, self.weights[-1])
        if event is Event.AFTER_STEP:
            assert not torch.equal(weight, self.weights[-1])
            assert state.clock.batch == len(self.weights) - 1
        if event is Event.BATCH_END:
            assert state.clock.batch == len(self.weights)


# Block 3; there are no events around the loader and around backward, which BATCH_START,
# AFTER_LOSS and BEFORE_STEP are next to, and no BEFORE_LOSS: AFTER_FORWARD is the same moment.
def test_events_come_in_the_order_of_the_loop() -> None:
    witness = Witness()
    make_trainer(Task(), callbacks=[witness]).fit()

    events = ["SETUP", "FIT_START"]
    for _epoch in range(NUM_EPOCHS):
        events += ["EPOCH_START"]
        for _batch in make_loader():
            events += ["BATCH_START"]
            events += ["BEFORE_FORWARD"]  # outputs = model.forward(inputs)
            events += ["AFTER_FORWARD"]  # loss = model.loss(outputs, targets)
            events += ["AFTER_LOSS"]  # loss.backward()
            events += ["BEFORE_STEP"]  # optimizer.step()
            events += ["AFTER_STEP"]
            events += ["BATCH_END"]
        events += ["EPOCH_END"]
    events += ["FIT_END"]
    assert witness.seen == events


class MixUp(Algorithm):
    permuted_target: Tensor
    mixing: float

    def match(self, event: Event, state: State) -> bool:
        """Determines whether the algorithm should run on a given event."""
        # BEFORE_FORWARD: there a batch and what is computed of it are of one micro-batch.
        return event in [Event.BEFORE_FORWARD, Event.AFTER_LOSS]

    def apply(self, event: Event, state: State, logger: Any) -> None:
        """Run the algorithm by modifying the State."""
        input, target = state.batch

        if event == Event.BEFORE_FORWARD:
            new_input, self.permuted_target, self.mixing = mixup_batch(input, target, alpha=ALPHA)
            state.batch = (new_input, target)

        if event == Event.AFTER_LOSS:
            modified_batch = (input, self.permuted_target)
            new_loss = state.model.loss(state.outputs, modified_batch)
            # Not `state.loss *= ...`, which would scale the tensor that is a named term in place.
            state.loss = state.loss * (1 - self.mixing)
            state.loss = state.loss + self.mixing * new_loss


class LossWitness(Callback):
    """Sees the loss after the algorithms."""

    events = frozenset({Event.AFTER_LOSS})

    def __init__(self, mixup: MixUp) -> None:
        self.mixup = mixup
        self.shares: list[float] = []

    def on(self, event: Event, state: State) -> None:
        _, targets = state.batch
        permuted, mixing = self.mixup.permuted_target, self.mixup.mixing
        torch.testing.assert_close(
            state.loss.detach(), mixed_loss(state.outputs, targets, permuted, mixing)
        )
        self.shares.append(mixing)


# Block 4
@pytest.mark.parametrize("micro_batch_size", [None, 4])
def test_mixup_as_match_and_apply_trains_on_mixed_losses(micro_batch_size: int | None) -> None:
    mixup, built_in, plain = MixUp(), Task(), Task()
    witness, task = LossWitness(mixup), Task()
    options: dict[str, Any] = {"micro_batch_size": micro_batch_size}
    make_trainer(task, algorithms=[mixup], callbacks=[witness], **options).fit()
    assert len(witness.shares) == NUM_EPOCHS * 2 * (2 if micro_batch_size else 1)
    assert max(witness.shares) > 0.05
    # The library's own draws the same numbers.
    make_trainer(built_in, algorithms=[LibraryMixUp(ALPHA)], **options).fit()
    assert_same_weights(task, built_in)
    make_trainer(plain, **options).fit()
    assert not torch.allclose(next(task.parameters()), next(plain.parameters()))


# Block 5
@pytest.mark.parametrize("algorithm", [MixUp(), LibraryMixUp(ALPHA, interpolate_loss=True)])
def test_the_events_run_in_a_loop_of_ones_own(algorithm: Algorithm) -> None:
    by_hand, _ = fit_with_mixup_by_hand()
    torch.manual_seed(0)  # both loops draw from the global generator
    your_model, your_dataloader = Task(), make_loader()

    state = State(
        model=your_model,
        max_duration=Duration(NUM_EPOCHS, Unit.EPOCH),  # or "3ep"
        seed=0,
        train_dataloader=your_dataloader,
        optimizer=make_optimizer(your_model),
    )
    # A schedule is a scheduler and when it steps; in one's own loop the scheduler is enough.
    scheduler = optim.lr_scheduler.ConstantLR(state.optimizer, factor=1.0)

    engine = EventEngine(state=state, algorithms=[algorithm])

    engine.run_event("setup")
    engine.run_event("fit_start")
    for _epoch in range(NUM_EPOCHS):
        engine.run_event("epoch_start")
        for state.batch in your_dataloader:  # inputs and targets are one batch here
            engine.run_event("batch_start")

            engine.run_event("before_forward")
            state.outputs = state.model.forward(state.batch)
            engine.run_event("after_forward")

            state.loss = state.model.loss(state.outputs, state.batch)
            engine.run_event("after_loss")

            state.loss.backward()
            engine.run_event("before_step")

            state.optimizer.step()
            state.optimizer.zero_grad()
            scheduler.step()
            engine.run_event("after_step")

            state.clock.advance(len(state.batch[0]))  # what tells algorithms how far it is
            engine.run_event("batch_end")
        state.clock.end_epoch()
        engine.run_event("epoch_end")

    assert_same_weights(your_model, by_hand)
    assert state.fraction == 1
