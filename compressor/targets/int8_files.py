"""int8 versions of one float ONNX file: calibrated once, written for any choice of layers."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from functools import cached_property
from pathlib import Path

from compressor.export.onnx import read_signature
from compressor.export.qdq import (
    QuantizedFile,
    activation_tensors,
    quantizable_layers,
    quantize_onnx,
)
from compressor.interfaces.inputs import ModelInputs
from compressor.quantization.calibrate import calibrate
from compressor.quantization.ranges import Range


class Int8Files:
    """Writes int8 files from a float one."""

    def __init__(
        self, float_path: Path, calibration: Iterable[ModelInputs], *, threads: int = 1
    ) -> None:
        """Remember what to calibrate on; it is read once, when the first file is written.

        Args:
            float_path: written by `export_onnx`.
            calibration: calls of the model that was exported.
            threads: of the runtime while calibrating.
        """
        self._float_path = float_path
        self._calibration = calibration
        self._threads = threads

    @staticmethod
    def layers_of(float_path: Path) -> list[str]:
        """Names of the layers that can be int8, in the order of the graph."""
        return quantizable_layers(float_path)

    @cached_property
    def layers(self) -> list[str]:
        """Names of the layers that can be int8, in the order of the graph."""
        return quantizable_layers(self._float_path)

    @cached_property
    def ranges(self) -> dict[str, Range]:
        """Of every value that any choice of layers needs."""
        flatten = read_signature(self._float_path).flatten
        batches = (ModelInputs(tuple(flatten(inputs))) for inputs in self._calibration)
        tensors = activation_tensors(self._float_path, self.layers)
        return calibrate(self._float_path, batches, tensors, threads=self._threads)

    def write(self, path: Path, int8_layers: Collection[str]) -> QuantizedFile:
        """The file with `int8_layers` in int8."""
        return quantize_onnx(self._float_path, path, self.ranges, int8_layers=int8_layers)
