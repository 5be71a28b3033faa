"""Which formats the user and the target allow, and which are chosen of them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
import torch
from torch import nn

from compressor.config import Config
from compressor.errors import ConfigError
from compressor.frameworks.layer_costs import costly_layers, layer_state, size_cost, stated_change
from compressor.frameworks.layer_formats import allowed_formats, possible_formats
from compressor.result import Choice
from compressor.search.allocate import Problem, least_cost
from compressor.search.space import LayerState, Space

MODEL = nn.Sequential(
    nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3, groups=8), nn.Linear(8, 2)
)
LAYERS = ["0", "1", "2", "3"]


POSSIBLE = possible_formats(LAYERS, MODEL, "latency")


def allowed(custom: object) -> list[str]:
    return list(formats(custom))


def formats(custom: object) -> dict[str, tuple[str, ...]]:
    config = Config.from_dict({"custom_compression": custom} if custom is not None else {})
    return allowed_formats(POSSIBLE, MODEL, config.custom_compression)


def test_convolutions_have_no_dynamic_kernel_and_bytes_alone_are_worth_four_bits() -> None:
    assert POSSIBLE["0"] == ("static_int8",)
    assert POSSIBLE["3"] == ("static_int8", "dynamic_int8")
    in_bytes = possible_formats(LAYERS, MODEL, "compression")
    assert in_bytes["0"] == ("static_int8", "weight_fp16")
    assert in_bytes["3"] == ("static_int8", "dynamic_int8", "weight_int4", "weight_fp16")
    assert possible_formats(LAYERS, MODEL, "macs") == {}


def test_a_weight_that_float16_cannot_say_is_not_tried_in_it() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    with torch.no_grad():
        model.get_parameter("1.weight")[0, 0] = 70000.0
    found = possible_formats(["0", "1"], model, "compression")
    assert [name for name, formats in found.items() if "weight_fp16" in formats] == ["0"]


TEXT = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 8))


def test_embeddings_have_weights_of_few_bits_where_bytes_count() -> None:
    assert possible_formats(["1", "0"], TEXT, "latency").keys() == {"1"}
    assert possible_formats(["0"], TEXT, "quantization") == {"0": ("weight_int8",)}
    in_bytes = possible_formats(["1", "0"], TEXT, "compression")
    assert in_bytes["0"] == ("weight_int8", "weight_int4", "weight_fp16")
    custom = Config.from_dict({"custom_compression": {"layers": {"0": {"precision": 4}}}})
    named = allowed_formats(in_bytes, TEXT, custom.custom_compression)
    assert named == {"0": ("weight_int4",)}
    half = {"custom_compression": {"quantization_args": {"skip_layers_ratio": 0.5}}}
    kept = allowed_formats(in_bytes, TEXT, Config.from_dict(half).custom_compression)
    assert list(kept) == ["1", "0"], "of one layer, and not of two"


def test_without_a_word_all_are_allowed() -> None:
    assert allowed(None) == LAYERS


def test_pointwise_and_grouped_convolutions_are_left_out_unless_asked_for() -> None:
    assert allowed({"quantization_args": {}}) == ["0", "3"]
    assert allowed({"quantization_args": {"quantize_conv11": True}}) == ["0", "1", "3"]
    assert allowed({"quantization_args": {"quantize_group": True}}) == ["0", "2", "3"]


def test_layers_are_skipped_by_position_given_as_numbers_or_as_text() -> None:
    everything = {"quantize_conv11": True, "quantize_group": True}
    assert allowed({"quantization_args": {**everything, "skip_layers": [0, "3"]}}) == ["1", "2"]


def test_the_first_part_of_the_layers_is_skipped_by_ratio() -> None:
    everything = {"quantize_conv11": True, "quantize_group": True}
    assert allowed({"quantization_args": {**everything, "skip_layers_ratio": 0.5}}) == ["2", "3"]


def test_named_layers_alone_are_quantized() -> None:
    layers = {"1": {"precision": 8}, "3": {"precision": 32}}
    assert allowed({"layers": layers}) == ["1"]


def test_a_layer_that_does_not_exist_is_refused_and_the_nearest_named() -> None:
    model = nn.Sequential()
    model.add_module("features", nn.Linear(2, 2))
    config = Config.from_dict({"custom_compression": {"layers": {"feature": {"precision": 8}}}})
    with pytest.raises(ConfigError, match="Did you mean 'features'"):
        allowed_formats({"features": ("static_int8",)}, model, config.custom_compression)


def test_two_bits_are_refused() -> None:
    with pytest.raises(ConfigError, match="2 bits"):
        allowed({"layers": {"0": {"precision": 2}}})


def test_four_bits_are_there_for_linear_layers_alone() -> None:
    assert formats({"layers": {"3": {"precision": 4}}}) == {"3": ("weight_int4",)}
    with pytest.raises(ConfigError, match="This layer has 8, 16 and 32"):
        formats({"layers": {"0": {"precision": 4}}})


def test_sixteen_bits_are_float16_in_any_layer() -> None:
    layers = {"0": {"precision": 16}, "3": {"precision": 16}}
    assert formats({"layers": layers}) == {"0": ("weight_fp16",), "3": ("weight_fp16",)}


# what each format does to four layers of one size, and the milliseconds of one
DAMAGES = {
    "robust": {"weight_int4": 1e-3, "static_int8": 4e-4, "dynamic_int8": 3e-4, "weight_fp16": 1e-7},
    "middling": {"weight_int4": 2.0, "static_int8": 3e-3, "dynamic_int8": 2e-3, "weight_fp16": 0.0},
    "tender": {"weight_int4": 4.0, "static_int8": 1.0, "dynamic_int8": 0.5, "weight_fp16": 1e-5},
    "vanishing": {"weight_int4": 5.0, "static_int8": 2.0, "dynamic_int8": 1.5, "weight_fp16": 0.1},
}
LATENCIES = {"": 4.0, "weight_fp16": 4.0, "weight_int4": 4.1, "dynamic_int8": 1.5}


def latency(_: str, state: LayerState) -> float:
    return LATENCIES.get(state.format, 1.0)


def chosen(damage_limit: float, latency_limit: float | None = None) -> dict[str, str]:
    """The format of each layer with the fewest bytes; checked by trying every combination."""
    model = nn.ModuleDict({name: nn.Linear(64, 64) for name in DAMAGES})
    choices = [
        Choice("quantization", layer, {"format": form})
        for layer, forms in possible_formats(list(DAMAGES), model, "compression").items()
        for form in forms
    ]
    effects = {choice.key: {choice.site: stated_change(choice)} for choice in choices}
    states = {name: layer_state(layer) for name, layer in costly_layers(model).items()}
    space = Space(choices, effects, states)  # type: ignore[arg-type]
    damage = {choice.key: DAMAGES[choice.site][choice.setting["format"]] for choice in choices}
    limits = [] if latency_limit is None else [(latency, latency_limit)]
    problem = space.problem(damage, size_cost(costly_layers(model)), limits)
    options = least_cost(problem, damage_limit)
    assert options is not None
    counts = [range(len(site.damage)) for site in problem.sites]
    fitting = [o for o in itertools.product(*counts) if is_fitting(problem, o, damage_limit)]
    assert problem.cost(options) == min(map(problem.cost, fitting))
    return {choice.site: choice.setting["format"] for choice in space.plan(options)}


def is_fitting(problem: Problem, options: Sequence[int], damage_limit: float) -> bool:
    within = [
        sum(float(f.cost[tuple(options[s] for s in f.sites)]) for f in factors) <= bound
        for factors, bound in problem.limits
    ]
    return problem.damage(options) <= damage_limit and all(within)


def test_four_eight_sixteen_bits_and_float_are_each_chosen_where_the_damage_says_so() -> None:
    assert chosen(0.01) == {
        "robust": "weight_int4",
        "middling": "dynamic_int8",  # as many bytes as static_int8, and less damage
        "tender": "weight_fp16",
    }
    assert chosen(0.2)["vanishing"] == "weight_fp16"
    assert set(chosen(100.0).values()) == {"weight_int4"}


def test_a_limit_of_latency_takes_eight_bits_where_four_would_be_smaller() -> None:
    # float and 16 bits take 4 ms, so two layers have to be faster
    assert chosen(0.01, latency_limit=10.6) == {
        "robust": "static_int8",
        "middling": "dynamic_int8",
        "tender": "weight_fp16",
    }
    assert chosen(0.01, latency_limit=11.0)["robust"] == "dynamic_int8"
