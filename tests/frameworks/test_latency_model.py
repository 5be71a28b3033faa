"""Calibration, estimates and groups, against layers whose times are arithmetic."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from compressor.frameworks.latency_model import (
    LatencyModel,
    group_latency_ms,
    in_int8,
    narrowed,
)
from compressor.frameworks.layer_costs import costly_layers, layer_state
from compressor.interfaces.inputs import ModelInputs
from compressor.search.space import LayerState
from compressor.structure.channels import find_groups
from compressor.structure.cutting import keep_many
from compressor.structure.groups import ChannelGroup, Member
from compressor.targets.layer_latencies import LayerLatencies
from compressor.testing.models import TinyResNet

LAYERS = {"a": LayerState(4, 8), "b": LayerState(8, 8), "c": LayerState(8, 2)}
INT8 = ("a", "b")


def macs(_: str, state: LayerState) -> float:
    return float(state.inputs * state.outputs)


class Clockwork:
    """A layer takes 1 ms a MAC, a quarter of it in int8; timing one takes a second."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, LayerState]] = []

    def time(self, name: str, state: LayerState) -> float:
        self.asked.append((name, state))
        return macs(name, state) * (1.0 if not state.format else 0.25)

    def clock(self) -> float:
        return float(len(self.asked))


def make(
    clockwork: Clockwork, limit_seconds: float = 1e9, path: Path | None = None
) -> LatencyModel:
    table = LayerLatencies(path)
    return LatencyModel(
        LAYERS, clockwork.time, macs, table, limit_seconds=limit_seconds, clock=clockwork.clock
    )


def total(model: LatencyModel, int8_layers: tuple[str, ...] = ()) -> float:
    states = {n: in_int8(s) if n in int8_layers else s for n, s in LAYERS.items()}
    return sum(model.cost(name, state) for name, state in states.items())


def test_the_reference_costs_what_was_measured_in_float_int8_and_both() -> None:
    model = make(Clockwork())
    model.calibrate(300.0)
    assert total(model) == pytest.approx(300.0)
    model.calibrate_int8(INT8, 100.0, ["b"], 260.0)
    assert total(model, INT8) == pytest.approx(100.0)
    assert total(model, ("a",)) == pytest.approx(260.0)


def test_a_layer_that_is_left_in_float_costs_its_conversions() -> None:
    model = make(Clockwork())
    model.calibrate(112.0)
    model.calibrate_int8(INT8, 16.0 + 96 / 4, ["b"], 16.0 + 32 / 4 + 64 + 5.0)
    assert model.cost("a", LAYERS["a"]) == pytest.approx(32 + 5)
    assert model.cost("c", LAYERS["c"]) == pytest.approx(16)  # it cannot be int8
    assert model.cost("a", replace(LAYERS["a"], is_removed=True)) == 0.0


def test_where_int8_as_a_whole_is_slower_nothing_draws_a_layer_to_it() -> None:
    model = make(Clockwork())
    model.calibrate(112.0)
    model.calibrate_int8(INT8, 200.0, ["b"], 300.0)
    assert total(model) == pytest.approx(112.0)
    assert total(model, INT8) == pytest.approx(200.0)


def test_without_int8_its_layers_are_as_much_dearer_in_the_model_as_float_ones() -> None:
    model = make(Clockwork())
    model.calibrate(2 * (32 + 64 + 16))
    assert model.cost("b", in_int8(LAYERS["b"])) == pytest.approx(2 * 64 / 4)


def test_an_int8_reference_that_its_float_layers_alone_exceed_changes_no_factor() -> None:
    model = make(Clockwork())
    model.calibrate(112.0)
    model.calibrate_int8(INT8, 10.0, (), 0.0)  # c alone costs 16
    assert model.cost("b", in_int8(LAYERS["b"])) == pytest.approx(64 / 4)


def test_a_removed_layer_costs_nothing_and_is_not_timed() -> None:
    clockwork = Clockwork()
    assert make(clockwork).cost("a", replace(LAYERS["a"], is_removed=True)) == 0.0
    assert not clockwork.asked


def test_how_weights_are_stored_does_not_change_their_time() -> None:
    clockwork = Clockwork()
    model = make(clockwork)
    assert model.cost("a", LAYERS["a"]) == model.cost("a", replace(LAYERS["a"], stored_bits=2.0))
    assert len(clockwork.asked) == 1


def test_when_the_time_is_up_the_rest_is_estimated_from_the_same_layer(
    caplog: pytest.LogCaptureFixture,
) -> None:
    clockwork = Clockwork()
    model = make(clockwork, limit_seconds=4.0)
    with caplog.at_level(logging.WARNING, logger="compressor"):
        model.calibrate(112.0)  # times a, b and c; the time is not up
        assert model.cost("a", in_int8(LAYERS["a"])) == pytest.approx(32 / 4)  # the fourth
        assert model.cost("a", LayerState(4, 2, bits=8, format="static_int8")) == pytest.approx(
            8 / 4
        )
        assert model.cost("b", LayerState(8, 4)) == pytest.approx(32.0)
        assert model.cost("b", LayerState(8, 3)) == pytest.approx(24.0)
    assert len(clockwork.asked) == 4
    (line,) = caplog.messages
    assert "estimated" in line


def test_a_layer_of_which_nothing_was_timed_is_estimated_from_the_others() -> None:
    model = make(Clockwork(), limit_seconds=1.0)
    assert model.cost("a", LAYERS["a"]) == 32.0
    assert model.cost("c", LAYERS["c"]) == pytest.approx(16.0)


def test_a_run_that_goes_on_is_told_the_same(tmp_path: Path) -> None:
    path, states = tmp_path / "told.jsonl", [LayerState(8, width) for width in range(1, 9)]
    first = make(Clockwork(), limit_seconds=3.0, path=path)
    told = [first.cost("b", state) for state in states]

    class Slower(Clockwork):
        def time(self, name: str, state: LayerState) -> float:
            return 2 * super().time(name, state)

    again = make(Slower(), path=path)
    assert [again.cost("b", state) for state in states] == told


def test_the_layers_of_a_narrowed_group_are_those_of_the_pruned_model() -> None:
    torch.manual_seed(0)
    model = TinyResNet().eval()
    inputs = ModelInputs((torch.randn(2, 1, 8, 8),))
    layers = costly_layers(model)
    for group in find_groups(model, inputs).groups:
        pruned = TinyResNet().eval()
        keep_many(pruned, [(group, tuple(range(5)))])
        after = {name: layer_state(layer) for name, layer in costly_layers(pruned).items()}
        states = narrowed(group, 5, layers)
        changed = {name for name in after if after[name] != layer_state(layers[name])}
        assert changed == set(states)
        assert states == {name: after[name] for name in states}


def test_heads_take_their_entries_along() -> None:
    heads = tuple(tuple(range(4 * head, 4 * head + 4)) for head in range(3))
    group = ChannelGroup(
        "v",
        3,
        (Member("v.weight", 0, "out", heads, 12), Member("out.weight", 1, "in", heads, 12)),
    )
    layers = {"v": nn.Linear(6, 12), "out": nn.Linear(12, 6)}
    assert narrowed(group, 2, layers) == {"v": LayerState(6, 8), "out": LayerState(8, 6)}


def test_a_depthwise_convolution_loses_inputs_with_its_outputs() -> None:
    index = tuple((i,) for i in range(8))
    group = ChannelGroup("dw", 8, (Member("dw.weight", 0, "out", index, 8),))
    assert narrowed(group, 6, {"dw": nn.Conv2d(8, 8, 3, groups=8)}) == {"dw": LayerState(6, 6)}


def test_a_group_is_in_one_type_whichever_takes_less() -> None:
    index = tuple((i,) for i in range(8))
    group = ChannelGroup(
        "a", 8, (Member("a.weight", 0, "out", index, 8), Member("b.weight", 1, "in", index, 8))
    )
    layers = {"a": nn.Linear(4, 8), "b": nn.Linear(8, 2)}

    def cost(name: str, state: LayerState) -> float:  # b is slower in int8
        return macs(name, state) * (1.0 if not state.format else {"a": 0.25, "b": 2.0}[name])

    assert group_latency_ms(group, 8, layers, cost) == 32 + 16
    assert group_latency_ms(group, 4, layers, cost, ("a", "b")) == 16 / 4 + 8 * 2
    assert group_latency_ms(group, 4, layers, cost, ("b",)) == 16 + 8
