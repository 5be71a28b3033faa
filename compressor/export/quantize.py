"""Quantization after training in one call: calibrate, correct, simulate; then write a file."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, get_args

import torch
from torch import nn

from compressor.errors import ConfigError, DataError, ModelError, suggest
from compressor.export.corrections import (
    SAMPLES,
    SECONDS,
    CorrectionReport,
    check_corrections,
    correct,
)
from compressor.export.layer_formats import Format, choose_formats, read_formats
from compressor.export.post_training import PostTraining
from compressor.export.qdq import export_quantized
from compressor.export.saturation import safe_format
from compressor.interfaces.inputs import ModelInputs, device_of
from compressor.quantization.model import QuantizedModel
from compressor.quantization.observers import Method
from compressor.quantization.plan import QuantizationPlan
from compressor.structure.trace import copy_model

EXAMPLES = 2  # samples of the batch that the model is traced with


@dataclass(frozen=True)
class Quantized:
    """A quantized model.

    Attributes:
        module: computes what the file computes, called like the model; on the CPU, in
            evaluation mode.
        plan: how each tensor is quantized.
        model: in float, a copy with its batch norms folded, after the corrections.
        skipped: layers that stay in float, and why.
        corrected: what the corrections did.
        inputs: of one call.
    """

    module: QuantizedModel
    plan: QuantizationPlan
    model: nn.Module
    skipped: Mapping[str, str]
    corrected: CorrectionReport
    inputs: ModelInputs = field(repr=False)

    def save_onnx(self, path: Path | str) -> Path:
        """Write it as one ONNX file that takes any batch size.

        Raises:
            ExportError: if the model has an operation that ONNX has not.
        """
        return export_quantized(self.module, self.inputs, path)


def quantize(
    model: nn.Module,
    calibration: Iterable[Any],
    *,
    format: Format | Mapping[str, Format] = "static_int8",
    method: Method = "minmax",
    corrections: Collection[str] = (),
    layers: Collection[str] | None = None,
    ignored: Collection[str] = (),
    samples: int = SAMPLES,
    seconds: float = SECONDS,
    generator: torch.Generator | None = None,
) -> Quantized:
    """`model` with the weights, and mostly the activations, of its layers in few bits.

    The model is not changed. All is done on the CPU, where the file will run.

    Args:
        model: trained.
        calibration: batches of training inputs, without labels; each is a tensor, a tuple of
            arguments, a dict of keywords, or `ModelInputs`. A few hundred samples will do. An
            iterator is read once.
        format: of all layers, or of each that a mapping names: "static_int8"; "dynamic_int8",
            for linear layers, without ranges of activations; "weight_int8" and "weight_int4", whose
            activations stay in float; or a `LayerFormat`. Scales of blocks are for linear layers;
            a convolution has one for each output channel.
        method: how the ranges of activations are found: "minmax", "percentile", "entropy", "mse".
        corrections: against a loss of accuracy, some of "equalization", "smoothing", "scales",
            "gptq", "adaround", "bias"; see `export.corrections.correct`.
        layers: names of layers, or of modules with layers inside; None is all.
        ignored: names of layers or modules that stay in float.
        samples: of the calibration, that corrections look at.
        seconds: that rounding by "gptq" and "adaround" may take.
        generator: on the CPU, for corrections; None is one with seed 0.

    Raises:
        ConfigError: for a format, method or correction that does not exist; the message has the
            nearest. If `layers` goes with a mapping, or no layer is left.
        DataError: if there is no calibration batch, or a correction meets values that are not
            finite.
        ModelError: if a layer does not exist, the model has no layer that can be quantized, cannot
            be traced, or a value is not finite in calibration.
        ExportError: if the model cannot be traced.

    >>> import torch
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> quantized = quantize(net, [torch.randn(16, 4)], corrections=["bias"])
    >>> quantized.module(torch.randn(3, 4)).shape, list(quantized.plan.weights)
    (torch.Size([3, 2]), ['0.weight', '2.weight'])
    """
    check_corrections(corrections)
    _check_method(method)
    forms = read_formats(format, layers)
    with torch.inference_mode(False):
        inputs, batches = _first_and_all(calibration)
        on_cpu = model if device_of(model).type == "cpu" else copy_model(model).cpu()
        quantizer = PostTraining(on_cpu, inputs, batches, method=method)
        if not quantizer.layers:
            raise ModelError(
                "The model has no convolution or linear layer with a constant weight, so nothing "
                "of it can be quantized."
            )
        wanted, skipped = choose_formats(model, quantizer, forms, layers, ignored)
        formats = {name: safe_format(form) for name, form in wanted.items()}
        report = correct(
            quantizer,
            formats,
            corrections,
            samples=samples,
            seconds=seconds,
            generator=generator,
        )
        module = quantizer.simulate(formats).eval()
    return Quantized(module, module.plan(), quantizer.model, skipped, report, inputs)


def _check_method(method: str) -> None:
    if method not in get_args(Method):
        raise ConfigError(f"method={method!r} is unknown. {suggest(str(method), get_args(Method))}")


def _first_and_all(
    calibration: Iterable[Any],
) -> tuple[ModelInputs, Iterable[ModelInputs]]:
    """A small batch to trace with, and the batches."""
    if isinstance(calibration, (torch.Tensor, ModelInputs, Mapping)):
        raise DataError(
            f"`calibration` is a {type(calibration).__name__}, not a list of batches. Write it in "
            "brackets: [...]."
        )
    batches: Iterator[ModelInputs] = (ModelInputs.of(batch).to("cpu") for batch in calibration)
    first = next(batches, None)
    if first is None:
        raise DataError(
            "There is no calibration batch. Give at least one batch of training inputs."
        )
    if not first.tensors() or not first.batch_size:
        raise DataError("The first calibration batch has no sample. Give batches of one or more.")
    return first.with_batch(EXAMPLES), chain([first], batches)
