"""ONNX Runtime on a CPU as a target: float, or int8 by quantizers in the file."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from compressor.errors import DataError
from compressor.export.onnx import export_onnx
from compressor.interfaces.inputs import ModelInputs
from compressor.profiling.latency import Call
from compressor.targets.base import Deployed, Layer, Target
from compressor.targets.int8_files import Int8Files
from compressor.targets.layer_file import write_layer
from compressor.targets.node_times import layer_kernel_ms
from compressor.targets.onnxruntime_model import OnnxRuntimeModel


class OnnxRuntimeTarget(Target):
    """The CPU provider of ONNX Runtime."""

    name = "onnxruntime"
    devices = ("cpu",)
    supports_int8 = True

    def deploy(
        self,
        model: nn.Module,
        inputs: ModelInputs,
        folder: Path,
        *,
        int8_layers: frozenset[str] | None = None,
        calibration: Iterable[ModelInputs] | None = None,
    ) -> Deployed:
        """Write `model_float.onnx` and, if layers are to be int8, `model_int8.onnx`."""
        folder.mkdir(parents=True, exist_ok=True)
        path = float_path = export_onnx(model, inputs, folder / "model_float.onnx")
        if int8_layers:
            if calibration is None:
                raise DataError(
                    f"{len(int8_layers)} layers are to be int8 and there is nothing to calibrate "
                    "on. Give batches of training inputs as `calibration`."
                )
            files = Int8Files(float_path, calibration, threads=self.threads)
            path = files.write(folder / "model_int8.onnx", int8_layers).path
        return Deployed(
            OnnxRuntimeModel(path, threads=self.threads),
            path.stat().st_size,
            {"onnx": path, "onnx_float": float_path},
        )

    @contextmanager
    def _call(self, module: nn.Module, inputs: ModelInputs) -> Iterator[Call]:
        if not isinstance(module, OnnxRuntimeModel):
            raise TypeError(
                f"The onnxruntime target times deployed models, not a {type(module).__name__}. "
                "Give it `deploy(...).module`."
            )
        yield module.bind(inputs)

    def _time_layer(self, layer: Layer, input_shape: tuple[int, ...], int8: bool) -> float:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            path = folder / "float.onnx"
            write_layer(layer, input_shape, path)
            sample = torch.rand(input_shape, generator=torch.Generator().manual_seed(0))
            if int8:
                files = Int8Files(path, [ModelInputs((sample,))], threads=self.threads)
                path = files.write(folder / "int8.onnx", files.layers).path
            return layer_kernel_ms(path, sample, self.threads)
