"""Quantization after training in one call: calibrate, correct, simulate; then write a file."""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from numbers import Integral, Real
from pathlib import Path
from typing import Any, get_args

import torch
from torch import nn

from compressor.errors import ConfigError, DataError, ModelError, suggest
from compressor.export.calibration import check_model, read_calibration
from compressor.export.corrections import (
    SAMPLES,
    SECONDS,
    CorrectionReport,
    check_corrections,
    correct,
    default_corrections,
)
from compressor.export.fallback import Evaluate, Fallback, Setting, hold, read_wish, reasons
from compressor.export.layer_formats import Format, check_runtime, choose_formats, read_formats
from compressor.export.post_training import PostTraining
from compressor.export.qdq import export_quantized
from compressor.export.runtime_graph import float_operations
from compressor.export.saturation import safe_format
from compressor.interfaces.inputs import ModelInputs, device_of
from compressor.quantization.model import QuantizedModel
from compressor.quantization.observers import Method
from compressor.quantization.placement import Runtime
from compressor.quantization.plan import QuantizationPlan
from compressor.structure.trace import copy_model

FILE_NAME = "model.onnx"


@dataclass(frozen=True)
class Quantized:
    """A quantized model.

    Attributes:
        module: computes what the file computes, called like the model; on the CPU, in
            evaluation mode.
        model: in float, a copy with its batch norms folded, after the corrections; layers that
            read what "smoothing" multiplies are as they were.
        skipped: layers that stay in float, and why.
        corrected: what the corrections did.
        inputs: of one call.
        fallback: how the metric was held; None if no `evaluate` was given.
    """

    module: QuantizedModel
    model: nn.Module
    skipped: Mapping[str, str]
    corrected: CorrectionReport
    inputs: ModelInputs = field(repr=False)
    fallback: Fallback | None = None

    @property
    def plan(self) -> QuantizationPlan:
        """How each tensor is quantized, with the scales that `module` has now."""
        return self.module.plan()

    def save_onnx(self, path: Path | str) -> Path:
        """Write it as one ONNX file that takes any batch size.

        Raises:
            ConfigError: if `path` is a folder.
            ExportError: if the model has an operation that ONNX has not, or ONNX Runtime refuses
                the file; then none is left.
        """
        if Path(path).is_dir():
            raise ConfigError(
                f"{str(path)!r} is a folder. Name the file as well: {str(Path(path, FILE_NAME))!r}."
            )
        return export_quantized(self.module, self.inputs, path)

    def float_operations(self) -> dict[str, tuple[str, ...]]:
        """What ONNX Runtime will compute in float, beside its integer kernels.

        Operations without an integer kernel are among them, and the layers that are `skipped`.

        Returns:
            For each type of operation in ONNX, names of the modules that they are of; "" is the
            model itself. See `float_operations` for one of a file.

        Raises:
            ExportError: as of `save_onnx`.
        """
        with tempfile.TemporaryDirectory() as folder:
            return float_operations(self.save_onnx(Path(folder, FILE_NAME)))


def quantize(
    model: nn.Module,
    calibration: Iterable[Any] | None = None,
    *,
    format: Format | Mapping[str, Format] = "static_int8",
    method: Method = "minmax",
    corrections: Collection[str] | None = None,
    layers: Collection[str] | None = None,
    ignored: Collection[str] = (),
    runtime: Runtime = "onnxruntime",
    samples: int = SAMPLES,
    seconds: float = SECONDS,
    generator: torch.Generator | None = None,
    evaluate: Evaluate | None = None,
    delta: float | None = None,
) -> Quantized:
    """`model` with the weights, and mostly the activations, of its layers in few bits.

    The model is not changed. All is done on the CPU, where the file will run.

    Args:
        model: trained.
        calibration: batches of training inputs, without labels; each is a tensor, a tuple of
            arguments, a dict of keywords, or `ModelInputs`. A few hundred samples will do. An
            iterator is read once. Lists of images, as detectors take them, are of one length, which
            is the file's. Every tensor as long as the first is one of samples: a table
            beside them must have another length, at least in the first batch. Formats that have
            nothing to calibrate, such as "dynamic_int8", want one batch, to trace the model with.
        format: of all layers, or of each that a mapping names: "static_int8"; "dynamic_int8",
            for linear layers and LSTMs, without ranges of activations; "weight_int8",
            "weight_int4", "weight_fp16" and "weight_bf16", whose activations stay in float; or a
            `LayerFormat`. Scales of blocks are for linear layers and embeddings; a convolution has
            one for each output channel. Of a format that computes on integers an embedding has the
            weight alone: int8, with a scale for each row.
        method: how the ranges of activations are found: "minmax", "percentile", "entropy", "mse".
        corrections: against a loss of accuracy, some of "equalization", "smoothing", "gptq",
            "adaround", "bias"; see `export.corrections.correct`. None is "gptq" and "bias" if a
            weight has less than 8 bits, which look at the calibration, else none; [] is none.
        layers: names of layers, or of modules with layers inside; None is all.
        ignored: names of layers or modules that stay in float.
        runtime: that will read the file: "onnxruntime" on a CPU; or "tensorrt", for "static_int8"
            alone: all integers are int8 with zero point 0, biases stay in float, and quantizers sit
            where NVIDIA recommends them.
        samples: of the calibration, that corrections look at.
        seconds: that rounding by "gptq" and "adaround" may take.
        generator: on the CPU, for corrections; None is one with seed 0.
        evaluate: `evaluate(module) -> float`, larger is better (of a loss, return its negative). It
            is called with the model, then with files in ONNX Runtime, called like the model. If the
            metric of the file is outside `delta`, other ranges and corrections are tried, then
            layers are left in float, as few as suffice: at most 2 + log2(layers) files, rounded
            up. The calibration is kept in memory.
        delta: drop of that metric that is accepted, on its own scale.

    Raises:
        ConfigError: for a format, method, correction or runtime that does not exist; the message
            has the nearest. If `layers` goes with a mapping, no layer is left, or the runtime
            cannot compute a format. For `samples`, `seconds`, a `generator` or a `delta` of
            another type, or out of range. If `evaluate` or `delta` is given without the other, or
            every model would be within delta.
        DataError: if there is no calibration batch, or a correction meets values that are not
            finite.
        ModelError: if a layer does not exist, the model has no layer that can be quantized, cannot
            be traced, or a value is not finite in calibration.
        ExportError: if the model cannot be traced.
        MetricError: if `evaluate` returns no finite number.

    >>> import torch
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> quantized = quantize(net, [torch.randn(16, 4)], corrections=["bias"])
    >>> quantized.module(torch.randn(3, 4)).shape, list(quantized.plan.weights)
    (torch.Size([3, 2]), ['0.weight', '2.weight'])
    """
    check_corrections(corrections or ())
    _check_method(method)
    forms = read_formats(format, layers)
    check_runtime(forms, runtime)
    _check_limits(samples, seconds, generator)
    check_model(model)
    if calibration is None:
        raise DataError(
            f"No calibration was given. The model is traced with a batch of inputs, also for "
            f"{format!r}: give a list of batches, of one if the format has nothing to calibrate, "
            "such as quantize(model, [inputs])."
        )
    wish = read_wish(evaluate, delta)
    with torch.inference_mode(False):
        on_cpu = model if device_of(model).type == "cpu" else copy_model(model).cpu()
        inputs, batches = read_calibration(calibration, on_cpu)
        if wish is not None:
            batches = list(batches)  # each method observes them anew
        quantizer = PostTraining(on_cpu, inputs, batches, method=method, runtime=runtime)
        if not quantizer.graph.names:
            raise ModelError(
                "The model has no convolution or linear layer, LSTM or embedding with a constant "
                "weight, so nothing of it can be quantized."
            )
        wanted, skipped = choose_formats(model, quantizer, forms, layers, ignored)
        is_here = runtime == "onnxruntime"  # else it says nothing what saturates on this CPU
        formats = {name: safe_format(form) if is_here else form for name, form in wanted.items()}
        if corrections is None:
            corrections = default_corrections(formats)
        corrected = partial(
            correct, quantizer, samples=samples, seconds=seconds, generator=generator
        )
        fallback = None
        if wish is None:
            report = corrected(formats, corrections)
            module = quantizer.simulate(formats).eval()
        else:
            asked = Setting(method, tuple(corrections))
            attempt, fallback = hold(
                quantizer, formats, asked, corrected, wish, model=model, inputs=inputs
            )
            report, module = attempt.report, attempt.module
            skipped |= reasons(formats, attempt)
    return Quantized(module, quantizer.model, skipped, report, inputs, fallback)


def _check_limits(samples: int, seconds: float, generator: torch.Generator | None) -> None:
    if not isinstance(samples, Integral) or samples < 1:
        raise ConfigError(f"samples={samples!r} is no number of samples. Write an integer from 1.")
    if not isinstance(seconds, Real) or not seconds >= 0:
        raise ConfigError(f"seconds={seconds!r} is no time. Write a number from 0 on.")
    if generator is not None and not isinstance(generator, torch.Generator):
        raise ConfigError(
            f"generator={generator!r} is no torch.Generator. Write "
            "torch.Generator().manual_seed(3)."
        )
    if generator is not None and generator.device.type != "cpu":
        raise ConfigError(
            f"The generator is on {generator.device}, and all is done on the CPU. Write "
            "torch.Generator().manual_seed(3)."
        )


def _check_method(method: str) -> None:
    if method not in get_args(Method):
        raise ConfigError(f"method={method!r} is unknown. {suggest(str(method), get_args(Method))}")
