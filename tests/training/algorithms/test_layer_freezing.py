from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compressor.errors import ConfigError
from compressor.structure import cutting, surgery
from compressor.testing.models import TiedModel
from compressor.training import (
    Algorithm,
    Callback,
    Clock,
    Event,
    EventEngine,
    State,
    Trainer,
    Window,
)
from compressor.training.algorithms.layer_freezing import LayerFreezing, freeze_layers
from tests.training.algorithms.resuming import assert_resumes
from tests.training.helpers import (
    HIDDEN,
    are_equal,
    make_loader,
    make_model,
    make_trainer,
    weights_of,
)


class Noting(Algorithm):
    events = frozenset({Event.AFTER_STEP})

    def __init__(self) -> None:
        self.frozen: list[int] = []
        self.weights: list[dict[str, Tensor]] = []

    def on(self, event: Event, state: State) -> None:
        self.frozen.append(sum(p.grad is None for p in state.model.parameters()))
        self.weights.append(weights_of(state.model))


def test_layers_are_counted_from_the_front_and_the_last_stays() -> None:
    model = make_model()  # three layers with two parameters each
    assert [len(freeze_layers(make_model(), f)) for f in (0, 0.3, 0.4, 0.67, 1)] == [0, 0, 2, 4, 4]
    frozen = freeze_layers(model, 0.4)
    assert all(map(torch.equal, frozen, model[0].parameters()))
    assert [p.requires_grad for p in model.parameters()] == [False] * 2 + [True] * 4


def test_what_was_frozen_before_is_not_returned() -> None:
    model = make_model()
    model[0].weight.requires_grad_(False)
    assert [p is model[0].bias for p in freeze_layers(model, 0.4)] == [True]


def test_a_tied_parameter_is_frozen_with_its_last_layer() -> None:
    model = TiedModel()
    names = {id(p): name for name, p in model.named_parameters()}
    layers = {name.rpartition(".")[0] for name, _ in model.named_parameters(remove_duplicate=False)}
    frozen = {names[id(p)] for p in freeze_layers(model, 0.99)}
    assert len(layers) > 2
    last = list(model.named_parameters(remove_duplicate=False))[-1][0].rpartition(".")[0]
    held = {id(p) for p in surgery.get(model, last).parameters()}
    assert frozen == {name for key, name in names.items() if key not in held}


def test_more_layers_stop_as_the_clock_goes_on_and_stay_where_they_are() -> None:
    noting = Noting()
    freezing = LayerFreezing(start="0.25dur", level=0.7)
    trainer = make_trainer(algorithms=[freezing, noting], max_duration="16ba")
    trainer.fit()
    passed = [(batch / 16 - 0.25) / 0.75 for batch in range(16)]
    assert noting.frozen == [2 * int(3 * 0.7 * max(p, 0)) for p in passed]
    assert noting.frozen[-1] == 2
    first = noting.frozen.index(2)
    before, after = noting.weights[first], noting.weights[-1]
    assert torch.equal(before["0.weight"], after["0.weight"])
    assert not torch.equal(before["4.weight"], after["4.weight"])
    # Batch norms in front go on following the batches.
    assert not torch.equal(before["1.running_mean"], after["1.running_mean"])


def test_decay_and_momentum_do_not_move_what_is_frozen() -> None:
    noting = Noting()
    trainer = make_trainer(
        algorithms=[LayerFreezing(start="0.5dur"), noting],
        optimizers={"name": "AdamW", "lr": 0.01, "weight_decay": 0.1},
        max_duration="12ba",
    )
    trainer.fit()
    steps = [int(trainer.optimizer.state[p]["step"]) for p in trainer.model.parameters()]
    assert steps == [8, 8, 10, 10, 12, 12]  # what was remembered is still there
    assert noting.frozen == [0] * 8 + [2] * 2 + [4] * 2
    assert torch.equal(noting.weights[-1]["1.weight"], noting.weights[-2]["1.weight"])


def test_every_parameter_requires_what_it_did_before_also_after_an_error() -> None:
    model = make_model()
    model[1].bias.requires_grad_(False)
    make_trainer(model, algorithms=[LayerFreezing(start="0dur")]).fit()
    assert [p.requires_grad for p in model.parameters()] == [True, True, True, False, True, True]

    class Failing(Algorithm):
        events = frozenset({Event.BATCH_END})

        def on(self, event: Event, state: State) -> None:
            if state.clock.batch == 7:
                assert not model[0].weight.requires_grad
                raise KeyboardInterrupt

    trainer = make_trainer(model, algorithms=[LayerFreezing(start="0dur"), Failing()])
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    assert [p.requires_grad for p in model.parameters()] == [True, True, True, False, True, True]


@pytest.mark.parametrize("optimizer", ["SGD", "Adam"])
def test_it_resumes_before_on_and_after_a_change(optimizer: str) -> None:
    def make(callbacks: list[Any]) -> Any:
        return make_trainer(
            train_dataloader=make_loader(shuffle=True),
            algorithms=[LayerFreezing(start="0.25dur", level=1.0)],
            callbacks=callbacks,
            optimizers={"name": optimizer, "lr": 0.01},
            max_duration="3ep",
        )

    assert_resumes(make, [5, 6, 7, 9, 11])


def test_a_second_fit_begins_with_all_layers() -> None:
    noting = Noting()
    trainer = make_trainer(algorithms=[LayerFreezing(start="0.6dur"), noting], max_duration="2ep")
    trainer.fit()
    trainer.fit("2ep")
    assert noting.frozen[7] == 4
    assert noting.frozen[8] == 0
    assert noting.frozen[15] == 4


def test_layers_cut_by_surgery_are_thawed_after_the_fit() -> None:
    model = make_model()

    class Cutting(Algorithm):
        events = frozenset({Event.BATCH_END})

        def on(self, event: Event, state: State) -> None:
            if state.clock.batch == 5:
                state.edit(lambda m: surgery.slice_parameter(m, "0.bias", 0, range(8)))
                new = nn.Linear(4, 8)
                state.edit(lambda m: surgery.replace(m, "0", new))

    noting = Noting()
    make_trainer(model, algorithms=[LayerFreezing(start="0dur"), Cutting(), noting]).fit()
    assert noting.frozen == [0, 0, 0, 2, 2, 2, 4, 4]
    assert all(p.requires_grad for p in model.parameters())


def test_a_cut_layer_that_was_frozen_is_trained_again_in_another_fit() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))

    class Cutting(Algorithm):
        events = frozenset({Event.BATCH_END})

        def on(self, event: Event, state: State) -> None:
            if state.clock.batch == 7:
                state.edit(lambda m: surgery.slice_parameter(m, "0.weight", 0, range(8)))

    trainer = make_trainer(model, algorithms=[LayerFreezing(start="0dur"), Cutting()])
    trainer.fit()
    assert model[0].weight.requires_grad
    before = model[0].weight.detach().clone()
    trainer.fit("16ba")
    assert not torch.equal(before, model[0].weight)


def test_without_layers_to_freeze_nothing_changes() -> None:
    def train(*algorithms: Algorithm) -> dict[str, Tensor]:
        trainer = make_trainer(algorithms=algorithms)
        trainer.fit()
        return weights_of(trainer.model)

    assert are_equal(train(), train(LayerFreezing(start="0dur", level=0.0)))


def test_parts_out_of_range_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"level=1\.5"):
        LayerFreezing(level=1.5)
    with pytest.raises(ConfigError, match="fraction=-1"):
        freeze_layers(make_model(), -1)


def test_what_was_frozen_and_pruned_at_a_checkpoint_is_thawed_after_the_resumed_fit(
    tmp_path: Path,
) -> None:
    """The edits that were made again left `requires_grad` as it was at the checkpoint."""

    class Narrowing(Algorithm):
        events = frozenset({Event.BATCH_END})

        def on(self, event: Event, state: State) -> None:
            if state.clock.batch == 5:
                state.edit(lambda model: cutting.keep_channels(model, HIDDEN, (0, 1)))

    class Stop(Callback):
        events = frozenset({Event.BATCH_END})

        def on(self, event: Event, state: State) -> None:
            if state.clock.batch == 7:
                raise KeyboardInterrupt

    def make(*callbacks: Callback) -> Trainer:
        return make_trainer(
            algorithms=[LayerFreezing(start="0.2dur"), Narrowing()],
            callbacks=callbacks,
            save_dir=tmp_path,
            save_interval="1ba",
            autoresume=True,
        )

    with pytest.raises(KeyboardInterrupt):
        make(Stop()).fit()
    trainer = make()
    trainer.fit()
    assert all(parameter.requires_grad for parameter in trainer.model.parameters())


def test_gradients_of_frozen_layers_are_gone_so_that_no_momentum_steps_them() -> None:
    model = make_model()
    model(torch.ones(4, 4)).sum().backward()
    freeze_layers(model, 0.4)
    assert [p.grad is None for p in model.parameters()] == [True] * 2 + [False] * 4


def test_what_surgery_puts_in_frozen_is_not_thawed() -> None:
    """A user's own frozen layer in the place of one that was frozen here."""

    class Replacing(Algorithm):
        events = frozenset({Event.BATCH_END})

        def on(self, event: Event, state: State) -> None:
            if state.clock.batch == 7:
                new = nn.Linear(4, 8).requires_grad_(False)
                state.edit(lambda m: surgery.replace(m, "0", new))

    model, noting = make_model(), Noting()
    make_trainer(model, algorithms=[LayerFreezing(start="0dur"), Replacing(), noting]).fit()
    assert noting.frozen[6] == 4
    assert [p.requires_grad for p in model.parameters()] == [False] * 2 + [True] * 4


def test_a_window_is_refused() -> None:
    """When it closed, nobody thawed the layers."""
    freezing = LayerFreezing("0dur")
    freezing.window = Window.parse("0dur", "0.5dur")
    with pytest.raises(ConfigError, match=r"has a window.*set `start` and `level`"):
        make_trainer(algorithms=[freezing])


def test_one_that_was_used_before_begins_anew_with_another_model() -> None:
    def train(freezing: LayerFreezing) -> list[int]:
        noting = Noting()
        make_trainer(algorithms=[freezing, noting]).fit()
        return noting.frozen

    used = LayerFreezing("0dur")
    trainer = make_trainer(nn.Sequential(*(nn.Linear(4, 4) for _ in range(5))), algorithms=[used])
    trainer.fit()
    used.load_state_dict({"names": ["0.bias"]})  # of a run that was resumed and not gone on with
    assert train(used) == train(LayerFreezing("0dur")) == [0, 0, 0, 2, 2, 2, 4, 4]


def test_a_loop_of_ones_own_that_begins_anew_freezes_anew() -> None:
    freezing = LayerFreezing("0dur")
    for model in (make_model(), make_model()):
        engine = EventEngine(State(model, "2ba", clock=Clock(batch=1)), [freezing])
        engine.run_event("setup")
        engine.run_event("batch_start")  # half-way: one of three layers
        assert [p.requires_grad for p in model.parameters()] == [False] * 2 + [True] * 4
