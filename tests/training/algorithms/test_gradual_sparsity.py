from __future__ import annotations

from itertools import combinations, permutations
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compressor.errors import ConfigError
from compressor.structure import cutting, surgery
from compressor.testing.models import TinyResNet
from compressor.training import Algorithm, Callback, Event, State, Window
from compressor.training.algorithms.gradient_clipping import GradientClipping
from compressor.training.algorithms.gradual_sparsity import (
    GradualSparsity,
    cubic_sparsity,
    magnitude_mask,
    nm_mask,
)
from compressor.training.algorithms.sam import SAM
from compressor.training.algorithms.weight_average import EMA, SWA
from tests.training.algorithms.resuming import assert_resumes
from tests.training.helpers import HIDDEN, accuracy, make_loader, make_model, make_trainer

WEIGHTS = ("0.weight", "4.weight")  # 32 and 16 of them


def zeros(model: nn.Module) -> dict[str, int]:
    named = model.named_parameters()
    return {name: int((p == 0).sum()) for name, p in named if name in WEIGHTS}


class Noting(Algorithm):
    def __init__(self, event: Event = Event.BATCH_END) -> None:
        self.events = frozenset({event})
        self.after = ("GradualSparsity",)
        self.zeros: list[dict[str, int]] = []
        self.masks: list[dict[str, Tensor]] = []

    def on(self, event: Event, state: State) -> None:
        self.zeros.append(zeros(state.model))
        named = state.model.named_parameters()
        self.masks.append({name: p.detach() == 0 for name, p in named if name in WEIGHTS})


def test_the_schedule_is_the_papers() -> None:
    assert [cubic_sparsity(f, 0.9, 0.1) for f in (0.0, 1.0)] == pytest.approx([0.1, 0.9])
    # s_f + (s_i - s_f) * (1 - (t - t0) / (n dt))**3 of Zhu and Gupta (2017)
    assert cubic_sparsity(0.25, 0.9, 0.1) == pytest.approx(0.9 - 0.8 * 27 / 64)


@pytest.mark.parametrize("sparsity", [0.0, 0.25, 0.5, 1.0])
def test_the_smallest_go_and_exactly_as_many_as_asked(sparsity: float) -> None:
    weight = torch.randn(4, 3, 2, generator=torch.Generator().manual_seed(0))
    kept = magnitude_mask(weight, sparsity)
    gone = sorted(weight.abs().flatten().tolist())[: round(24 * sparsity)]
    assert sorted(weight[~kept].abs().tolist()) == gone
    assert int(magnitude_mask(torch.zeros(8), sparsity).sum()) == 8 - round(8 * sparsity)


def test_of_every_four_neighbours_along_the_inputs_the_best_two_stay() -> None:
    weight = torch.randn(3, 8, 2, 2, generator=torch.Generator().manual_seed(0))
    kept = nm_mask(weight, 2, 4)
    for out in range(3):
        for start in (0, 4):
            for i in range(2):
                for j in range(2):
                    group = weight[out, start : start + 4, i, j]
                    best = max(combinations(range(4), 2), key=lambda c: group[list(c)].abs().sum())
                    mask = kept[out, start : start + 4, i, j]
                    assert mask.nonzero().flatten().tolist() == list(best)


def test_a_pattern_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"\(2, 6\)"):
        nm_mask(torch.ones(2, 6), 2, 4)


@pytest.mark.parametrize(
    "optimizer", [{"name": "SGD", "lr": 0.1, "momentum": 0.9}, {"name": "Adam", "lr": 0.01}]
)
def test_sparsity_follows_the_schedule_and_no_momentum_undoes_it(optimizer: Any) -> None:
    noting = Noting()
    sparsity = GradualSparsity(0.75, "0.25dur", "0.75dur", updates=4)
    make_trainer(algorithms=[noting, sparsity], optimizers=optimizer, max_duration="16ba").fit()
    for batch, count in enumerate(noting.zeros, start=1):
        fraction = min(max(int((batch / 16 - 0.25) / 0.5 * 4) / 4, 0), 1)
        target = cubic_sparsity(fraction, 0.75)
        assert count == {"0.weight": round(32 * target), "4.weight": round(16 * target)}
    for before, after in zip(noting.masks, noting.masks[1:], strict=False):
        assert all(bool((after[name] | ~before[name]).all()) for name in WEIGHTS)
    assert sparsity.sparsity == 0.75


def test_masked_weights_are_zero_in_every_forward_pass_and_have_no_gradient() -> None:
    class Checking(Algorithm):
        events = frozenset({Event.BEFORE_FORWARD, Event.BEFORE_STEP})
        after = ("GradualSparsity",)

        def on(self, event: Event, state: State) -> None:
            for name, pruned in sparsity.state_dict()["pruned"].items():
                parameter = state.model.get_parameter(name)
                assert not parameter[pruned].any()
                if event is Event.BEFORE_STEP:
                    assert parameter.grad is not None
                    assert not parameter.grad[pruned].any()

    sparsity = GradualSparsity(0.5)
    algorithms = [Checking(), GradientClipping(0.1), sparsity]
    make_trainer(algorithms=algorithms, max_duration="3ep").fit()
    assert sparsity.sparsity == 0.5


def test_gradients_of_sam_are_masked_and_then_clipped() -> None:
    algorithms = [GradientClipping(), GradualSparsity(0.5), SAM(), EMA()]
    dispatch = make_trainer(algorithms=algorithms).dispatch
    order = [each.key for each in dispatch.order_at(Event.BEFORE_STEP)]
    assert order == ["SAM", "GradualSparsity", "GradientClipping"]
    order = [each.key for each in dispatch.order_at(Event.EVAL_START)]
    assert order == ["EMA", "GradualSparsity"]


def test_the_smallest_of_all_layers_go_when_they_are_compared() -> None:
    model = make_model()
    with torch.no_grad():
        model[0].weight.mul_(100)
    make_trainer(
        model,
        algorithms=[GradualSparsity(0.25, end="0.5dur", scope="global")],
        optimizers={"name": "SGD", "lr": 1e-6},
    ).fit()
    assert zeros(model) == {"0.weight": 0, "4.weight": 12}


def test_a_pattern_grows_by_groups_and_holds_everywhere_in_the_end() -> None:
    noting = Noting()
    model = make_model()
    trainer = make_trainer(
        model, algorithms=[noting, GradualSparsity(pattern="2:4", updates=4)], max_duration="16ba"
    )
    trainer.fit()
    for name in WEIGHTS:
        groups = (model.get_parameter(name) == 0).view(-1, 4).sum(1)
        assert groups.tolist() == [2] * len(groups)
    counts = [count["0.weight"] for count in noting.zeros]
    assert counts == sorted(counts)
    assert 0 < counts[2] < 16  # half-way there, and only whole groups
    assert {int(n) for masks in noting.masks for n in masks["0.weight"].view(-1, 4).sum(1)} == {
        0,
        2,
    }


def test_layers_that_a_pattern_does_not_divide_are_left_unless_named() -> None:
    model = TinyResNet(in_channels=1)  # the first convolution has one input channel
    loader = [(torch.randn(2, 1, 8, 8), torch.tensor([0, 1]))]
    trainer = make_trainer(
        model, train_dataloader=loader, algorithms=[GradualSparsity(pattern="2:4", end="0.1dur")]
    )
    trainer.fit()
    assert not (model.conv1.weight == 0).any()
    assert (model.layer1[0].conv1.weight == 0).float().mean().item() == 0.5
    with pytest.raises(ConfigError, match="no pattern 2:4"):
        make_trainer(model, algorithms=[GradualSparsity(pattern="2:4", layers=["conv1"])])


def test_only_named_layers_are_masked_and_unknown_ones_are_refused() -> None:
    model = make_model()
    make_trainer(model, algorithms=[GradualSparsity(0.5, layers=["4"])]).fit()
    assert zeros(model) == {"0.weight": 0, "4.weight": 8}
    with pytest.raises(ConfigError, match="no layer '5'"):
        make_trainer(algorithms=[GradualSparsity(0.5, layers=["5"])])
    with pytest.raises(ConfigError, match="no parameter `weight`"):
        make_trainer(algorithms=[GradualSparsity(0.5, layers=["2"])])


@pytest.mark.parametrize("average", [lambda: EMA(0.9, period=1), lambda: SWA("0.6dur")])
def test_an_average_is_as_sparse_as_the_weights(average: Any) -> None:
    evaluated: list[dict[str, int]] = []

    class Watching(Callback):
        events = frozenset({Event.EVAL_END})

        def on(self, event: Event, state: State) -> None:
            evaluated.append(zeros(state.model))

    noting = Noting(Event.EPOCH_END)
    trainer = make_trainer(
        algorithms=[GradualSparsity(0.75, end="0.9dur"), average(), noting],
        callbacks=[Watching()],
        evaluate=accuracy,
        max_duration="5ep",
    )
    trainer.fit()
    for during, after in zip(noting.zeros, evaluated, strict=False):
        assert all(after[name] >= during[name] for name in WEIGHTS)
    assert zeros(trainer.model) == {"0.weight": 24, "4.weight": 12}


class Cutting(Algorithm):
    events = frozenset({Event.BATCH_END})
    kept = (0, 2, 3, 5, 7)

    def __init__(self, batch: int) -> None:
        self.batch = batch

    def on(self, event: Event, state: State) -> None:
        if state.clock.batch == self.batch:
            for name in ("0.weight", "0.bias", "1.weight", "1.bias"):
                state.edit(lambda m, name=name: surgery.slice_parameter(m, name, 0, self.kept))
            for name in ("1.running_mean", "1.running_var"):
                state.edit(lambda m, name=name: surgery.slice_parameter(m, name, 0, self.kept))
            state.edit(lambda m: surgery.replace(m, "4", nn.Linear(5, 2)))


def test_masks_are_cut_with_the_weights_and_new_layers_are_masked() -> None:
    sparsity = GradualSparsity(0.5, end="0.25dur")
    masks: list[dict[str, Tensor]] = []

    class Taking(Algorithm):
        events = frozenset({Event.AFTER_STEP})

        def on(self, event: Event, state: State) -> None:
            masks.append(dict(sparsity.state_dict()["pruned"]))

    trainer = make_trainer(algorithms=[Taking(), Cutting(6), sparsity], max_duration="4ep")
    trainer.fit()
    before, after = masks[5]["0.weight"], trainer.model[0].weight == 0
    assert bool(after[before[list(Cutting.kept)]].all())
    assert zeros(trainer.model)["4.weight"] == 5
    assert zeros(trainer.model)["0.weight"] >= 10


def test_it_resumes_before_on_and_after_an_update() -> None:
    def make(callbacks: list[Any]) -> Any:
        return make_trainer(
            train_dataloader=make_loader(shuffle=True),
            algorithms=[GradualSparsity(0.75, updates=3, end="0.75dur"), EMA(0.5, period=1)],
            callbacks=callbacks,
            optimizers={"name": "SGD", "lr": 0.1, "momentum": 0.9},
            max_duration="3ep",
        )

    assert_resumes(make, [1, 2, 3, 4, 6, 8, 11])


def test_a_loader_without_a_length_ends_with_the_last_mask() -> None:
    class Stream:
        def __iter__(self) -> Any:
            return iter(make_loader())

    model = make_model()
    sparsity = GradualSparsity(0.5, end="1dur")
    make_trainer(model, train_dataloader=Stream(), algorithms=[sparsity], max_duration="1ep").fit()
    assert zeros(model) == {"0.weight": 16, "4.weight": 8}


def test_a_second_fit_keeps_the_zeros() -> None:
    model = make_model()
    noting = Noting()
    trainer = make_trainer(model, algorithms=[GradualSparsity(0.5), noting])
    trainer.fit()
    noting.zeros.clear()
    trainer.fit("1ep")
    assert noting.zeros == [{"0.weight": 16, "4.weight": 8}] * 4


class Renamed(GradualSparsity):
    key = "mine"


class OwnSAM(SAM):
    pass


def test_the_order_holds_for_subclasses_and_new_names_in_any_list() -> None:
    clipping = GradientClipping()
    clipping.key = "clip"
    for algorithms in permutations([clipping, Renamed(0.5), OwnSAM(), EMA()]):
        dispatch = make_trainer(algorithms=algorithms).dispatch
        order = [each.key for each in dispatch.order_at(Event.BEFORE_STEP)]
        assert order == ["OwnSAM", "mine", "clip"]
        order = [each.key for each in dispatch.order_at(Event.EVAL_START)]
        assert order == ["EMA", "mine"]


def test_masks_of_another_trainer_are_forgotten() -> None:
    used = GradualSparsity(0.5)
    make_trainer(
        nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2)), algorithms=[used], max_duration="2ep"
    ).fit()
    seen: list[dict[str, int]] = []
    for sparsity in (used, GradualSparsity(0.5)):
        noting = Noting()
        make_trainer(algorithms=[sparsity, noting]).fit()
        seen += noting.zeros
    assert seen[:8] == seen[8:]
    assert seen[7] == {"0.weight": 16, "4.weight": 8}


def test_a_window_is_refused() -> None:
    """When it closed, nobody held the zeros, until they were cut again at the end."""
    sparsity = GradualSparsity(0.5)
    sparsity.window = Window.parse("0dur", "0.5dur")
    with pytest.raises(ConfigError, match=r"has a window.*set `start` and `end`"):
        make_trainer(algorithms=[sparsity])


def test_a_second_fit_masks_before_its_first_forward_pass() -> None:
    seen: list[dict[str, int]] = []

    class First(Algorithm):
        events = frozenset({Event.EPOCH_START})

        def on(self, event: Event, state: State) -> None:
            seen.append(zeros(state.model))

    trainer = make_trainer(algorithms=[GradualSparsity(0.5), First()])
    trainer.fit()
    with torch.no_grad():
        trainer.model[0].weight.fill_(1.0)
    seen.clear()
    trainer.fit("1ep")
    assert seen == [{"0.weight": 16, "4.weight": 8}]


def test_after_surgery_more_than_is_due_may_be_masked_and_stays_so() -> None:
    """Kept are the channels whose weights were all masked, and one other."""

    class Keeping(Algorithm):
        events = frozenset({Event.BATCH_END})

        def on(self, event: Event, state: State) -> None:
            if state.clock.batch == 5:
                state.edit(lambda m: cutting.keep_channels(m, HIDDEN, (0, 1, 2, 7)))

    model = make_model()
    with torch.no_grad():
        model[0].weight[:4].mul_(1e-3)
        model[0].weight[4:].add_(5.0)
    sparsity = GradualSparsity(0.5, end="0.25dur", layers=["0"])
    make_trainer(
        model, algorithms=[sparsity, Keeping()], optimizers={"name": "SGD", "lr": 0.01}
    ).fit()
    assert sparsity.sparsity == 0.75
    assert (model[0].weight == 0).sum(1).tolist() == [4, 4, 4, 0]


def test_a_weight_that_happens_to_be_zero_does_not_go_before_a_masked_one() -> None:
    class Zeroing(Algorithm):
        """Sets all weights of the first layer to 0, after a quarter of them was masked."""

        events = frozenset({Event.AFTER_STEP})

        def on(self, event: Event, state: State) -> None:
            if state.clock.batch == 4:
                with torch.no_grad():
                    state.model[0].weight.zero_()

    model = make_model()
    with torch.no_grad():  # the last ones are masked first: a sort of equal ones takes the first
        model[0].weight.copy_(torch.arange(32, 0, -1).view(8, 4))
    sparsity = GradualSparsity(0.5, end="1dur", updates=2, layers=["0"])
    trainer = make_trainer(
        model,
        algorithms=[sparsity, Zeroing()],
        optimizers={"name": "SGD", "lr": 1e-6},
        max_duration="8ba",
    )
    trainer.fit()
    assert sparsity.sparsity == 0.5


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "How sparse"),
        ({"final_sparsity": 1.5}, "cannot be reached"),
        ({"final_sparsity": 0.6, "pattern": "2:4"}, "Write 0 to 0.5"),
        ({"pattern": "4"}, "no pattern '4'"),
        ({"pattern": "5:4"}, "no pattern '5:4'"),
        ({"final_sparsity": 0.5, "updates": 0}, "updates=0"),
        ({"final_sparsity": 0.5, "scope": "all"}, "no scope 'all'"),
    ],
)
def test_options_that_contradict_themselves_are_refused(
    options: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        GradualSparsity(**options)


def test_a_model_without_layers_to_mask_is_refused() -> None:
    with pytest.raises(ConfigError, match="no layer that could be masked"):
        make_trainer(nn.Sequential(nn.BatchNorm1d(4)), algorithms=[GradualSparsity(0.5)])
