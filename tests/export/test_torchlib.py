"""Exports share what is read of ONNX Script, and nothing stays behind in torch."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.onnx._internal.exporter import _registration

from compressor.export.onnx import make_onnx
from compressor.export.torchlib import operations_read_once
from compressor.interfaces.inputs import ModelInputs

Source = _registration.onnxscript_apis


def test_the_list_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def find() -> list[int]:
        calls.append(1)
        return [1, 2]

    monkeypatch.setattr(Source, "get_torchlib_ops", find)
    for _ in range(2):
        with operations_read_once():
            Source.get_torchlib_ops().append(3)  # of this caller alone
            assert Source.get_torchlib_ops() == [1, 2]
    assert len(calls) == 1
    assert Source.get_torchlib_ops is find, "as it was"


def test_another_torch_makes_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(_registration, "onnxscript_apis")
    with operations_read_once():
        pass


@pytest.mark.slow
def test_two_exports_write_the_same() -> None:
    model, inputs = nn.Sequential(nn.Linear(4, 4), nn.ReLU()), ModelInputs((torch.randn(2, 4),))
    first, second = (make_onnx(model, inputs).SerializeToString() for _ in range(2))
    assert first == second
