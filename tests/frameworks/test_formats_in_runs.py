"""A run of the engine for bytes, with layers of 16 bits."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from onnx import TensorProto
from torch.utils.data import DataLoader, TensorDataset

from compressor.cli.demo import digit_loaders
from compressor.testing.models import TinyMLP, TinyTransformer
from tests.runs import compress, fit


@pytest.mark.slow
def test_layers_of_which_16_bits_are_asked_have_half_the_bytes_in_the_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    loaders = digit_loaders()
    data = {
        split: DataLoader(TensorDataset(*loaders[split].dataset[:128]), 64)
        for split in ("train", "test")
    }
    model = fit(TinyMLP(hidden=128), 5 * list(data["train"]))
    result = compress(
        model,
        data,
        tmp_path,
        delta=2.0,
        optimization="compression",
        techniques=["quantization"],
        custom_compression={"layers": {name: {"precision": 16} for name in ("fc1", "fc2")}},
        export={"format": ["onnx"], "precision": "bf16"},
    )
    formats = {choice.site: choice.setting["format"] for choice in result.plan}
    assert formats == {"fc1": "weight_fp16", "fc2": "weight_fp16"}
    assert result.certificate.within_delta
    assert result.certificate.size_ratio > 1.7
    stored = {
        tuple(item.dims): item.data_type
        for item in onnx.load(result.artifacts["onnx"]).graph.initializer
    }
    assert stored[128, 64] == stored[128, 128] == TensorProto.FLOAT16
    assert stored[10, 128] == TensorProto.FLOAT, "it was not asked for"
    onnx.checker.check_model(onnx.load(result.artifacts["onnx_bf16"]), full_check=True)


@pytest.mark.slow
def test_a_run_for_bytes_stores_an_embedding_in_few_bits(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tokens = torch.randint(300, (128, 8))
    labels = (tokens < 150).sum(1).gt(4).long()
    loader = DataLoader(TensorDataset(tokens, labels), 64)
    result = compress(
        TinyTransformer(vocabulary=300, depth=1).eval(),
        {"train": loader, "test": loader},
        tmp_path,
        delta=20.0,
        optimization="compression",
        techniques=["quantization"],
        custom_compression={"layers": {"embedding": {"precision": 8}}},
    )
    assert [(c.site, c.setting["format"]) for c in result.plan] == [("embedding", "weight_int8")]
    stored = {
        tuple(item.dims): item.data_type
        for item in onnx.load(result.artifacts["onnx"]).graph.initializer
    }
    assert stored[300, 16] == TensorProto.INT8
    files = [result.artifacts[name].stat().st_size for name in ("onnx_float", "onnx")]
    assert files[0] - files[1] > 300 * 16 * 2, "three bytes of each entry, but for the scales"
