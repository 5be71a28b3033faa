"""The metric of the file is within delta, and it always ends."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compressor.errors import ConfigError, MetricError
from compressor.export import fallback
from compressor.export.onnxruntime_model import OnnxRuntimeModel
from compressor.export.quantize import Quantized, quantize
from compressor.quantization.model import QuantizedModel
from compressor.quantization.plan import LayerFormat
from compressor.quantization.scheme import Scheme

DEPTH = 9
ROWS = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))
BATCHES = list(ROWS.split(16))
LOW = LayerFormat(Scheme(3, signed=True, symmetric=True, axis=0))
Evaluate = Callable[[nn.Module], float]


class Net(nn.Module):
    """Layers in a row; three of them read a value with a huge channel that none of them needs."""

    def __init__(self, depth: int = DEPTH) -> None:
        super().__init__()
        self.row = nn.Sequential(
            *(nn.Sequential(nn.Linear(6, 6), nn.ReLU()) for _ in range(depth - 4))
        )
        self.stem = nn.Linear(6, 6)
        self.readers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        with torch.no_grad():
            self.stem.bias[0] = 500.0
            for reader in self.readers:
                reader.weight[:, 0] = 0.0

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x + self.row(x))
        return sum(reader(x) for reader in self.readers)


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(0)
    return Net()


@pytest.fixture
def simulated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Judge the simulation in place of the file: they agree, and files take their time."""

    def export(module: QuantizedModel, inputs: Any, path: Path) -> QuantizedModel:
        del inputs, path
        return module

    monkeypatch.setattr(fallback, "export_quantized", export)
    monkeypatch.setattr(fallback, "OnnxRuntimeModel", lambda module, threads: module)


def nearness(net: nn.Module) -> Evaluate:
    """0 for the outputs of `net`; the error in percent, negative."""
    with torch.no_grad():
        expected = copy.deepcopy(net).eval()(ROWS)

    def evaluate(module: nn.Module) -> float:
        return -100 * float((module(ROWS) - expected).norm() / expected.norm())

    return evaluate


def error(quantized: Quantized, net: nn.Module) -> float:
    with torch.no_grad():
        return -nearness(net)(quantized.module)


@pytest.mark.slow
def test_it_is_the_file_that_is_judged(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = Net(depth=4)
    judged: list[nn.Module] = []

    def evaluate(module: nn.Module) -> float:
        judged.append(module)
        return nearness(net)(module)

    quantized = quantize(net, BATCHES, evaluate=evaluate, delta=1.0)
    assert judged[0] is net
    assert all(isinstance(module, OnnxRuntimeModel) for module in judged[1:])
    found = quantized.fallback
    assert found is not None
    assert found.evaluations == len(judged) - 1
    assert found.reference == 0.0
    file = OnnxRuntimeModel(quantized.save_onnx(tmp_path / "model.onnx"))
    assert nearness(net)(file) == pytest.approx(found.value, abs=1e-6)
    assert found.value >= -1.0
    assert {"readers.0", "readers.1", "readers.2"} <= quantized.skipped.keys()
    assert quantized.plan.formats, "others are quantized"


@pytest.mark.usefixtures("simulated")
def test_a_metric_within_delta_takes_one_evaluation(net: nn.Module) -> None:
    quantized = quantize(net, BATCHES, evaluate=nearness(net), delta=99.0)
    plain = quantize(net, BATCHES)
    assert quantized.fallback is not None
    assert quantized.fallback.evaluations == 1
    assert not quantized.fallback.damages
    assert torch.equal(quantized.module(ROWS), plain.module(ROWS))
    assert quantized.skipped == plain.skipped == {}
    assert plain.fallback is None


@pytest.mark.usefixtures("simulated")
def test_layers_in_float_are_those_whose_quantizers_hurt(net: nn.Module) -> None:
    """Leaving out one or two readers of the bad value gains next to nothing."""
    quantized = quantize(net, BATCHES, evaluate=nearness(net), delta=2.0)
    assert quantized.fallback is not None
    assert set(quantized.skipped) == {"readers.0", "readers.1", "readers.2"}
    assert all("outside delta" in reason for reason in quantized.skipped.values())
    assert error(quantized, net) <= 2.0
    worst = max(quantized.fallback.damages, key=quantized.fallback.damages.__getitem__)
    assert worst[0] == "a"


@pytest.mark.usefixtures("simulated")
@pytest.mark.parametrize("delta", [0.0, 1.0, 10.0])
def test_it_ends_after_two_evaluations_and_the_logarithm_of_the_layers(
    net: nn.Module, delta: float
) -> None:
    count = 0
    near = nearness(net)

    def evaluate(module: nn.Module) -> float:
        nonlocal count
        count += 1
        return near(module)

    quantized = quantize(net, BATCHES, evaluate=evaluate, delta=delta)
    assert quantized.fallback is not None
    assert quantized.fallback.evaluations == count - 1 <= 2 + math.ceil(math.log2(DEPTH))
    assert error(quantized, net) == pytest.approx(-quantized.fallback.value, abs=1e-4)
    assert quantized.fallback.value >= -delta


@pytest.mark.usefixtures("simulated")
def test_where_nothing_holds_the_model_is_float(
    net: nn.Module, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="compressor"):
        quantized = quantize(net, BATCHES, evaluate=nearness(net), delta=0.0)
    assert len(quantized.skipped) == DEPTH
    assert not quantized.plan.formats
    torch.testing.assert_close(quantized.module(ROWS), net(ROWS))
    (message,) = caplog.messages
    assert "No layer is quantized" in message


@pytest.mark.usefixtures("simulated")
def test_cheaper_than_float_layers_are_other_ranges_and_corrected_biases() -> None:
    torch.manual_seed(1)
    net = nn.Sequential(
        nn.Conv2d(2, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 2)
    )
    images = 3 + torch.rand(64, 2, 6, 6)
    batches = list(images.split(16))
    with torch.no_grad():
        expected = net(images)

    def evaluate(module: nn.Module) -> float:
        return -float((module(images) - expected).norm() / expected.norm())

    with torch.no_grad():
        plain, biased = (
            evaluate(quantize(net, batches, format=LOW, corrections=names).module)
            for names in ([], ["bias"])
        )
    assert biased > plain + 0.01
    delta = -(plain + biased) / 2
    quantized = quantize(net, batches, format=LOW, corrections=[], evaluate=evaluate, delta=delta)
    assert quantized.fallback is not None
    assert quantized.fallback.evaluations == 2
    assert "bias" in quantized.fallback.corrections
    assert quantized.fallback.value >= biased
    assert quantized.corrected.biased == ("0", "2", "4")
    assert not quantized.skipped


@pytest.mark.usefixtures("simulated")
def test_what_stays_in_float_has_its_own_weights_again(net: nn.Module) -> None:
    quantized = quantize(
        net,
        iter(BATCHES),
        format=LOW,
        corrections=["gptq", "bias"],
        evaluate=nearness(net),
        delta=10.0,
    )
    before, after = net.state_dict(), quantized.model.state_dict()
    changed = {
        name for name in after if name.endswith("weight") and not after[name].equal(before[name])
    }
    assert quantized.skipped
    assert changed == {f"{name}.weight" for name in quantized.plan.formats}
    assert set(quantized.corrected.rounded) == set(quantized.plan.formats)


@pytest.mark.usefixtures("simulated")
def test_the_model_and_its_mode_are_as_they_were(net: nn.Module) -> None:
    before = copy.deepcopy(net.state_dict())
    modes = []

    def evaluate(module: nn.Module) -> float:
        modes.append(module.training)
        return nearness(net)(module)

    net.train()
    quantize(net, BATCHES, evaluate=evaluate, delta=2.0, corrections=["equalization", "bias"])
    assert net.training
    assert not any(modes)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"delta": 1.0}, "`delta` needs `evaluate`"),
        ({"evaluate": lambda _: 1.0}, "`evaluate` needs `delta`"),
        ({"evaluate": lambda _: 1.0, "delta": -1.0}, "delta=-1.0 is no drop"),
        ({"evaluate": lambda _: 1.0, "delta": math.nan}, "delta=nan is no drop"),
        ({"evaluate": lambda _: 0.9, "delta": 1.0}, r"accepts every model.*write delta=0\.01"),
    ],
)
def test_a_wish_that_cannot_be_meant_is_refused(
    net: nn.Module, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        quantize(net, BATCHES, **options)


@pytest.mark.parametrize("value", [math.nan, None])
def test_a_metric_that_is_no_number_is_refused(net: nn.Module, value: Any) -> None:
    with pytest.raises(MetricError, match="not a finite number"):
        quantize(net, BATCHES, evaluate=lambda _: value, delta=1.0)
