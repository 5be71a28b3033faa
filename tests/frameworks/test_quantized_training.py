"""Variants trained through the rounding of their numbers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compressor.errors import ModelError
from compressor.export.post_training import PostTraining
from compressor.frameworks.quantized_training import (
    learned_plan,
    load_plan,
    save_plan,
    train_quantized,
)
from compressor.interfaces.inputs import ModelInputs
from compressor.quantization.model import QuantizedModel
from compressor.quantization.plan import LayerFormat
from compressor.quantization.scheme import WEIGHT
from compressor.structure import archive
from compressor.testing.models import TinyResNet

IMAGES = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(0))
INPUTS = ModelInputs((IMAGES,))
COARSE = LayerFormat(WEIGHT.with_bits(3))
pytestmark = pytest.mark.slow


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return TinyResNet().eval()


def loss(model: nn.Module) -> Tensor:
    return F.mse_loss(model(IMAGES), torch.zeros(8, 10))


def fit(model: nn.Module) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(5):
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()


def train(model: nn.Module, fit: Any = fit, loss: Any = loss) -> dict[str, LayerFormat]:
    layers = PostTraining(model, INPUTS).layers
    formats = dict.fromkeys(layers, COARSE)
    train_quantized(model, formats, INPUTS, [INPUTS], fit, loss)
    return formats


def quantized(model: nn.Module) -> Tensor:
    plan = learned_plan(model)
    assert plan is not None
    with torch.no_grad():
        result: Tensor = QuantizedModel(PostTraining(model, INPUTS).graph, plan)(IMAGES)
    return result


def test_the_float_model_gets_what_its_quantized_form_has_learned(model: nn.Module) -> None:
    seen: list[float] = []

    def watched(tried: nn.Module) -> None:
        seen.append(loss(tried).item())
        fit(tried)
        seen.append(loss(tried).item())

    formats = train(model, watched)
    assert seen[1] < 0.8 * seen[0]
    assert learned_plan(model) is not None
    assert learned_plan(model).formats == formats  # type: ignore[union-attr]
    assert float(F.mse_loss(quantized(model), torch.zeros(8, 10))) == pytest.approx(seen[1])
    assert type(model) is TinyResNet


def test_it_comes_back_from_disk_with_its_scales(model: nn.Module, tmp_path: Path) -> None:
    reference = copy.deepcopy(model)
    train(model)
    archive.save(model, tmp_path, reference=reference)
    save_plan(model, tmp_path)
    loaded = load_plan(archive.load(tmp_path, reference), tmp_path)
    assert torch.equal(quantized(loaded), quantized(model))


def test_training_goes_on_from_the_scales_that_were_learned(model: nn.Module) -> None:
    train(model)
    before = quantized(model)
    formats = train(model, fit=lambda _: None)
    torch.testing.assert_close(quantized(model), before)
    assert formats


def test_a_loss_that_needs_the_user_s_class_is_refused(model: nn.Module) -> None:
    def asks_for_more(tried: Any) -> Tensor:
        return loss(tried) + tried.fc.weight.square().sum()

    with pytest.raises(ModelError, match="the loss fails on its graph"):
        train(model, loss=asks_for_more)
    assert learned_plan(model) is None
