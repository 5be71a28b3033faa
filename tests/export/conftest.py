"""A residual network as an ONNX file, written by hand: without the exporter a test is quick."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from compressor.interfaces.inputs import ModelInputs

CONVOLUTIONS = ("stem", "block.conv1", "block.conv2", "last")


def residual_network() -> onnx.ModelProto:
    """stem, ReLU, (conv1, ReLU, conv2) + x, ReLU, last, ReLU, pool, head: 16 channels, 8x8."""
    rng = np.random.default_rng(0)
    sizes = {"stem": (16, 3, 3, 3), **{name: (16, 16, 3, 3) for name in CONVOLUTIONS[1:]}}
    constants = {"head.weight": rng.standard_normal((10, 16)) / 4, "head.bias": np.arange(10) / 10}
    for name, size in sizes.items():
        constants[f"{name}.weight"] = rng.standard_normal(size) / np.sqrt(np.prod(size[1:]))
        constants[f"{name}.bias"] = rng.standard_normal(16) / 10

    def conv(name: str, source: str, result: str) -> onnx.NodeProto:
        inputs = [source, f"{name}.weight", f"{name}.bias"]
        return helper.make_node("Conv", inputs, [result], name=f"node_{name}", pads=[1, 1, 1, 1])

    def node(kind: str, inputs: str, result: str, **attributes: int) -> onnx.NodeProto:
        return helper.make_node(kind, inputs.split(), [result], name=f"node_{result}", **attributes)

    nodes = [
        conv("stem", "input", "a"),
        node("Relu", "a", "stream"),
        conv("block.conv1", "stream", "b"),
        node("Relu", "b", "inner"),
        conv("block.conv2", "inner", "branch"),
        node("Add", "branch stream", "sum"),
        node("Relu", "sum", "joined"),
        conv("last", "joined", "c"),
        node("Relu", "c", "features"),
        node("GlobalAveragePool", "features", "pooled"),
        node("Flatten", "pooled", "flat"),
        node("Gemm", "flat head.weight head.bias", "output", transB=1),
    ]
    graph = helper.make_graph(
        nodes,
        "residual",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 3, 8, 8])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, ["batch", 10])],
        [numpy_helper.from_array(v.astype(np.float32), k) for k, v in constants.items()],
    )
    opset = helper.make_opsetid("", 20)
    return helper.make_model(graph, opset_imports=[opset], ir_version=10)


@pytest.fixture
def float_path(tmp_path: Path) -> Path:
    """The network in a file."""
    path = tmp_path / "float.onnx"
    onnx.save(residual_network(), path)
    return path


@pytest.fixture
def images() -> torch.Tensor:
    """(16, 3, 8, 8)."""
    return torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def batches(images: torch.Tensor) -> list[ModelInputs]:
    """The images in two batches."""
    return [ModelInputs((images[:10],)), ModelInputs((images[10:],))]
