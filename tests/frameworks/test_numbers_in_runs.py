"""A run of the engine whose numbers have too few bits to be only calibrated."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from compressor.cli.demo import digit_loaders
from compressor.frameworks.quantized_training import load_plan
from compressor.quantization import plan
from compressor.quantization.scheme import WEIGHT
from compressor.testing.models import TinyResNet
from tests.runs import accuracy, compress, fit

pytestmark = pytest.mark.slow


def answers_of(model: nn.Module, loader: Any) -> Tensor:
    with torch.no_grad():
        return torch.cat([model(images).argmax(1) for images, _ in loader])


def test_numbers_outside_delta_are_trained_and_the_file_has_what_they_learned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    coarse = {"static_int8": plan.LayerFormat(WEIGHT.with_bits(2))}
    monkeypatch.setattr(plan, "FILE_FORMATS", {**plan.FILE_FORMATS, **coarse})
    # corrected by the calibration they would be within delta, and need no training
    monkeypatch.setattr("compressor.targets.onnxruntime.default_corrections", lambda _: ())
    torch.manual_seed(0)
    loaders = digit_loaders()
    train, test = (loaders[split].dataset for split in ("train", "test"))
    data = {
        "train": DataLoader(TensorDataset(*train[:512]), 64, shuffle=True),
        "test": DataLoader(TensorDataset(*test[:200]), 100),
    }
    model = TinyResNet()
    fit(model, [batch for _ in range(8) for batch in data["train"]])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    result = compress(
        model,
        data,
        tmp_path,
        delta=12.0,
        optimization="quantization",
        fine_tuner={"optimizer": {"name": "SGD", "lr": 0.05}, "epochs": 4},
        full_trainer={"optimizer": {"name": "SGD", "lr": 0.02}, "epochs": 1},
    )
    first = result.variants[0]  # calibrated alone
    assert first.metrics["accuracy"] < result.certificate.reference_metric - 12.0
    assert len(result.plan) > 0
    assert all(choice.setting["trained"] for choice in result.plan)
    assert result.certificate.within_delta
    assert type(result.model) is TinyResNet
    assert math.isclose(
        accuracy(result.runtime_model(), data["test"])["accuracy"], result.certificate.metric
    )
    agreement = result.certificate.agreement
    assert agreement is not None
    assert agreement.simulation_differs_fraction <= 0.01
    answers = [answers_of(each, data["test"]) for each in (result.runtime_model(), model)]
    assert agreement.reference_differs_fraction == (answers[0] != answers[1]).float().mean()
    assert agreement.samples == 200
    assert hasattr(load_plan(nn.Module(), result.artifacts["model_dir"]), "compressor_quantization")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), "the user's model is as it was"
