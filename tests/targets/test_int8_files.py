from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from compressor.export.qdq import integer_kernels
from compressor.interfaces.inputs import ModelInputs
from compressor.targets.int8_files import Int8Files
from compressor.targets.layer_file import write_layer


@pytest.fixture
def float_path(tmp_path: Path) -> Path:
    write_layer(nn.Conv2d(4, 8, 3), (1, 4, 8, 8), tmp_path / "float.onnx")
    return tmp_path / "float.onnx"


def test_one_calibration_serves_every_choice_of_layers(float_path: Path, tmp_path: Path) -> None:
    def calibration() -> Iterator[ModelInputs]:  # can be read only once
        yield ModelInputs((torch.rand(2, 4, 8, 8),))

    files = Int8Files(float_path, calibration())
    assert files.layers == Int8Files.layers_of(float_path) == ["layer"]
    in_int8 = files.write(tmp_path / "int8.onnx", files.layers)
    in_float = files.write(tmp_path / "none.onnx", [])
    assert integer_kernels(in_int8.path)["QLinearConv"] == 1
    assert "QLinearConv" not in integer_kernels(in_float.path)
    assert in_float.int8_layers == ()
