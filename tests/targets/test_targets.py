from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn

from compressor.errors import ConfigError, DeviceError
from compressor.interfaces.inputs import ModelInputs
from compressor.quantization.plan import STATIC_INT8
from compressor.structure.archive import packed_size_bytes
from compressor.structure.factored import blank
from compressor.targets import EagerTarget, InductorTarget, OnnxRuntimeTarget, Target, make_target
from compressor.testing.models import TinyMLP, TinyResNet

IMAGES = ModelInputs((torch.zeros(1, 1, 8, 8),))


@dataclass(frozen=True)
class Settings:
    runtime: str = "onnxruntime"
    device: str = "cpu"
    threads: int = 2
    batch_size: int = 8


@pytest.mark.parametrize(
    ("runtime", "kind"),
    [("onnxruntime", OnnxRuntimeTarget), ("eager", EagerTarget), ("inductor", InductorTarget)],
)
def test_the_configuration_chooses_the_target(runtime: str, kind: type[Target]) -> None:
    target = make_target(Settings(runtime))
    assert type(target) is kind
    assert (target.name, target.device, target.threads, target.batch_size) == (
        runtime,
        torch.device("cpu"),
        2,
        8,
    )


def test_an_unknown_runtime_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'onnxruntime'"):
        make_target(Settings("onnx_runtime"))


def test_onnxruntime_does_not_run_on_cuda() -> None:
    with pytest.raises(ConfigError, match=r"'onnxruntime' does not run on device 'cuda'\. Write"):
        make_target(Settings(device="cuda"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_must_be_here() -> None:
    with pytest.raises(DeviceError):
        EagerTarget("cuda")


@pytest.mark.parametrize("option", ["threads", "batch_size"])
def test_numbers_below_one_are_refused(option: str) -> None:
    with pytest.raises(ConfigError, match=f"{option}=0 is below 1"):
        EagerTarget(**{option: 0})


def test_eager_deploys_a_copy_in_evaluation_mode(tmp_path: Path) -> None:
    model = TinyResNet()
    deployed = EagerTarget().deploy(model, IMAGES, tmp_path)
    assert model.training
    assert not deployed.module.training
    assert deployed.size_bytes == packed_size_bytes(model)
    assert not deployed.files
    with torch.no_grad():
        model.conv1.weight.zero_()
    assert deployed.module.conv1.weight.any()


@pytest.mark.parametrize("target", [EagerTarget(), InductorTarget()], ids=lambda t: t.name)
def test_int8_is_refused_where_it_does_not_run(target: Target, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"does not run .* on cpu"):
        target.deploy(TinyMLP(), IMAGES, tmp_path, formats={"fc1": STATIC_INT8}, calibration=[])
    with pytest.raises(ConfigError, match="does not run static_int8 on cpu"):
        target.layer_latency_ms(nn.Linear(8, 8), (1, 8), "static_int8")


@pytest.mark.parametrize("target", [EagerTarget(), OnnxRuntimeTarget()], ids=lambda t: t.name)
def test_only_what_computes_has_a_latency_of_its_own(target: Target) -> None:
    assert target.layer_latency_ms(nn.BatchNorm2d(4), (1, 4, 8, 8)) == 0.0
    assert target.layer_latency_ms(nn.Conv2d(4, 4, 3), ()) == 0.0  # never called


@pytest.mark.parametrize("target", [EagerTarget(), OnnxRuntimeTarget()], ids=lambda t: t.name)
@pytest.mark.slow
def test_a_larger_layer_takes_longer(target: Target) -> None:
    small = target.layer_latency_ms(nn.Conv2d(16, 16, 3, padding=1), (1, 16, 8, 8))
    large = target.layer_latency_ms(nn.Conv2d(128, 128, 3, padding=1), (1, 128, 16, 16))
    assert 0 < 2 * small < large  # 256 times the MACs, beside the overhead of a call


def test_a_layer_is_timed_once_for_each_shape_and_type(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed: list[object] = []
    monkeypatch.setattr(OnnxRuntimeTarget, "_time_layer", lambda *args: timed.append(args) or 1.0)
    for _ in range(2):
        target = OnnxRuntimeTarget(cache_path=tmp_path / "layers.json")
        for shape in ((1, 8), (2, 8)):
            for form in ("", "static_int8"):
                target.layer_latency_ms(nn.Linear(8, 8), shape, form)
        OnnxRuntimeTarget(threads=2, cache_path=tmp_path / "layers.json").layer_latency_ms(
            nn.Linear(8, 8), (1, 8)
        )
    assert len(timed) == 5


def test_a_chain_takes_what_its_layers_take(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured in one file they take the same, so the layers of all chains share one table."""
    timed: list[tuple[str, tuple[int, ...]]] = []

    def time_layer(_: Target, layer: nn.Module, shape: tuple[int, ...], form: str) -> float:
        timed.append((repr(layer), shape))
        return float(layer.weight.numel())

    monkeypatch.setattr(EagerTarget, "_time_layer", time_layer)
    target = EagerTarget()
    chain = blank(nn.Conv2d(8, 12, 3, stride=2, padding=1), "tucker2", (4, 6))
    total = target.layer_latency_ms(chain, (1, 8, 9, 9))
    assert total == 8 * 6 + 6 * 4 * 9 + 4 * 12
    shapes = [(1, 8, 9, 9), (1, 6, 9, 9), (1, 4, 5, 5)]
    assert timed == [(repr(part), shape) for part, shape in zip(chain, shapes, strict=True)]
    target.layer_latency_ms(nn.Conv2d(8, 6, 1, bias=False), (1, 8, 9, 9))
    assert len(timed) == 3


@pytest.mark.slow
def test_deployed_models_are_timed_at_the_targets_batch_size() -> None:
    seen: list[int] = []

    class Watches(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(len(x))
            return super().forward(x)

    timings = EagerTarget(batch_size=4).measure(
        {"a": Watches(2, 2), "b": Watches(2, 2)}, ModelInputs((torch.zeros(1, 2),))
    )
    assert set(seen) == {4}
    assert list(timings) == ["a", "b"]


@pytest.mark.slow
def test_inductor_compiles_a_copy(tmp_path: Path) -> None:
    model = TinyMLP()
    inputs = ModelInputs((torch.randn(2, 64),))
    deployed = InductorTarget(batch_size=2).deploy(model, inputs, tmp_path)
    assert model.training
    with torch.no_grad():
        torch.testing.assert_close(inputs.call(deployed.module), inputs.call(model))
