"""Linear layers in eight bits through torchao, against the formulas written out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from compressor.config import Config, TargetConfig
from compressor.errors import CheckpointError, ConfigError, ModelError
from compressor.export.post_training import PostTraining
from compressor.frameworks.deployment import Deployment
from compressor.frameworks.numbers import Numbers
from compressor.interfaces.inputs import ModelInputs
from compressor.quantization.affine import quantize
from compressor.quantization.plan import (
    DYNAMIC_INT8,
    STATIC_INT8,
    WEIGHT_INT8,
    QuantizationPlan,
    TensorPlan,
)
from compressor.result import Choice, Plan
from compressor.structure.archive import packed_size_bytes
from compressor.targets import InductorTarget, torchao_formats
from compressor.targets.torchao_formats import clamp_weights, quantize_linear, restore, save
from compressor.testing.models import TinyMLP


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def rounded(x: Tensor, most: int = 127) -> Tensor:
    """To int8 with a scale for each row, the largest entry half a step beyond the last."""
    scale = x.abs().amax(-1, keepdim=True) / (most + 0.5)
    # not x / scale: for the largest entry it is another side of a tie
    return (x * (1 / scale)).round().clamp(-most - 1, most) * scale


def in_float8(x: Tensor) -> Tensor:
    """To e4m3, the largest entry of each row at 448."""
    scale = x.abs().amax(-1, keepdim=True) / 448
    return (x / scale).to(torch.float8_e4m3fn).float() * scale


def encoder() -> nn.TransformerEncoder:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 1, enable_nested_tensor=False).eval()


@pytest.fixture(autouse=True)
def products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests say whether sums saturate; else they would compute otherwise on other CPUs."""
    saturate = getattr(request, "param", False)
    monkeypatch.setattr(torchao_formats, "is_saturating", lambda _: saturate)


@torch.no_grad()
@pytest.mark.parametrize("form", ["dynamic_int8", "weight_int8", "weight_fp8"])
def test_a_layer_computes_what_its_format_says(form: str) -> None:
    model = nn.Sequential(nn.Linear(32, 48), nn.Linear(48, 16)).eval()
    x, (first, second) = noise(3, 5, 32), model
    weight = in_float8(first.weight) if form == "weight_fp8" else rounded(first.weight)
    expected = (rounded(x) if form == "dynamic_int8" else x) @ weight.T + first.bias
    expected = expected @ second.weight.T + second.bias
    before = model(x)
    quantize_linear(model, {"0": form})
    torch.testing.assert_close(model(x), expected)  # sums in another order
    assert (model(x) - before).norm() > 1e-4 * before.norm()


@torch.no_grad()
@pytest.mark.parametrize("products", [True], indirect=True)
def test_where_sums_would_saturate_numbers_have_a_bit_less() -> None:
    (layer,) = model = nn.Sequential(nn.Linear(32, 48)).eval()
    x = noise(5, 32)
    expected = rounded(x, 63) @ rounded(layer.weight, 63).T + layer.bias
    quantize_linear(model, {"0": "dynamic_int8"})
    torch.testing.assert_close(model(x), expected)
    assert InductorTarget().format("dynamic_int8").weight.qmax == 63
    assert InductorTarget().format("weight_int8").weight.qmax == 127


def test_what_is_no_linear_layer_is_refused_with_the_nearest_name() -> None:
    model = TinyMLP().eval()
    with pytest.raises(ModelError, match=r"no linear layer 'fc11'.* Did you mean 'fc1'"):
        quantize_linear(model, {"fc11": "dynamic_int8"})
    assert type(model.fc1.weight) is nn.Parameter


@torch.no_grad()
def test_attention_is_taken_apart_so_that_all_of_it_is_quantized() -> None:
    """torch's own attention fails on a torchao weight in its `out_proj`."""
    model, x = encoder(), noise(2, 7, 32)
    before = model(x)
    names = PostTraining(model, ModelInputs((x,))).layers
    assert names[:2] == ["layers.0.self_attn", "layers.0.self_attn.out_proj"]
    quantize_linear(model, dict.fromkeys(names, "dynamic_int8"))
    assert {type(m.weight).__name__ for m in model.modules() if isinstance(m, nn.Linear)} == {
        "Int8Tensor"
    }
    error = (model(x) - before).norm() / before.norm()
    assert 1e-4 < error < 0.02


@torch.no_grad()
def test_a_saved_model_is_restored_bit_for_bit(tmp_path: Path) -> None:
    model, x = encoder(), noise(2, 7, 32)
    formats = {"layers.0.linear1": "dynamic_int8", "layers.0.self_attn.out_proj": "weight_int8"}
    quantize_linear(model, formats)
    path = save(model, formats, tmp_path / "folder" / "weights.safetensors")
    other = encoder()
    for parameter in other.parameters():
        parameter.normal_(generator=torch.Generator().manual_seed(1))
    restore(other, path)
    assert torch.equal(other(x), model(x))


def test_a_file_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(16, 16)).eval()
    formats = {"0": "dynamic_int8"}
    quantize_linear(model, formats)
    path = save(model, formats, tmp_path / "weights.safetensors")
    with pytest.raises(CheckpointError, match=r"does not fit the model in .*0\.weight\.qdata"):
        restore(nn.Sequential(nn.Linear(16, 32)), path)
    with pytest.raises(CheckpointError, match="missing or damaged"):
        restore(model, tmp_path / "no_such_file")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="missing or damaged"):
        restore(nn.Sequential(nn.Linear(16, 16)), path)


@pytest.mark.parametrize("products", [False, True], indirect=True)
def test_steps_that_were_learned_are_those_of_the_deployed_weight() -> None:
    """torchao finds scales by the largest value, which training may have put beyond the range."""
    model = nn.Sequential(nn.Linear(16, 8)).eval()
    weight = model[0].weight.detach().clone()
    scheme = InductorTarget().format("dynamic_int8").weight
    scale = weight.abs().amax(1) / (2 * scheme.qmax)  # half of the values are cut
    plan = TensorPlan(scheme, scale, torch.zeros(8, dtype=torch.int32))
    integers = quantize(weight, plan.scale, plan.zero_point, plan.scheme)
    clamp_weights(model, {"0.weight": plan})
    quantize_linear(model, {"0": "dynamic_int8"})
    deployed = model[0].weight
    torch.testing.assert_close(deployed.scale.flatten(), plan.scale)
    assert torch.equal(deployed.qdata.clamp(min=scheme.qmin).int(), integers)


def test_the_search_sees_the_formats_of_linear_layers_and_senses_them_as_they_are_deployed(
    tmp_path: Path,
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(4 * 6 * 6, 10)).eval()
    inputs = ModelInputs((noise(2, 1, 8, 8),))
    config = Config.from_dict({"optimization": "latency", "target": {"runtime": "inductor"}})
    deployment = Deployment(TargetConfig(runtime="inductor"), tmp_path)
    numbers = Numbers(config, deployment, model, inputs, [inputs], [].append)
    assert numbers.formats == {"2": ("dynamic_int8",)}
    assert numbers.static_layers == []
    simulated = numbers.simulate(Plan((Choice("quantization", "2", {"format": "dynamic_int8"}),)))
    assert type(simulated[2].weight).__name__ == "Int8Tensor"
    assert type(model[2].weight) is nn.Parameter
    features = model[:2](*inputs.args)
    with torch.no_grad():
        expected = rounded(features) @ rounded(model[2].weight).T + model[2].bias
        torch.testing.assert_close(simulated(*inputs.args), expected)


def test_formats_that_it_lacks_are_refused_before_any_work(tmp_path: Path) -> None:
    target = InductorTarget()
    wanted = {"fc1": DYNAMIC_INT8, "fc2": STATIC_INT8}
    with pytest.raises(ConfigError, match=r"'fc2' in static_int8 on cpu.* can have dynamic_int8"):
        target.deploy(TinyMLP(), ModelInputs((noise(2, 64),)), tmp_path / "folder", formats=wanted)
    assert not (tmp_path / "folder").exists()


@pytest.mark.slow
def test_a_compiled_model_in_int8_computes_what_was_sensed_and_opens_again(tmp_path: Path) -> None:
    model = TinyMLP()
    inputs = ModelInputs((noise(4, 64),))
    target = InductorTarget(batch_size=4)
    quantizer = PostTraining(model, inputs)
    formats = {"fc1": DYNAMIC_INT8, "fc2": WEIGHT_INT8}
    deployed = target.deploy(model, inputs, tmp_path, formats=QuantizationPlan(formats))
    assert deployed.size_bytes == deployed.files["torchao"].stat().st_size
    assert deployed.size_bytes < 0.5 * packed_size_bytes(model)
    with torch.no_grad():
        simulated = inputs.call(target.simulate(quantizer, formats))
        torch.testing.assert_close(inputs.call(deployed.module), simulated)
        assert deployed.simulate is not None
        assert torch.equal(inputs.call(deployed.simulate()), simulated)
        opened = target.open(TinyMLP().eval(), deployed.files)
        torch.testing.assert_close(inputs.call(opened), inputs.call(deployed.module))
    timing = target.measure({"model": deployed.module}, inputs)["model"]
    assert timing.best_ms > 0


@pytest.mark.slow
def test_a_format_is_timed_against_float_both_compiled() -> None:
    target = InductorTarget()
    share = target.layer_latency_ms(nn.Linear(16, 16), (8, 16), "weight_int8")
    assert share > 0
    assert any("weight_int8/float" in key for key in target._latencies._latencies)
