from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compressor.errors import CheckpointError, ConfigError, DataError
from compressor.training.checkpoint import read_checkpoint
from compressor.training.recipes import EpochMetricAvg, Optimizer, Recipe, recipe
from tests.training.helpers import are_equal, make_loader, make_model, make_trainer, weights_of
from tests.training.recipes.helpers import After, Spy, is_same, make_recipe, make_step

BATCHES = [torch.full((2,), float(number)) for number in range(3)]


def test_a_recipe_trains_as_the_loop_written_by_hand() -> None:
    model, by_hand = make_model(), make_model()
    make_recipe(model).run(3)
    opt = torch.optim.SGD(by_hand.parameters(), lr=0.1, momentum=0.9)
    for _ in range(3):
        for x, y in make_loader():
            opt.zero_grad()
            nn.functional.cross_entropy(by_hand(x), y).backward()
            opt.step()
    assert are_equal(weights_of(model), weights_of(by_hand))


def test_hooks_are_called_around_batches_and_epochs() -> None:
    spy = Spy(lambda state: (state["epoch"], state["iters"], state["epoch_batch"]))
    loop = recipe(lambda batch: None, BATCHES[:2])
    loop.callbacks.add_callbacks([spy])
    loop.run(2)
    assert spy.seen == [
        ("epoch_start", (0, 0, 0)),
        ("batch_start", (0, 0, 0)),
        ("batch_end", (0, 1, 1)),
        ("batch_start", (0, 1, 1)),
        ("batch_end", (0, 2, 2)),
        ("epoch_end", (1, 2, 0)),
        ("epoch_start", (1, 2, 0)),
        ("batch_start", (1, 2, 0)),
        ("batch_end", (1, 3, 1)),
        ("batch_start", (1, 3, 1)),
        ("batch_end", (1, 4, 2)),
        ("epoch_end", (2, 4, 0)),
    ]


def test_the_state_has_the_batch_and_what_the_step_returned() -> None:
    seen = []
    loop = recipe(lambda batch: {"double": 2 * batch}, BATCHES)
    loop.callbacks.add_callbacks(
        [After(lambda state: seen.append((state["batch"], state["double"])))]
    )
    state = loop.run(1)
    assert is_same(seen, [(batch, 2 * batch) for batch in BATCHES])
    assert state is loop.state


def test_tensors_that_the_step_returned_are_gone_when_a_run_ends() -> None:
    returned = {"pred": torch.ones(2, 3), "all": [{"map": torch.ones(2)}], "loss": torch.ones(())}
    loop = recipe(lambda batch: {**returned, "note": [1, "a"]}, BATCHES)
    loop.state["mine"] = torch.ones(2)
    seen: list[int] = []
    loop.callbacks.add_callback(After(lambda state: seen.append(len(state["pred"]))))
    state = loop.run(1)
    assert seen == [2, 2, 2]
    assert not {"pred", "all"} & state.keys()
    assert (state["loss"], state["note"]) == (1, [1, "a"])
    assert len(state["mine"]) == 2


def test_a_recipe_is_made_by_its_class_too() -> None:
    assert Recipe(lambda batch: None, BATCHES).run(1)["iters"] == 3
    with pytest.raises(ConfigError, match="Give save_dir"):
        Recipe(lambda batch: None, BATCHES, autoresume=True)


def test_an_unknown_option_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"recipe has no option 'devise'\. Did you mean 'device'"):
        recipe(lambda batch: None, BATCHES, devise="cpu")  # type: ignore[call-arg]


def test_a_callback_may_replace_the_batch() -> None:
    class Negate:
        def on_batch_start(self, state: dict[str, Any]) -> None:
            state["batch"] = -state["batch"]

    seen: list[Tensor] = []
    loop = recipe(lambda batch: seen.append(batch), BATCHES)
    loop.callbacks.add_callbacks([Negate()])
    loop.run(1)
    assert is_same(seen, [-batch for batch in BATCHES])


def test_the_graph_is_not_kept_by_the_state() -> None:
    model = nn.Linear(2, 1)
    loop = recipe(lambda batch: {"loss": model(batch).sum(), "all": [model(batch)]}, BATCHES)
    wants: list[bool] = []
    loop.callbacks.add_callback(After(lambda state: wants.append(state["all"][0].requires_grad)))
    state = loop.run(1)
    assert not state["loss"].requires_grad
    assert not any(wants)
    assert state["batch"] is None


def test_run_counts_epochs_in_all() -> None:
    loop = recipe(lambda batch: None, BATCHES)
    assert loop.run(2)["epoch"] == 2
    assert loop.run(5)["iters"] == 15
    assert loop.run(3)["iters"] == 15


def test_two_runs_are_one_long_run() -> None:
    long, short = make_model(dropout=0.5), make_model(dropout=0.5)
    make_recipe(long).run(4)
    loop = make_recipe(short)
    loop.run(1)
    loop.run(4)
    assert are_equal(weights_of(long), weights_of(short))


def test_the_callers_generators_are_left_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    make_recipe(make_model(dropout=0.5), loader=make_loader(shuffle=True)).run(1)
    assert torch.equal(torch.rand(3), expected)


def test_what_is_registered_is_an_attribute() -> None:
    loop, model = recipe(lambda batch: None, BATCHES), make_model()
    loop.register("model", model)
    loop.register("best", 0.5)
    assert loop.model is model
    assert loop.best == 0.5
    loop.best = 0.75
    assert loop.best == 0.75
    assert loop.state_dict()["registered"]["best"] == 0.75


def test_an_attribute_that_is_not_registered_is_refused() -> None:
    loop = recipe(lambda batch: None, BATCHES)
    with pytest.raises(AttributeError, match="Call register\\('best'"):
        loop.best = 1
    with pytest.raises(AttributeError, match="no attribute 'best'"):
        _ = loop.best


def test_a_name_is_registered_once_and_then_assigned() -> None:
    loop, model = recipe(lambda batch: None, BATCHES), make_model()
    loop.register("model", model)
    loop.register("model", model)  # says nothing new
    with pytest.raises(ConfigError, match=r"registered as 'model'.*recipe\.model = "):
        loop.register("model", make_model())
    assert loop.model is model
    loop.model = other = make_model()
    assert loop.model is other
    with pytest.raises(ConfigError, match="callbacks"):
        loop.register("callbacks", 1)


@pytest.mark.parametrize("name", ["state", "run", "callbacks", "trainer", "no name"])
def test_a_name_of_the_recipes_own_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"own|no name to register"):
        recipe(lambda batch: None, BATCHES).register(name, 1)


def test_what_could_not_be_saved_is_refused_when_it_is_registered() -> None:
    with pytest.raises(ConfigError, match=r"words is a set.*state_dict"):
        recipe(lambda batch: None, BATCHES).register("words", {"a"})


def test_models_tensors_plain_values_and_recipes_are_saved_and_restored(tmp_path: Path) -> None:
    def make(seed: int, number: float, folder: Path | None) -> tuple[Recipe, nn.Module, Tensor]:
        loop = recipe(lambda batch: None, BATCHES, save_dir=folder)
        inner = recipe(lambda batch: None, BATCHES)
        model, tensor = make_model(seed), torch.full((2,), number)
        inner.register("depth", number)
        for name, value in {"model": model, "tensor": tensor, "inner": inner}.items():
            loop.register(name, value)
        loop.register("note", {"numbers": [number], "word": "a" * int(number)})
        return loop, model, tensor

    first, _, _ = make(1, 3.0, tmp_path)
    first.inner.run(4)
    first.run(2)
    second, model, tensor = make(2, 7.0, tmp_path)
    assert second.resume()
    assert second.model is model
    assert are_equal(weights_of(model), weights_of(make_model(1)))
    assert second.tensor is tensor
    assert torch.equal(tensor, torch.full((2,), 3.0))
    assert second.note == {"numbers": [3.0], "word": "aaa"}
    assert second.inner.depth == 3.0
    assert second.inner.state["epoch"] == 4
    assert second.state["iters"] == 6


def test_tensors_that_are_trained_are_restored_in_place(tmp_path: Path) -> None:
    def make(number: float) -> tuple[Recipe, Tensor, Tensor]:
        parameter = nn.Parameter(torch.full((2,), number))
        leaf = torch.full((2,), number, requires_grad=True)
        loop = recipe(lambda batch: (parameter * leaf).sum().backward(), BATCHES, save_dir=tmp_path)
        loop.register("parameter", parameter)
        loop.register("leaf", leaf)
        loop.callbacks.add_callbacks([Optimizer(torch.optim.SGD([parameter, leaf], lr=0.1))])
        return loop, parameter, leaf

    first, parameter, leaf = make(1.0)
    first.run(1)
    second, again, there = make(5.0)
    assert second.resume()
    assert torch.equal(again, parameter)
    first.run(2)
    second.run(2)
    assert is_same([again, there], [parameter, leaf])
    assert again.is_leaf
    assert there.is_leaf


def test_a_checkpoint_holds_no_batch_loss_or_prediction(tmp_path: Path) -> None:
    model = make_model()
    loop = make_recipe(model, save_dir=tmp_path, save_interval="3ba")
    wanted = {id(value) for value in model.state_dict().values()}
    loop.callbacks.add_callbacks([EpochMetricAvg("loss")])
    loop.run(1)
    saved = read_checkpoint(tmp_path / "latest.ckpt")
    shapes = sorted(tuple(tensor.shape) for tensor in _tensors(saved))
    parameters = [tuple(p.shape) for p in model.parameters()]
    buffers = [tuple(b.shape) for b in model.buffers()]
    assert len(wanted) == len(parameters) + len(buffers)
    assert shapes == sorted([*parameters, *buffers, *parameters])  # with the momentum


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    items = value.values() if isinstance(value, dict) else value
    return (
        [t for item in items for t in _tensors(item)]
        if isinstance(value, (dict, list, tuple))
        else []
    )


def test_a_resumed_recipe_does_what_is_left(tmp_path: Path) -> None:
    make_recipe(make_model(), save_dir=tmp_path).run(3)
    loop = make_recipe(make_model(1), save_dir=tmp_path, autoresume=True)
    counted: list[int] = []
    loop.callbacks.add_callbacks([After(lambda state: counted.append(state["iters"]))])
    loop.run(4)
    assert counted == [13, 14, 15, 16]


def test_there_is_nothing_to_resume_in_an_empty_folder(tmp_path: Path) -> None:
    assert not make_recipe(make_model(), save_dir=tmp_path).resume()
    assert not make_recipe(make_model()).resume()


def test_a_checkpoint_of_other_callbacks_is_refused_and_nothing_loaded(tmp_path: Path) -> None:
    make_recipe(make_model(), EpochMetricAvg("loss"), save_dir=tmp_path).run(1)
    other = make_model(1)
    loop = make_recipe(other, save_dir=tmp_path)
    with pytest.raises(CheckpointError, match=r"Optimizer, EpochMetricAvg; here are Optimizer\."):
        loop.resume()
    assert are_equal(weights_of(other), weights_of(make_model(1)))


def test_a_nested_recipe_with_other_callbacks_is_refused() -> None:
    def make(*callbacks: Any) -> Recipe:
        loop, inner = (recipe(lambda batch: None, BATCHES) for _ in range(2))
        inner.callbacks.add_callbacks(callbacks)
        loop.register("inner", inner)
        return loop

    saved = make(EpochMetricAvg("loss")).state_dict()
    with pytest.raises(CheckpointError, match="of the callbacks EpochMetricAvg; here are none"):
        make().load_state_dict(saved)


def test_a_checkpoint_of_a_trainer_is_refused(tmp_path: Path) -> None:
    make_trainer(save_dir=tmp_path).fit()
    with pytest.raises(CheckpointError, match="of a Trainer and not of a recipe"):
        make_recipe(make_model(), save_dir=tmp_path).resume()


def test_an_error_of_the_step_passes_and_callbacks_are_closed() -> None:
    class Closing(Spy):
        closed = 0

        def close(self) -> None:
            self.closed += 1

    def step(batch: Tensor) -> None:
        raise ZeroDivisionError("mine")

    loop, spy = recipe(step, BATCHES), Closing()
    loop.callbacks.add_callbacks([spy])
    with pytest.raises(ZeroDivisionError, match="mine"):
        loop.run(1)
    assert spy.closed == 1
    assert loop.state["batch"] is None


def test_all_callbacks_are_closed_when_closing_one_fails() -> None:
    closed = []

    class Closing(Spy):
        def close(self) -> None:
            closed.append(self)
            raise OSError("disk")

    loop = recipe(lambda batch: None, BATCHES)
    loop.callbacks.add_callbacks([Closing(), Closing()])
    with pytest.raises(OSError, match="disk"):
        loop.run(1)
    assert len(closed) == 2


def test_a_loader_that_is_used_up_is_an_error() -> None:
    loop = recipe(lambda batch: None, iter(BATCHES))
    with pytest.raises(DataError, match="gave no batch in epoch 2"):
        loop.run(2)


def test_a_step_that_returns_no_dict_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"returned a Tensor.*\{'loss': loss\}"):
        recipe(lambda batch: batch, BATCHES).run(1)  # type: ignore[arg-type, return-value]


def test_a_step_that_returns_a_key_of_the_recipe_is_refused() -> None:
    with pytest.raises(ConfigError, match="returned 'metrics', which is the recipe's own"):
        recipe(lambda batch: {"metrics": {"loss": 1}}, BATCHES).run(1)


def test_autoresume_needs_a_folder() -> None:
    with pytest.raises(ConfigError, match="Give save_dir"):
        recipe(lambda batch: None, BATCHES, autoresume=True)


def test_moving_the_recipe_moves_models_tensors_recipes_and_batches() -> None:
    class Moved(nn.Module):
        where: torch.device | None = None

        def to(self, device: Any) -> Any:  # the CPU is all there is for sure
            self.where = torch.device(device)
            return self

    outer, inner = (recipe(lambda batch: None, BATCHES) for _ in range(2))
    model, nested = Moved(), Moved()
    inner.register("model", nested)
    outer.register("model", model)
    outer.register("inner", inner)
    assert outer.cuda() is outer
    assert model.where == nested.where == torch.device("cuda")
    assert outer.trainer.state.device == inner.trainer.state.device == torch.device("cuda")
    assert outer.cpu().trainer.state.device == torch.device("cpu")
    assert outer.to("GPU").trainer.state.device == torch.device("cuda")


def test_a_moved_tensor_is_the_same_object() -> None:
    loop, tensor = recipe(lambda batch: None, BATCHES), torch.ones(2, requires_grad=True)
    loop.register("tensor", tensor)
    loop.to("cpu").run(1)
    assert loop.tensor is tensor


def test_make_step_is_what_the_document_shows() -> None:
    model = make_model()
    returned = make_step(model)(next(iter(make_loader())))
    assert set(returned) == {"loss", "pred"}
    assert all(parameter.grad is not None for parameter in model.parameters())
