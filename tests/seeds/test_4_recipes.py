"""The samples of document 4 up to a recipe that calls another: its code blocks 1 to 9."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

import compressor.training.recipes as tcr
from compressor.training.loggers import InMemoryLogger
from tests.seeds.digits import make_loader, make_test_loader
from tests.seeds.recipe_helpers import (
    Noted,
    assert_same_weights,
    loss_of,
    make_model,
    make_optimizer,
    make_small_model,
    train_by_hand,
)

N_EPOCHS = 3
NUMBERS = [torch.full((2,), float(number)) for number in range(4)]


# Block 1
def test_a_recipe_is_a_loop_over_epochs_and_batches() -> None:
    processed: list[int] = []
    expected: list[int] = []

    def process_batch(batch: Tensor) -> None:
        processed.append(int(batch[0]))

    train_loader = NUMBERS
    for _epoch in range(N_EPOCHS):
        for batch in train_loader:
            expected.append(int(batch[0]))

    tcr.recipe(process_batch, train_loader).run(N_EPOCHS)
    assert processed == expected


# Block 2
def test_there_are_four_places_to_do_something() -> None:
    done: list[str] = []

    class Chores:
        def on_epoch_start(self, state: dict[str, Any]) -> None:
            done.append("prepare for new epoch")

        def on_batch_start(self, state: dict[str, Any]) -> None:
            done.append("zero the gradients")

        def on_batch_end(self, state: dict[str, Any]) -> None:
            done.append(f"step with {state['stuff']}")

        def on_epoch_end(self, state: dict[str, Any]) -> None:
            done.append("compute overall epoch metrics")

    def process_batch(batch: Tensor) -> dict[str, Any]:
        done.append("process")
        return {"stuff": int(batch[0])}

    train_loader = NUMBERS[:2]
    recipe = tcr.recipe(process_batch, train_loader)
    recipe.callbacks.add_callbacks([Chores()])
    recipe.run(N_EPOCHS)

    expected: list[str] = []
    for _epoch in range(N_EPOCHS):
        expected += ["prepare for new epoch"]
        for batch in train_loader:
            expected += ["zero the gradients"]
            expected += ["process"]
            expected += [f"step with {int(batch[0])}"]
        expected += ["compute overall epoch metrics"]
    assert done == expected


class PlainCallbacks:
    """Just enough for block 3: callbacks that are called with a shared dict."""

    def __init__(self, callbacks: list[Any]) -> None:
        self.state: dict[str, Any] = {}
        self.each = callbacks

    def __call__(self, name: str) -> None:
        for callback in self.each:
            getattr(callback, name)(self.state)

    def update_state(self, values: dict[str, Any]) -> None:
        self.state.update(values)


class PlainRecipe:
    """Block 3 itself."""

    def __init__(self, call_fun: Callable[[Any], dict[str, Any]], loader: Any, watch: Any) -> None:
        self.call_fun = call_fun
        self.loader = loader
        self.callbacks = PlainCallbacks([watch])

    def run(self, epochs: int) -> dict[str, Any]:
        for _epoch in range(epochs):
            self.callbacks("on_epoch_start")
            for batch in self.loader:
                # There is one "batch" here, and it is on the device of the recipe.
                batch = batch.to("cpu", non_blocking=True)
                self.callbacks.update_state({"batch": batch})

                self.callbacks("on_batch_start")
                out = self.call_fun(batch)
                self.callbacks.update_state(out)
                self.callbacks("on_batch_end")
            self.callbacks("on_epoch_end")
        return self.callbacks.state


class Watch:
    """What is in the state at each hook."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, Any, Any]] = []

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("on_"):
            raise AttributeError(name)
        return lambda state: self.seen.append(
            (name, state["batch"].sum().item() if "batch_" in name else None, state.get("double"))
        )

    def __dir__(self) -> list[str]:
        return ["on_epoch_start", "on_batch_start", "on_batch_end", "on_epoch_end"]


# Block 3
def test_a_recipe_calls_its_hooks_as_this_loop_does() -> None:
    def double(batch: Tensor) -> dict[str, Any]:
        return {"double": 2 * batch.sum().item()}

    expected, watch = Watch(), Watch()
    plain = PlainRecipe(double, NUMBERS, expected).run(2)
    recipe = tcr.recipe(double, NUMBERS)
    recipe.callbacks.add_callbacks([watch])
    state = recipe.run(2)
    assert watch.seen == expected.seen
    assert len(watch.seen) == 2 * (2 + 2 * len(NUMBERS))
    assert state["double"] == plain["double"]


# Block 4
@pytest.mark.slow
def test_a_forward_pass_that_does_everything() -> None:
    # Let's initialize the model, dataloader, and optimizer
    model = make_model()
    data_loader = make_loader()
    opt = make_optimizer(model)
    losses = []

    # define a training pass
    def forward_pass(batch: Any) -> dict[str, Any]:
        x, y = batch

        opt.zero_grad()
        pred = model(x)
        loss = nn.functional.cross_entropy(pred, y)
        loss.backward()
        opt.step()

        losses.append(loss.item())
        # For now, just return an empty dict
        return {}

    # build our recipe
    recipe = tcr.recipe(forward_pass, data_loader)
    recipe.run(5)

    by_hand = make_model()
    assert losses == train_by_hand(by_hand, data_loader, 5)
    assert_same_weights(model, by_hand)
    assert losses[-1] < losses[0]


# Block 5
@pytest.mark.slow
def test_what_is_registered_is_saved_and_moved() -> None:
    # notice that we don't move the model to a device
    model = torchvision.models.resnet18(num_classes=10)
    data_loader = make_loader()
    devices = set()

    def forward_pass(batch: Any) -> dict[str, Any]:
        devices.update({batch[0].device.type, model(batch[0]).device.type})
        return {}

    recipe = tcr.recipe(forward_pass, data_loader)
    # register the model
    recipe.register("model", model)
    # 1) recipe.model now exists
    assert recipe.model is model
    # 2) recipe.state_dict() includes the model's state_dict
    saved = recipe.state_dict()["registered"]["model"]
    assert torch.equal(saved["fc.weight"], model.fc.weight)

    # 3) moving the recipe moves the model, and the batches; recipe.cuda() does it with a GPU
    recipe.to("meta")
    assert {p.device.type for p in model.parameters()} == {"meta"}
    recipe.run(5)
    assert devices == {"meta"}


# There's a better one in the library, you'll actually never do that.
class OptimizerCallback:
    def __init__(self, opt: torch.optim.Optimizer) -> None:
        self.opt = opt

    def on_batch_start(self, state: dict[str, Any]) -> None:
        self.opt.zero_grad()

    def on_batch_end(self, state: dict[str, Any]) -> None:
        self.opt.step()


# Block 6
@pytest.mark.slow
def test_an_optimizer_can_be_a_callback() -> None:
    model, data_loader = make_model(), make_loader()
    opt = make_optimizer(model)

    def forward_pass(batch: Any) -> dict[str, Any]:
        x, y = batch
        pred = model(x)
        loss = nn.functional.cross_entropy(pred, y)
        loss.backward()
        return {}

    recipe = tcr.recipe(forward_pass, data_loader)
    # there's something new here!
    recipe.callbacks.add_callbacks([OptimizerCallback(opt)])
    recipe.cpu()
    recipe.run(5)

    by_hand = make_model()
    train_by_hand(by_hand, data_loader, 5)
    assert_same_weights(model, by_hand)


def make_forward_pass(model: nn.Module) -> Callable[[Any], Any]:
    """That of block 7."""

    def forward_pass(batch: Any) -> dict[str, Any]:
        x, y = batch
        pred = model(x)
        loss = nn.functional.cross_entropy(pred, y)
        loss.backward()
        return {"loss": loss}

    return forward_pass


def make_test_pass(model: nn.Module, noted: Noted) -> Callable[[Any], Any]:
    """That of block 8, which sees to the mode by itself."""

    def test_pass(batch: Any) -> dict[str, Any]:
        x, y = batch
        with torch.no_grad():
            model.eval()
            pred = model(x)
            loss = nn.functional.cross_entropy(pred, y)
            # no backward in testing
            noted(model, loss)
            model.train()
        return {"loss": loss}

    return test_pass


# Block 7; there is no Counter: the recipe itself counts. ToLogger, with any of the package's
# loggers, stands for the plots on a server.
def test_callbacks_average_and_tell_what_the_pass_returned(
    capsys: pytest.CaptureFixture[str],
) -> None:
    model, data_loader, noted = make_small_model(), make_loader(batch_size=4), Noted()
    opt = make_optimizer(model)
    logger = InMemoryLogger()

    def forward_pass(batch: Any) -> dict[str, Any]:
        x, y = batch
        pred = model(x)
        loss = nn.functional.cross_entropy(pred, y)
        loss.backward()
        noted(model, loss)
        return {"loss": loss}

    recipe = tcr.recipe(forward_pass, data_loader)
    # there's something new here!
    recipe.callbacks.add_callbacks(
        [
            tcr.Optimizer(opt),
            tcr.EpochMetricAvg("loss", post_each_batch=True),
            tcr.StdoutLogger(log_every=10),
            tcr.ToLogger(logger, log_every=10),
        ]
    )
    recipe.cpu()
    state = recipe.run(5)

    losses = noted.losses
    assert losses == train_by_hand(make_small_model(), data_loader, 5)
    assert state["metrics"]["loss"] == pytest.approx(sum(losses[16:]) / 4)
    # Every tenth batch, and each epoch's last: there the average is whole.
    steps, values = logger.get("loss")
    assert steps == [4, 8, 10, 12, 16, 20]
    assert values[2] == pytest.approx(sum(losses[8:10]) / 2)
    assert values[3] == pytest.approx(sum(losses[8:12]) / 4)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(steps)
    assert lines[2] == f"epoch 2, batch 10: loss {values[2]:.4g}"
    assert (state["epoch"], state["iters"]) == (5, 20)


# Block 8
def test_a_test_is_a_recipe_too(capsys: pytest.CaptureFixture[str]) -> None:
    model, test_loader, noted = make_small_model(), make_test_loader(), Noted()
    logger = InMemoryLogger()

    # we have a test set now
    test_recipe = tcr.recipe(make_test_pass(model, noted), test_loader)
    test_recipe.callbacks.add_callbacks(
        [
            tcr.EpochMetricAvg("loss", post_each_batch=False),
            tcr.StdoutLogger(log_every=-1, prefix="Test"),
            tcr.ToLogger(logger, log_every=-1, prefix="Test"),
        ]
    )

    loss = test_recipe.run(1)["metrics"]["loss"]
    assert loss == pytest.approx(loss_of(model, test_loader))  # 8 and 4 samples: by sample
    assert noted.modes == {(False, False)}
    assert model.training
    assert capsys.readouterr().out == f"Test epoch 1, batch 2: loss {loss:.4g}\n"
    assert logger.get("Test/loss") == ([2], [loss])


class AtTests:
    """The loss of the test data where a test is due, by the model as it is then."""

    def __init__(self, model: nn.Module, loader: Any, run_every: int) -> None:
        self.model = model
        self.loader = loader
        self.run_every = run_every
        self.losses: list[float] = []

    def on_batch_end(self, state: dict[str, Any]) -> None:
        if state["iters"] % self.run_every == 0:
            self.losses.append(loss_of(self.model, self.loader))

    def on_epoch_end(self, state: dict[str, Any]) -> None:
        if state["iters"] % self.run_every:
            self.losses.append(loss_of(self.model, self.loader))


# Block 9
def test_a_recipe_calls_the_one_that_tests() -> None:
    model, data_loader, test_loader = make_small_model(), make_loader(), make_test_loader()
    noted = Noted()
    test_recipe = tcr.recipe(make_test_pass(model, noted), test_loader)
    test_recipe.callbacks.add_callbacks([tcr.EpochMetricAvg("loss", post_each_batch=False)])
    recipe = tcr.recipe(make_forward_pass(model), data_loader)
    recipe.register("model", model)
    recipe.callbacks.add_callbacks([tcr.Optimizer(make_optimizer(model))])
    due = AtTests(model, test_loader, run_every=3)
    recipe.callbacks.add_callbacks([due])

    # Now the training recipe is aware of the testing recipe and handles moving
    # from devices to devices and serialization through `state_dict()`
    recipe.register("testing", test_recipe)
    recipe.callbacks.add_callbacks([tcr.CallRecipe(test_recipe, run_every=3, prefix="test")])
    logger = InMemoryLogger()
    recipe.callbacks.add_callbacks([tcr.ToLogger(logger, log_every=1)])

    state = recipe.run(3)
    # Of 2 batches an epoch every third, and the last of each epoch.
    assert recipe.testing.state["epoch"] == len(due.losses) == 4
    assert state["metrics"]["test/loss"] == pytest.approx(due.losses[-1])
    assert "testing" in recipe.state_dict()["registered"]
    recipe.to("meta")
    assert test_recipe.trainer.state.device == torch.device("meta")
