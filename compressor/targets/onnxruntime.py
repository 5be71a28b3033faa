"""ONNX Runtime on a CPU as a target: float, or int8 by quantizers in the file."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from compressor.export.corrections import correct, default_corrections
from compressor.export.onnx import export_onnx
from compressor.export.onnxruntime_model import OnnxRuntimeModel
from compressor.export.post_training import PostTraining
from compressor.export.saturation import safe_format
from compressor.interfaces.inputs import ModelInputs
from compressor.profiling.latency import Call
from compressor.quantization.plan import (
    FEW_BIT_FORMATS,
    FILE_FORMATS,
    Formats,
    LayerFormat,
    QuantizationPlan,
    find_format,
)
from compressor.targets.base import Deployed, Layer, Target
from compressor.targets.layer_file import write_layer
from compressor.targets.node_times import layer_kernel_ms


class OnnxRuntimeTarget(Target):
    """The CPU provider of ONNX Runtime."""

    name = "onnxruntime"
    devices = ("cpu",)

    def deploy(
        self,
        model: nn.Module,
        inputs: ModelInputs,
        folder: Path,
        *,
        formats: Formats | QuantizationPlan | None = None,
        calibration: Iterable[ModelInputs] | None = None,
    ) -> Deployed:
        """Write `model_float.onnx` and, if layers are quantized, `model_int8.onnx`.

        Weights of less than 8 bits are corrected by the calibration, unless a plan has them.
        """
        folder.mkdir(parents=True, exist_ok=True)
        path = float_path = export_onnx(model, inputs, folder / "model_float.onnx")
        simulate = None
        if formats is not None and (isinstance(formats, QuantizationPlan) or formats):
            quantizer = PostTraining(model, inputs, calibration)
            if isinstance(formats, QuantizationPlan):
                plan = formats
            else:
                if calibration is not None:
                    correct(quantizer, formats, default_corrections(formats))
                plan = quantizer.plan(formats)
            path = quantizer.write(folder / "model_int8.onnx", plan)
            simulate = partial(quantizer.simulate, plan)
        return Deployed(
            OnnxRuntimeModel(path, threads=self.threads),
            path.stat().st_size,
            {"onnx": path, "onnx_float": float_path},
            simulate,
        )

    @property
    def formats(self) -> frozenset[str]:
        """All that a file can have."""
        return frozenset(FILE_FORMATS)

    def format(self, name: str) -> LayerFormat:
        """The format of that name; with weights of 7 bits where sums of 8 saturate."""
        return safe_format(find_format(name))

    def layer_latency_ms(
        self, layer: nn.Module, input_shape: Sequence[int], form: str = ""
    ) -> float:
        """As `Target.layer_latency_ms`; what is wider once the file is loaded takes its time.

        Weights of 16 bits are float then, and those of convolutions in `weight_int8`; fewer than 8
        bits that meet integers are int8.
        """
        if form in FEW_BIT_FORMATS:
            form = "static_int8"
        is_widened = form in {"weight_fp16", "weight_bf16"}
        is_widened |= form == "weight_int8" and isinstance(layer, _ConvNd)
        return super().layer_latency_ms(layer, input_shape, "" if is_widened else form)

    @contextmanager
    def _call(self, module: nn.Module, inputs: ModelInputs) -> Iterator[Call]:
        if not isinstance(module, OnnxRuntimeModel):
            raise TypeError(
                f"The onnxruntime target times deployed models, not a {type(module).__name__}. "
                "Give it `deploy(...).module`."
            )
        yield module.bind(inputs)

    def _time_layer(self, layer: Layer, input_shape: tuple[int, ...], form: str) -> float:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            path = folder / "layer.onnx"
            write_layer(layer, input_shape, path, form=self.format(form) if form else None)
            sample = torch.rand(input_shape, generator=torch.Generator().manual_seed(0))
            return layer_kernel_ms(path, sample, self.threads)
