"""Which kind of layer can have which format: what is said is what `quantize` and torchao do."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from torch import nn

import compressor
from compressor.errors import ConfigError
from compressor.export.post_training import PostTraining
from compressor.interfaces.inputs import ModelInputs
from compressor.quantization.kinds import LABELS, Kind, reason_against
from compressor.quantization.plan import FILE_FORMATS, FP8_FORMATS, LayerFormat, find_format
from compressor.quantization.scheme import FLOAT, WEIGHT

KINDS = get_args(Kind)


class Four(nn.Module):
    """A layer of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 32)
        self.convolution = nn.Conv1d(4, 4, 1)
        self.lstm = nn.LSTM(32, 8, batch_first=True)
        self.linear = nn.Linear(8, 2)

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        x, _ = self.lstm(self.convolution(self.table(words)))
        out: torch.Tensor = self.linear(x)
        return out


WORDS = torch.arange(8).remainder(5).reshape(2, 4)
MODEL = Four().eval()
QUANTIZER = PostTraining(MODEL, ModelInputs((WORDS,)), [ModelInputs((WORDS,))])


def test_a_graph_knows_the_kind_of_each_layer_in_the_order_in_which_they_run() -> None:
    assert list(QUANTIZER.graph.kinds.items()) == [
        (kind, kind) for kind in ("convolution", "lstm", "linear", "table")
    ]
    assert LABELS.keys() == set(KINDS)


@pytest.mark.parametrize("name", FILE_FORMATS)
def test_a_plan_is_refused_exactly_where_there_is_a_reason(name: str) -> None:
    form = find_format(name)
    for kind in KINDS:
        reason = reason_against(kind, form)
        if reason is None:
            assert QUANTIZER.plan({kind: form}).formats == {kind: form}
        else:
            with pytest.raises(ConfigError) as raised:
                QUANTIZER.plan({kind: form})
            assert (
                str(raised.value)
                == f"The {LABELS[kind]} {kind!r} cannot have this format. {reason}"
            )


def test_what_linear_layers_cannot_have_no_layer_can() -> None:
    every = [*FILE_FORMATS.values(), *FP8_FORMATS.values()]
    for runtime in ("onnxruntime", "tensorrt", "inductor"):
        for form in every:
            if reason_against("linear", form, runtime) is not None:
                assert all(reason_against(kind, form, runtime) for kind in KINDS)


def test_each_runtime_has_its_own() -> None:
    def able(kind: Kind, runtime: str) -> set[str]:
        every = {**FILE_FORMATS, **FP8_FORMATS}
        return {name for name in every if reason_against(kind, every[name], runtime) is None}

    few = {f"w{bits}a8" for bits in range(2, 8)}
    halves = {"weight_fp16", "weight_bf16"}
    assert able("linear", "onnxruntime") == set(FILE_FORMATS)
    assert able("convolution", "onnxruntime") == {"static_int8", "weight_int8", *few, *halves}
    assert able("lstm", "onnxruntime") == {"dynamic_int8", "weight_int8", *halves}
    assert able("table", "onnxruntime") == {"weight_int8", "weight_int4", *halves}
    in_torch = {"dynamic_int8", "weight_int8", "dynamic_fp8", "weight_fp8"}
    assert able("linear", "inductor") == in_torch
    assert not able("convolution", "inductor")
    eight = {"static_int8", "w5a8", "w6a8", "w7a8"}  # fewer are stored in int4
    assert able("linear", "tensorrt") == able("convolution", "tensorrt") == eight
    assert not able("table", "tensorrt")
    assert not able("lstm", "tensorrt")


def test_few_bits_have_names() -> None:
    assert find_format("w3a8") == LayerFormat(WEIGHT.with_bits(3))
    quantized = compressor.quantize(MODEL, [WORDS], format="w3a8", layers=["convolution"])
    assert quantized.plan.weights["convolution.weight"].scheme.bits == 3


@pytest.mark.parametrize("activations", ["static", "float"])
def test_thirty_two_bits_are_no_format(activations: str) -> None:
    with pytest.raises(ConfigError, match="32 bits, which is float"):
        LayerFormat(FLOAT, activations)  # type: ignore[arg-type]


def refusal(**options: object) -> str:
    with pytest.raises(ConfigError) as raised:
        compressor.quantize(MODEL, [WORDS], **options)  # type: ignore[arg-type]
    return str(raised.value)


def test_what_is_no_format_is_refused_with_what_it_is() -> None:
    assert "format=None is no format" in refusal(format=None)
    assert "format=8 is no format" in refusal(format=8)
    assert "format=8 is no format" in refusal(format={"linear": 8})
    assert "`format` is the Scheme of a weight" in refusal(format=WEIGHT)
    unknown = refusal(format="int8")
    assert "There is no format 'int8'" in unknown
    assert "w4a8" in unknown
    assert "fp8" not in unknown, "no file has them"


def test_names_without_a_layer_say_so() -> None:
    normed = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2)).eval()
    images = torch.rand(2, 1, 4, 4)
    with pytest.raises(ConfigError, match=r"names '1', and nothing.* a norm is folded"):
        compressor.quantize(normed, [images], layers=["1"])
    assert "`layers` is empty" in refusal(layers=[])
    assert "the name '', which is the whole model" in refusal(ignored=[""])


def test_a_model_that_is_one_convolution_is_refused_in_words() -> None:
    with pytest.raises(ConfigError, match=r"of the model, which is one layer: .*ConvInteger"):
        compressor.quantize(
            nn.Conv2d(1, 2, 1).eval(), [torch.rand(2, 1, 4, 4)], format="dynamic_int8"
        )
