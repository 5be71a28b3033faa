"""Which formats the user and the target allow."""

from __future__ import annotations

import pytest
from torch import nn

from compressor.config import Config
from compressor.errors import ConfigError
from compressor.frameworks.layer_formats import allowed_formats, possible_formats

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
    assert "weight_int4" in possible_formats(LAYERS, MODEL, "compression")["3"]
    assert possible_formats(LAYERS, MODEL, "macs") == {}


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
    with pytest.raises(ConfigError, match="This layer has 8 and 32"):
        formats({"layers": {"0": {"precision": 4}}})
