"""Quantization after training: one model, calibrated once, simulated and written in any formats."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path

from torch import Tensor, nn

from compressor.errors import DataError
from compressor.export.exported_program import export_program
from compressor.export.qdq import export_quantized
from compressor.interfaces.inputs import ModelInputs
from compressor.quantization.calibrate import calibrate
from compressor.quantization.graph import QuantizationGraph
from compressor.quantization.model import QuantizedModel
from compressor.quantization.observers import Method
from compressor.quantization.plan import Formats, make_plan, observed_values
from compressor.quantization.scheme import ACTIVATION, Scheme
from compressor.structure.fusion import fold
from compressor.structure.trace import copy_model


class PostTraining:
    """Quantizes one model.

    Attributes:
        model: a copy, its batch norms folded. All that is made here has its parameters: what a
            `QuantizedModel` learns, it learns.
        graph: of `model`.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: ModelInputs,
        calibration: Iterable[ModelInputs] | None = None,
        *,
        method: Method = "minmax",
        activation: Scheme = ACTIVATION,
    ) -> None:
        """Trace `model`; the calibration is read once, when ranges are first needed.

        Args:
            model: on the device of `inputs`; not changed.
            inputs: of one call.
            calibration: calls of the model; needed for static formats.
            method: how ranges are found; see `calibrate`.
            activation: the scheme of activations.

        Raises:
            ExportError: if the model cannot be traced.
            ModelError: if it cannot be copied, or does not run on `inputs`.
        """
        self.model = copy_model(model).eval()
        fold(self.model, inputs)
        self.graph = QuantizationGraph(export_program(self.model, inputs))
        self._inputs = inputs
        self._calibration = calibration
        self._method = method
        self._activation = activation

    @property
    def layers(self) -> list[str]:
        """Names of the layers that can be quantized, in the order in which they run."""
        return self.graph.layers

    @cached_property
    def ranges(self) -> Mapping[str, tuple[Tensor, Tensor]]:
        """Of every value that any choice of layers needs.

        Raises:
            DataError: if there is nothing to calibrate on.
        """
        if self._calibration is None:
            raise DataError(
                f"{len(self.layers)} layers are to be int8 and there is nothing to calibrate on. "
                "Give batches of training inputs as `calibration`."
            )
        return calibrate(
            self.graph,
            self._calibration,
            observed_values(self.graph, self.layers),
            method=self._method,
            scheme=self._activation,
        )

    def simulate(self, formats: Formats) -> QuantizedModel:
        """The model with the layers of `formats` quantized, in torch.

        Raises:
            ModelError: if a layer does not exist.
            DataError: if a format is static and there is nothing to calibrate on.
        """
        is_static = any(form.activations == "static" for form in formats.values())
        ranges = self.ranges if is_static else {}
        plan = make_plan(self.graph, formats, ranges, activation=self._activation)
        return QuantizedModel(self.graph, plan)

    def write(self, path: Path, formats: Formats) -> Path:
        """The same as a file.

        Raises:
            ModelError: if a layer does not exist.
            DataError: if a format is static and there is nothing to calibrate on.
            ExportError: if the model has an operation that ONNX has not.
        """
        return export_quantized(self.simulate(formats), self._inputs, path)
