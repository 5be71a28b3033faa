"""`torch.compile` as a target; its layers in eight bits are in `test_torchao_formats`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import compressor
from compressor.config import CustomCompression, LayerCompression, TargetConfig
from compressor.errors import ConfigError
from compressor.export.post_training import PostTraining
from compressor.frameworks.deployment import Deployment
from compressor.frameworks.layer_formats import (
    allowed_formats,
    is_in_files,
    possible_formats,
    sites,
)
from compressor.interfaces.inputs import ModelInputs
from compressor.quantization.plan import DYNAMIC_INT8, find_format
from compressor.targets import InductorTarget, OnnxRuntimeTarget, inductor, torchao_formats
from compressor.targets.inductor import CompiledModel
from compressor.testing.models import TinyMLP

INPUTS = ModelInputs((torch.randn(2, 64, generator=torch.Generator().manual_seed(0)),))


def test_the_ninth_variant_of_a_class_is_compiled_too() -> None:
    """torch keeps eight compilations of one code, and runs the ninth model uncompiled."""
    compiled: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    for width in range(1, 13):
        model = CompiledModel(nn.Sequential(nn.Linear(2, width), nn.ReLU()), backend=backend)
        with torch.no_grad():
            assert model(torch.zeros(3, 2)).shape == (3, width)
    assert len(compiled) == 12


def test_a_compiled_model_has_the_attributes_of_the_model() -> None:
    model = TinyMLP().eval()
    compiled = CompiledModel(model, backend="eager")
    assert compiled.fc1 is model.fc1
    with pytest.raises(AttributeError, match="no_such"):
        compiled.no_such  # noqa: B018
    torch.testing.assert_close(INPUTS.call(compiled), INPUTS.call(model))


def test_without_torchao_it_has_no_formats_and_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torchao_formats, "is_installed", lambda: False)
    target = InductorTarget()
    assert target.formats == frozenset()
    with pytest.raises(ConfigError, match=r"'fc1' in dynamic_int8 on cpu.* pip install torchao"):
        target.deploy(TinyMLP(), INPUTS, tmp_path, formats={"fc1": DYNAMIC_INT8})
    with pytest.raises(ConfigError, match=r"dynamic_int8 on cpu.* pip install torchao"):
        target.layer_latency_ms(nn.Linear(8, 8), (1, 8), "dynamic_int8")


def test_a_layer_has_no_format_that_its_target_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A search on a runtime that changed on the way still asks for the latency of its states."""
    monkeypatch.setattr(InductorTarget, "_time_layer", lambda *arguments: len(arguments[-1]))
    monkeypatch.setattr(torchao_formats, "is_installed", lambda: False)
    deployment = Deployment(TargetConfig(runtime="inductor"), tmp_path)
    deployment.target._latencies = type(deployment.target._latencies)(None)
    assert deployment.layer_latency_ms(nn.Linear(8, 8), (1, 8), "dynamic_int8") == 0


def test_time_in_a_format_is_a_share_measured_at_widths_of_powers_of_two(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each compilation takes seconds, and a search asks for many widths."""
    shapes: list[tuple[int, ...]] = []

    def share(_: InductorTarget, layer: nn.Linear, shape: tuple[int, ...], form: str) -> float:
        shapes.append((layer.in_features, layer.out_features, *shape))
        return 0.25

    monkeypatch.setattr(torchao_formats, "is_installed", lambda: True)
    monkeypatch.setattr(InductorTarget, "_time_share", share)
    monkeypatch.setattr(inductor, "time_eager_layer", lambda layer, *_: layer.weight.numel())
    target = InductorTarget()
    times = [
        target.layer_latency_ms(nn.Linear(inputs, outputs), (1, 5, inputs), "dynamic_int8")
        for inputs, outputs in ((100, 60), (120, 64), (64, 64))
    ]
    assert times == [0.25 * 6000, 0.25 * 7680, 0.25 * 4096]
    assert shapes == [(128, 64, 1, 5, 128), (64, 64, 1, 5, 64)]
    assert target.layer_latency_ms(nn.Linear(8, 8), (1, 8)) == 64


def test_convolutions_have_no_format_here_and_on_cuda_only_even_widths_have() -> None:
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert not torchao_formats.is_possible(nn.Conv2d(16, 16, 1), cpu)
    assert not torchao_formats.is_possible(None, cpu)
    assert torchao_formats.is_possible(nn.Linear(30, 10), cpu)
    assert torchao_formats.is_possible(nn.MultiheadAttention(48, 2), cuda)
    assert not torchao_formats.is_possible(nn.MultiheadAttention(40, 2), cuda)
    assert torchao_formats.is_possible(nn.Linear(32, 48), cuda)
    assert not torchao_formats.is_possible(nn.Linear(32, 10), cuda)
    assert not torchao_formats.is_possible(nn.Linear(30, 16), cuda)


@pytest.mark.parametrize(
    ("capability", "has_fp8"), [((8, 0), False), ((8, 9), True), ((9, 0), True), ((12, 0), True)]
)
def test_floats_of_eight_bits_are_for_gpus_that_multiply_them(
    capability: tuple[int, int], has_fp8: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torchao_formats, "is_installed", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    formats = torchao_formats.formats_on(torch.device("cuda"))
    assert {"dynamic_int8", "weight_int8"} <= formats
    assert ({"dynamic_fp8", "weight_fp8"} <= formats) is has_fp8
    assert not any("fp8" in name for name in torchao_formats.formats_on(torch.device("cpu")))


def test_onnxruntime_has_no_floats_of_eight_bits() -> None:
    target = OnnxRuntimeTarget()
    assert {"static_int8", "dynamic_int8", "weight_int4"} <= target.formats
    with pytest.raises(ConfigError, match="'onnxruntime' does not run dynamic_fp8"):
        target.layer_latency_ms(nn.Linear(8, 8), (1, 8), "dynamic_fp8")


@pytest.mark.parametrize("form", ["dynamic_fp8", "weight_fp8"])
def test_no_file_has_floats_of_eight_bits(form: str) -> None:
    model = TinyMLP().eval()
    with pytest.raises(ConfigError, match="no ONNX file has them"):
        compressor.quantize(model, [INPUTS], format=form)
    with pytest.raises(ConfigError, match="no ONNX file has them"):
        PostTraining(model, INPUTS).simulate({"fc1": find_format(form)})


def test_they_are_tried_where_the_target_runs_them() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(144, 16), nn.Linear(16, 10))
    gpu = torch.device("cuda")

    def runs(_: str, layer: nn.Module | None, form: str) -> bool:
        return "dynamic" in form and torchao_formats.is_possible(layer, gpu)

    inputs = ModelInputs((torch.rand(2, 1, 8, 8),))
    layers = sites(PostTraining(model, inputs).graph, model)
    found = possible_formats(layers, "latency", runs)
    assert found == {"2": ("dynamic_int8", "dynamic_fp8")}  # 3 has ten outputs
    in_files = possible_formats(layers, "latency", is_in_files)
    assert not any("fp8" in form for forms in in_files.values() for form in forms)
    eight_bits = CustomCompression(layers={"2": LayerCompression(precision=8)})
    assert allowed_formats(found, layers, model, eight_bits, runs) == {"2": ("dynamic_int8",)}
    four_bits = CustomCompression(layers={"2": LayerCompression(precision=4)})
    with pytest.raises(ConfigError, match="This layer has 8 and 32"):
        allowed_formats(found, layers, model, four_bits, runs)
