"""A run of the engine for bytes, with layers of 16 bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import TensorProto
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from compressor import Engine, TorchForwardPass, TorchFramework
from compressor.cli.demo import digit_loaders
from compressor.testing.models import TinyMLP, TinyTransformer


def accuracy(model: nn.Module, loader: Any) -> dict[str, float]:
    right = [(model(images).argmax(1) == labels).float() for images, labels in loader]
    return {"accuracy": 100 * float(torch.cat(right).mean())}


@pytest.mark.slow
def test_layers_of_which_16_bits_are_asked_have_half_the_bytes_in_the_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    loaders = digit_loaders()
    data = {
        split: DataLoader(TensorDataset(*loaders[split].dataset[:128]), 64)
        for split in ("train", "test")
    }
    model = TinyMLP(hidden=128)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for images, labels in 5 * list(data["train"]):
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
    layers = {name: {"precision": 16} for name in ("fc1", "fc2")}
    engine = Engine(
        framework=TorchFramework(),
        data=data,
        model=model.eval(),
        config={
            "delta": 2.0,
            "optimization": "compression",
            "techniques": ["quantization"],
            "custom_compression": {"layers": layers},
            "run_dir": str(tmp_path),
            "device": "CPU",
            "progress": False,
            "budget": {"trials": 1},
            "fine_tuner": {"optimizer": {"name": "SGD", "lr": 0.01}, "epochs": 0},
            "full_trainer": {"optimizer": {"name": "SGD", "lr": 0.01}, "epochs": 0},
            "export": {"format": ["onnx"], "precision": "bf16"},
        },
        forward_pass=TorchForwardPass(model_input_pattern=(0, "_")),
        eval_func=accuracy,
        loss_function_cls=lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]),
    )
    engine.run()
    result = engine.result
    assert result is not None
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
    engine = Engine(
        framework=TorchFramework(),
        data={"train": loader, "test": loader},
        model=TinyTransformer(vocabulary=300, depth=1).eval(),
        config={
            "delta": 20.0,
            "optimization": "compression",
            "techniques": ["quantization"],
            "custom_compression": {"layers": {"embedding": {"precision": 8}}},
            "run_dir": str(tmp_path),
            "device": "CPU",
            "progress": False,
            "budget": {"trials": 1},
            "fine_tuner": {"optimizer": {"name": "SGD", "lr": 0.01}, "epochs": 0},
            "full_trainer": {"optimizer": {"name": "SGD", "lr": 0.01}, "epochs": 0},
        },
        forward_pass=TorchForwardPass(model_input_pattern=(0, "_")),
        eval_func=accuracy,
        loss_function_cls=lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]),
    )
    engine.run()
    result = engine.result
    assert result is not None
    assert [(c.site, c.setting["format"]) for c in result.plan] == [("embedding", "weight_int8")]
    stored = {
        tuple(item.dims): item.data_type
        for item in onnx.load(result.artifacts["onnx"]).graph.initializer
    }
    assert stored[300, 16] == TensorProto.INT8
    files = [result.artifacts[name].stat().st_size for name in ("onnx_float", "onnx")]
    assert files[0] - files[1] > 300 * 16 * 2, "three bytes of each entry, but for the scales"
