"""Which formats the user and the target allow, and which are chosen of them."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import nn

from compressor.config import Config
from compressor.errors import ConfigError
from compressor.export.post_training import PostTraining
from compressor.frameworks.deployment import Deployment
from compressor.frameworks.layer_costs import (
    costly_layers,
    layer_state,
    size_cost,
    stated_change,
    stored_layers,
)
from compressor.frameworks.layer_formats import (
    Site,
    allowed_formats,
    possible_formats,
    sites,
)
from compressor.frameworks.numbers import Numbers
from compressor.interfaces.inputs import ModelInputs
from compressor.quantization.plan import LayerFormat, find_format
from compressor.quantization.scheme import WEIGHT
from compressor.result import Choice
from compressor.search.allocate import Problem, least_cost
from compressor.search.space import LayerState, Space

MODEL = nn.Sequential(
    nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3, groups=8), nn.Linear(8, 2)
)
LAYERS = ["0", "1", "2", "3"]


def sites_of(model: nn.Module, sample: torch.Tensor) -> dict[str, Site]:
    return sites(PostTraining(model, ModelInputs((sample,))).graph, model)


SITES = sites_of(MODEL, torch.rand(2, 3, 12, 12))
POSSIBLE = possible_formats(SITES, "latency")


def allowed(custom: object) -> list[str]:
    return list(formats(custom))


def formats(custom: object) -> dict[str, tuple[str, ...]]:
    config = Config.from_dict({"custom_compression": custom} if custom is not None else {})
    return allowed_formats(POSSIBLE, SITES, MODEL, config.custom_compression)


def test_convolutions_have_no_dynamic_kernel_and_bytes_alone_are_worth_four_bits() -> None:
    assert POSSIBLE["0"] == ("static_int8",)
    assert POSSIBLE["3"] == ("static_int8", "dynamic_int8")
    in_bytes = possible_formats(SITES, "compression")
    assert in_bytes["0"] == ("static_int8", "weight_fp16")
    assert in_bytes["3"] == ("static_int8", "dynamic_int8", "weight_int4", "weight_fp16")
    assert possible_formats(SITES, "macs") == {}


def test_a_weight_that_float16_cannot_say_is_not_tried_in_it() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    with torch.no_grad():
        model.get_parameter("1.weight")[0, 0] = 70000.0
    found = possible_formats(sites_of(model, torch.rand(3, 2)), "compression")
    assert [name for name, formats in found.items() if "weight_fp16" in formats] == ["0"]


TEXT = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 8))
TEXT_SITES = sites_of(TEXT, torch.arange(5))


def test_embeddings_have_weights_of_few_bits_where_bytes_count() -> None:
    assert possible_formats(TEXT_SITES, "latency").keys() == {"1"}
    assert possible_formats(TEXT_SITES, "quantization")["0"] == ("weight_int8",)
    in_bytes = possible_formats(TEXT_SITES, "compression")
    assert in_bytes["0"] == ("weight_int8", "weight_int4", "weight_fp16")
    custom = Config.from_dict({"custom_compression": {"layers": {"0": {"precision": 4}}}})
    named = allowed_formats(in_bytes, TEXT_SITES, TEXT, custom.custom_compression)
    assert named == {"0": ("weight_int4",)}
    half = {"custom_compression": {"quantization_args": {"skip_layers_ratio": 0.5}}}
    custom = Config.from_dict(half)
    kept = allowed_formats(in_bytes, TEXT_SITES, TEXT, custom.custom_compression)
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
        allowed_formats({}, {}, model, config.custom_compression)


def test_two_to_seven_bits_multiply_activations_of_eight() -> None:
    for bits in (2, 3, 5, 6, 7):
        (form,) = formats({"layers": {"0": {"precision": bits}}})["0"]
        assert find_format(form) == LayerFormat(WEIGHT.with_bits(bits))
        assert formats({"layers": {"3": {"precision": bits}}}) == {"3": (form,)}
    with pytest.raises(ConfigError, match=r"12 bits in '0'.*2, 3, 4, 5, 6, 7, 8, 16 and 32"):
        formats({"layers": {"0": {"precision": 12}}})


def test_four_bits_have_blocks_in_linear_layers_alone() -> None:
    assert formats({"layers": {"3": {"precision": 4}}}) == {"3": ("weight_int4",)}
    assert formats({"layers": {"0": {"precision": 4}}}) == {"0": ("w4a8",)}


class Recurrent(nn.Module):
    """An LSTM before a linear layer, and attention behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 8, batch_first=True)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x, _ = self.lstm(x)
        x, _ = self.attention(x, x, x, need_weights=False)
        out: torch.Tensor = self.head(x)
        return out


def test_lstms_and_attention_have_formats_where_bytes_decide() -> None:
    model = Recurrent().eval()
    found = sites_of(model, torch.rand(2, 3, 4))
    assert list(found) == ["lstm", "attention", "attention.out_proj", "head"], "as they run"
    in_bytes = possible_formats(found, "compression")
    assert in_bytes["lstm"] == ("dynamic_int8", "weight_fp16")
    assert in_bytes["attention"] == in_bytes["head"]
    assert possible_formats(found, "quantization")["lstm"] == ("dynamic_int8",)
    latency = possible_formats(found, "latency")
    assert "lstm" not in latency, "its time is not measured alone"
    assert latency["attention"] == ("static_int8", "dynamic_int8")
    named = {"custom_compression": {"layers": {"lstm": {"precision": 8}}}}
    custom = Config.from_dict(named).custom_compression
    assert allowed_formats(latency, found, model, custom) == {"lstm": ("dynamic_int8",)}
    few = Config.from_dict({"custom_compression": {"layers": {"lstm": {"precision": 4}}}})
    with pytest.raises(ConfigError, match="This layer has 8, 16 and 32"):
        allowed_formats(latency, found, model, few.custom_compression)


class Conv1D(nn.Module):
    """As the one of transformers: a linear layer whose weight is (in, out)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(4, 8))
        self.bias = nn.Parameter(torch.rand(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.addmm(self.bias, x, self.weight)


def test_a_linear_layer_of_another_class_has_the_formats_of_linear_layers() -> None:
    model = nn.Sequential(Conv1D(), nn.Linear(8, 8))
    assert stored_layers(model).keys() == {"0", "1"}
    found = sites_of(model, torch.rand(3, 4))
    for optimization in ("latency", "compression", "quantization"):
        formats = possible_formats(found, optimization)
        assert formats["0"] == formats["1"]
        assert "dynamic_int8" in formats["0"]


def test_where_all_layers_are_skipped_the_option_is_named(tmp_path: Path) -> None:
    for options, expected in (
        ({"skip_layers_ratio": 1.0}, "skip_layers_ratio=1: write a smaller one"),
        ({"skip_layers": [0, 3]}, "or fewer skip_layers"),
    ):
        given = {"optimization": "latency", "custom_compression": {"quantization_args": options}}
        config, told = Config.from_dict(given), list[str]()
        inputs = ModelInputs((torch.rand(2, 3, 12, 12),))
        deployment = Deployment(config.target, tmp_path)
        numbers = Numbers(config, deployment, MODEL, inputs, [inputs], told.append)
        assert numbers.formats == {}
        assert len(told) == 1
        assert "None of the 4 layers" in told[0]
        assert expected in told[0]


def test_bytes_of_lstms_and_of_attention_are_those_of_their_parameters() -> None:
    model = Recurrent()
    layers = stored_layers(model)
    cost = size_cost(layers)
    whole = sum(cost(name, layer_state(layer)) for name, layer in layers.items())
    assert whole == sum(4 * parameter.numel() for parameter in model.parameters())
    change = stated_change(Choice("quantization", "lstm", {"format": "dynamic_int8"}))
    assert change is not None
    state = change.applied_to(layer_state(layers["lstm"]))
    assert cost("lstm", state) == (32 * 4 + 32 * 8) + 4 * 64, "matrices, and two biases in float"


def test_a_position_that_no_layer_has_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"has 99, and 4 layers can be quantized.* 0 to 3"):
        allowed({"quantization_args": {"skip_layers": [0, 99]}})


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
    model = nn.Sequential(OrderedDict((name, nn.Linear(64, 64)) for name in DAMAGES))
    layers = sites_of(model, torch.rand(2, 64))
    choices = [
        Choice("quantization", layer, {"format": form})
        for layer, forms in possible_formats(layers, "compression").items()
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
