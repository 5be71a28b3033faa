from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compressor.errors import ExportError
from compressor.export.signature import Signature
from compressor.interfaces.inputs import ModelInputs


class Nested(nn.Module):
    def forward(self, x: Tensor, pair: Any = None, *, scale: float = 1.0) -> Any:
        return {"sum": x + pair["b"], "none": None, "many": [x, (pair["a"], 3)]}


def tensors(count: int) -> list[Tensor]:
    return [torch.full((2,), float(i)) for i in range(count)]


@pytest.fixture
def signature() -> Signature:
    x, a, b = tensors(3)
    inputs = ModelInputs((x,), {"pair": {"a": a, "b": b}, "scale": 2.0})
    return Signature.of(Nested(), inputs, inputs.call(Nested()))


def test_it_survives_json(signature: Signature) -> None:
    assert Signature.from_json(signature.to_json()) == signature


def test_a_call_is_flattened_alike_by_position_and_by_keyword(signature: Signature) -> None:
    x, a, b = tensors(3)
    positional = ModelInputs((x, {"b": b, "a": a}))
    keyword = ModelInputs((), {"pair": {"a": a, "b": b}, "x": x})
    for call in (positional, keyword):
        assert [float(tensor[0]) for tensor in signature.flatten(call)] == [0, 1, 2]


def test_results_are_restored_with_what_is_no_tensor(signature: Signature) -> None:
    total, x, a = tensors(3)
    result = signature.unflatten([total, x, a])
    assert result["sum"] is total
    assert result["none"] is None
    assert result["many"][0] is x
    assert result["many"][1] == (a, 3)


def test_names_come_from_arguments_and_keys(signature: Signature) -> None:
    assert signature.input_names() == ["x", "a", "b"]
    assert signature.output_names() == ["output_0", "output_1", "output_2"]


def test_one_tensor_in_and_out_are_input_and_output() -> None:
    inputs = ModelInputs((torch.zeros(1),))
    signature = Signature.of(nn.Identity(), inputs, torch.zeros(1))
    assert (signature.input_names(), signature.output_names()) == (["input"], ["output"])


def test_an_output_that_is_called_like_an_input_has_another_name() -> None:
    x, y = tensors(2)
    inputs = ModelInputs((), {"x": x, "pair": {"y": y}})
    signature = Signature.of(Nested(), inputs, {"x": x, "z": y})
    assert signature.output_names() == ["output_x", "z"]


def test_other_tensors_than_the_exported_ones_are_an_error(signature: Signature) -> None:
    with pytest.raises(ExportError, match=r"takes the tensors \['x', 'pair/a', 'pair/b'\]"):
        signature.flatten(ModelInputs((torch.zeros(2),)))


def test_an_output_that_no_file_can_hold_is_an_error() -> None:
    with pytest.raises(ExportError, match="cannot be described in a file"):
        Signature.of(nn.Identity(), ModelInputs((torch.zeros(1),)), (torch.zeros(1), object()))
