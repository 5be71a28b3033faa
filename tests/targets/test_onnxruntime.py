from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from compressor.errors import DataError, ExportError
from compressor.export import saturation
from compressor.export.onnx import export_onnx
from compressor.export.post_training import PostTraining
from compressor.export.qdq import integer_kernels
from compressor.export.quantize import quantize
from compressor.hardware import cpu_flags
from compressor.interfaces.inputs import ModelInputs
from compressor.quantization.plan import STATIC_INT8, find_format
from compressor.targets import OnnxRuntimeModel, OnnxRuntimeTarget
from compressor.targets.base import Deployed
from compressor.testing.models import DictModel, TinyResNet, TinyTransformer

pytestmark = pytest.mark.slow
LAYERS = frozenset({"conv1", "layer1.0.conv1", "layer1.0.conv2"})


def images(batch: int, seed: int = 0) -> Tensor:
    return torch.randn(batch, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def model() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return TinyResNet().eval()


@pytest.fixture(scope="module")
def deployed(model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Deployed:
    folder = tmp_path_factory.mktemp("float") / "new"
    return OnnxRuntimeTarget().deploy(model, ModelInputs((images(1),)), folder)


@pytest.fixture(scope="module")
def quantized(model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Deployed:
    return OnnxRuntimeTarget().deploy(
        model,
        ModelInputs((images(1),)),
        tmp_path_factory.mktemp("int8"),
        formats=dict.fromkeys(LAYERS, STATIC_INT8),
        calibration=(ModelInputs((images(16, seed),)) for seed in range(3)),
    )


def test_weights_of_few_bits_are_corrected_as_in_one_call(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16)).eval()
    x = torch.randn(64, 4) @ torch.randn(4, 16)  # what is correlated can make up for an error
    formats, inputs = {"0": find_format("w3a8"), "2": find_format("w3a8")}, ModelInputs((x,))
    deployed = OnnxRuntimeTarget().deploy(
        model, inputs, tmp_path, formats=formats, calibration=[inputs]
    )
    assert deployed.simulate is not None
    plain = PostTraining(model, inputs, [inputs]).simulate(formats)
    with torch.no_grad():
        errors = [(module(x) - model(x)).norm() for module in (deployed.module, plain)]
        torch.testing.assert_close(
            deployed.simulate()(x), quantize(model, [x], format=formats).module(x)
        )
    assert errors[0] < 0.8 * errors[1]


@pytest.mark.parametrize("batch", [1, 2, 7])
def test_the_deployed_file_computes_the_model_at_any_batch_size(
    model: nn.Module, deployed: Deployed, batch: int
) -> None:
    with torch.no_grad():
        torch.testing.assert_close(
            deployed.module(images(batch)), model(images(batch)), rtol=1e-4, atol=1e-5
        )


def test_float_is_one_file(deployed: Deployed) -> None:
    path = deployed.files["onnx"]
    assert deployed.files == {"onnx": path, "onnx_float": path}
    assert deployed.size_bytes == path.stat().st_size
    assert not any("Integer" in op or "QLinear" in op for op in integer_kernels(path))


def test_int8_layers_run_on_integers_and_the_float_file_stays(
    model: nn.Module, quantized: Deployed
) -> None:
    assert quantized.files["onnx"] != quantized.files["onnx_float"]
    assert integer_kernels(quantized.files["onnx"])["QLinearConv"] == len(LAYERS)
    assert quantized.size_bytes == quantized.files["onnx"].stat().st_size
    with torch.no_grad():
        expected, result = model(images(32, 9)), quantized.module(images(32, 9))
    assert 0 < (expected - result).norm() / expected.norm() < 0.05


def test_weights_have_seven_bits_where_sums_of_eight_saturate(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    target = OnnxRuntimeTarget()
    monkeypatch.setattr(saturation, "is_saturating", lambda: False)
    assert target.format("static_int8") == STATIC_INT8
    monkeypatch.setattr(saturation, "is_saturating", lambda: True)
    scheme = target.format("static_int8").weight
    assert (scheme.qmin, scheme.qmax, scheme.storage) == (-63, 63, "int8")
    # the largest pair of products then fits the 16 bits of those sums
    assert 2 * 255 * scheme.qmax < 2**15
    for name in ("weight_int4", "weight_fp16", "weight_bf16"):
        assert target.format(name) == find_format(name)


def test_whether_sums_saturate_is_what_an_exact_sum_says() -> None:
    flags = cpu_flags()
    assert not (saturation.is_saturating() and flags & {"avx512_vnni", "avx_vnni"})


def test_int8_without_calibration_says_what_is_missing(model: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nothing to calibrate on"):
        OnnxRuntimeTarget().deploy(
            model, ModelInputs((images(1),)), tmp_path, formats={"conv1": STATIC_INT8}
        )


def test_calibration_batches_are_asked_for_one_after_another(tmp_path: Path) -> None:
    batch = {"image": images(4), "scale": torch.ones(4)}
    swapped = {"scale": torch.ones(4), "image": images(4)}  # the order of keys must not matter
    asked: list[int] = []

    def calibration() -> Iterator[ModelInputs]:
        for i in range(2):
            asked.append(i)
            yield ModelInputs((swapped,))

    deployed = OnnxRuntimeTarget().deploy(
        DictModel().eval(),
        ModelInputs((batch,)),
        tmp_path,
        formats={"conv": STATIC_INT8},
        calibration=calibration(),
    )
    assert asked == [0, 1]
    assert set(deployed.module(swapped)) == {"logits", "features"}


def test_dicts_go_in_and_out_by_position_or_keyword(tmp_path: Path) -> None:
    model = DictModel().eval()
    batch = {"image": images(3), "scale": torch.rand(3)}
    path = export_onnx(model, ModelInputs((batch,)), tmp_path / "model.onnx")
    runtime = OnnxRuntimeModel(path)
    with torch.no_grad():
        expected = model(batch)
    for result in (runtime(batch), runtime(batch=dict(reversed(batch.items())))):
        assert list(result) == list(expected)
        for key, value in expected.items():
            torch.testing.assert_close(result[key], value, rtol=1e-4, atol=1e-5)


def test_inputs_are_cast_to_what_the_file_takes(tmp_path: Path) -> None:
    model = TinyTransformer().eval()
    tokens = torch.randint(32, (2, 8), generator=torch.Generator().manual_seed(0))
    path = export_onnx(model, ModelInputs((tokens,)), tmp_path / "model.onnx")
    with torch.no_grad():
        torch.testing.assert_close(
            OnnxRuntimeModel(path)(tokens.int()), model(tokens), rtol=1e-4, atol=1e-5
        )


def test_half_and_double_images_are_cast_too(deployed: Deployed) -> None:
    result = deployed.module(images(2).double())
    torch.testing.assert_close(result, deployed.module(images(2)))
    assert deployed.module(images(2).bfloat16()).dtype == torch.float32


def test_it_behaves_as_a_module_on_the_cpu(deployed: Deployed) -> None:
    module = deployed.module
    assert next(module.parameters()).device == torch.device("cpu")
    assert module.to("meta").eval() is module
    assert module.half().cuda() is module
    assert next(module.parameters()).device == torch.device("cpu")
    assert next(module.parameters()).dtype == torch.float32
    assert not module.training


def test_other_arguments_are_refused_with_a_sentence(deployed: Deployed) -> None:
    with pytest.raises(ExportError, match="Only the batch may differ"):
        deployed.module(torch.zeros(1, 1, 9, 9))
    with pytest.raises(ExportError, match="takes the tensors"):
        deployed.module(images(1), images(1))


def test_a_broken_file_is_refused_with_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"no protocol buffer")
    with pytest.raises(ExportError, match=r"refuses .*model\.onnx.* Export the model again"):
        OnnxRuntimeModel(tmp_path / "model.onnx")
    with pytest.raises(ExportError, match="refuses"):
        OnnxRuntimeModel(tmp_path / "missing.onnx")


def test_models_are_timed_in_the_runtime(deployed: Deployed, quantized: Deployed) -> None:
    target = OnnxRuntimeTarget(batch_size=4)
    timings = target.measure(
        {"float": deployed.module, "int8": quantized.module}, ModelInputs((images(1),))
    )
    assert all(0 < t.best_ms <= t.low_ms <= t.median_ms <= t.high_ms for t in timings.values())


def test_a_model_that_was_not_deployed_is_not_timed(model: nn.Module) -> None:
    with pytest.raises(TypeError, match="deploy"):
        OnnxRuntimeTarget().measure({"model": model}, ModelInputs((images(1),)))


def test_an_int8_layer_is_timed_on_its_integer_kernel() -> None:
    target = OnnxRuntimeTarget()
    layer = nn.Conv2d(64, 64, 3, padding=1, bias=False)
    in_float, in_int8 = (
        target.layer_latency_ms(layer, (1, 64, 16, 16), q) for q in ("", "static_int8")
    )
    assert in_float > 0
    assert in_int8 > 0
    assert in_int8 != in_float


@pytest.mark.parametrize("form", ["weight_fp16", "weight_bf16", "weight_int8"])
def test_a_layer_whose_weight_is_float_once_it_is_loaded_takes_what_it_takes_in_float(
    form: str,
) -> None:
    target, layer = OnnxRuntimeTarget(), nn.Conv2d(8, 8, 3)
    times = [target.layer_latency_ms(layer, (1, 8, 8, 8), q) for q in (form, "", form)]
    assert times[0] > 0
    assert times == [times[0]] * 3


def test_a_layer_without_an_integer_kernel_is_timed_in_float() -> None:
    layer = nn.ConvTranspose2d(8, 8, 3)
    assert OnnxRuntimeTarget().layer_latency_ms(layer, (1, 8, 8, 8), "static_int8") > 0
