from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compressor.export.post_training import PostTraining
from compressor.export.qdq import export_quantized
from compressor.interfaces.inputs import ModelInputs
from compressor.quantization.kinds import reason_against
from compressor.quantization.model import QuantizedModel
from compressor.quantization.plan import DYNAMIC_INT8, STATIC_INT8, WEIGHT_INT4, LayerFormat

IMAGES = torch.rand(12, 2, 6, 6, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """A residual branch, a pool, and one linear layer that runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.branch = nn.Conv2d(2, 8, 3), nn.Conv2d(8, 8, 3, padding=1)
        self.twice = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.stem(x).relu()
        x = (x + self.branch(x)).relu().mean((2, 3))
        return {"logits": self.twice(self.twice(x))}


@cache
def simulated(form: LayerFormat) -> QuantizedModel:
    torch.manual_seed(0)
    inputs = ModelInputs((IMAGES,))
    quantizer = PostTraining(Net().eval(), inputs.with_batch(2), [inputs])
    kinds = quantizer.graph.kinds
    formats = {name: form for name in quantizer.layers if not reason_against(kinds[name], form)}
    return quantizer.simulate(formats).eval()


def make_model(form: LayerFormat = STATIC_INT8) -> QuantizedModel:
    return copy.deepcopy(simulated(form))


@pytest.mark.parametrize("form", [STATIC_INT8, DYNAMIC_INT8, WEIGHT_INT4])
def test_a_frozen_copy_computes_the_same(form: LayerFormat) -> None:
    model = make_model(form)
    before = copy.deepcopy(model.state_dict())
    frozen = model.frozen()
    with torch.no_grad():
        assert torch.equal(frozen(IMAGES)["logits"], model(IMAGES)["logits"])
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_a_frozen_copy_rounds_no_weight_and_no_bias_in_a_call() -> None:
    model = make_model()
    calls: list[str] = []
    for name, module in model.graph.quantizers.named_children():
        module.register_forward_hook(lambda *_, name=name: calls.append(name))
    frozen = model.frozen()
    calls.clear()
    frozen(IMAGES)
    assert calls
    assert not [name for name in calls if "weight" in name or "bias" in name]


def test_the_model_follows_its_parameters_and_the_frozen_copy_does_not() -> None:
    model = make_model()
    frozen = model.frozen()
    with torch.no_grad():
        expected = model(IMAGES)["logits"]
        model.get_parameter("graph.twice.weight").mul_(0.5)
        assert torch.equal(frozen(IMAGES)["logits"], expected)
        assert not torch.equal(model(IMAGES)["logits"], expected)
        assert torch.equal(model.frozen()(IMAGES)["logits"], model(IMAGES)["logits"])
    model.train()(IMAGES)["logits"].sum().backward()
    assert model.get_parameter("graph.twice.weight").grad is not None


def through_pickle(item: Any) -> Any:
    return pickle.loads(pickle.dumps(item))


def through_a_file_of_torch(item: Any) -> Any:
    file = io.BytesIO()
    torch.save(item, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("through", [through_pickle, through_a_file_of_torch])
@pytest.mark.parametrize("form", [STATIC_INT8, DYNAMIC_INT8, WEIGHT_INT4])
def test_a_pickled_model_computes_and_learns_the_same(
    form: LayerFormat, through: Callable[[Any], Any]
) -> None:
    model = make_model(form)
    other = through(model)
    assert not other.training
    assert other.plan().to_json() == model.plan().to_json()
    assert list(other.state_dict()) == list(model.state_dict())
    losses = []
    for each in (model, other):
        optimizer = torch.optim.SGD(each.train().parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            loss = each(IMAGES)["logits"].square().sum()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[:3] == losses[3:]
    assert losses[0] != losses[2]


@pytest.mark.slow
def test_a_pickled_model_writes_the_same_file(tmp_path: Path) -> None:
    model, inputs = make_model(), ModelInputs((IMAGES[:2],))
    files = [
        export_quantized(each, inputs, tmp_path / f"{number}.onnx").read_bytes()
        for number, each in enumerate((model, through_pickle(model)))
    ]
    assert files[0] == files[1]


def test_a_pickled_model_shares_its_tensors_with_its_source() -> None:
    model = through_pickle(simulated(STATIC_INT8))
    source = model.source.graph
    assert source.tensor("twice.weight") is model.get_parameter("graph.twice.weight")
    assert source.layers == ["stem", "branch", "twice"]
    assert source.sample_bytes() == make_model().source.graph.sample_bytes()


def test_a_copy_has_tensors_of_its_own() -> None:
    model = make_model()
    other = copy.deepcopy(model)
    with torch.no_grad():
        expected = model(IMAGES)["logits"]
        other.get_parameter("graph.twice.weight").zero_()
        assert torch.equal(model(IMAGES)["logits"], expected)
        assert not torch.equal(other(IMAGES)["logits"], expected)
