"""Quantization after training: one model, calibrated once, simulated and written in any formats."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from torch import Tensor, nn

from compressor.errors import DataError
from compressor.export.exported_program import export_program
from compressor.export.qdq import export_quantized
from compressor.interfaces.inputs import ModelInputs
from compressor.quantization.calibrate import calibrate
from compressor.quantization.corrections.walking import first_samples
from compressor.quantization.graph import QuantizationGraph
from compressor.quantization.model import QuantizedModel
from compressor.quantization.observers import Method
from compressor.quantization.placement import Runtime
from compressor.quantization.plan import (
    Formats,
    QuantizationPlan,
    TensorPlan,
    make_plan,
    observed_values,
)
from compressor.quantization.scheme import ACTIVATION, Scheme
from compressor.structure.fusion import fold
from compressor.structure.trace import copy_model, in_eval

ACTIVATIONS: Mapping[Runtime, Scheme] = {
    "onnxruntime": ACTIVATION,
    "tensorrt": Scheme(8, signed=True, symmetric=True, full=True),
}


class PostTraining:
    """Quantizes one model.

    Attributes:
        model: a copy, its batch norms folded. All that is made here has its parameters: what a
            `QuantizedModel` learns, it learns.
        graph: of `model`.
        method: how ranges are found; another may be set, if the calibration is no iterator.
        runtime: that the file is for.
        activation: the scheme of activations.
        weights: scales that were chosen for weights, by path; those of others are of their range.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: ModelInputs,
        calibration: Iterable[ModelInputs] | None = None,
        *,
        method: Method = "minmax",
        runtime: Runtime = "onnxruntime",
    ) -> None:
        """Trace `model`; the calibration is read when ranges are first needed.

        Args:
            model: on the device of `inputs`; not changed.
            inputs: of one call.
            calibration: calls of the model; needed for static formats. An iterator will do.
            method: how ranges are found; see `calibrate`.
            runtime: that the file is for: it says where quantizers sit, and the scheme of
                activations.

        Raises:
            ExportError: if the model cannot be traced.
            ModelError: if it cannot be copied, or does not run on `inputs`.
        """
        self.model = in_eval(copy_model(model))
        fold(self.model, inputs)
        self.graph = QuantizationGraph(export_program(self.model, inputs))
        self.weights: dict[str, TensorPlan] = {}
        self._inputs = inputs
        self._batches = None if calibration is None else _Batches(calibration)
        self.method = method
        self._ranges: dict[Method, Mapping[str, tuple[Tensor, Tensor]]] = {}
        self.runtime = runtime
        self.activation = ACTIVATIONS[runtime]

    @property
    def layers(self) -> list[str]:
        """Names of the layers that can be quantized, in the order in which they run."""
        return self.graph.layers

    @property
    def tables(self) -> list[str]:
        """Names of the embeddings that are no layer's weight, in the order in which they run."""
        names = dict.fromkeys(table.layer for table in self.graph.tables)
        return [name for name in names if name not in self.layers]

    @property
    def ranges(self) -> Mapping[str, tuple[Tensor, Tensor]]:
        """Of every value that any choice of layers needs; observed once for each method.

        Raises:
            DataError: if there is nothing to calibrate on.
        """
        if self.method not in self._ranges:
            self._ranges[self.method] = calibrate(
                self.graph,
                self._needed_batches(),
                observed_values(self.graph, self.layers, self.runtime),
                method=self.method,
                scheme=self.activation,
            )
        return self._ranges[self.method]

    def forget_ranges(self) -> None:
        """Observe them anew when they are next needed: the model's values are others now."""
        self._ranges.clear()

    def samples(self, count: int) -> list[ModelInputs]:
        """The first `count` of the calibration, in batches; fewer if there are not so many.

        Raises:
            DataError: if there is nothing to calibrate on.
        """
        return self._needed_batches().first(count)

    def plan(self, formats: Formats) -> QuantizationPlan:
        """What is quantized, and how, with the layers of `formats` quantized.

        Raises:
            ModelError: if a layer does not exist.
            DataError: if a format is static and there is nothing to calibrate on.
        """
        is_static = any(form.activations == "static" for form in formats.values())
        ranges = self.ranges if is_static else {}
        return make_plan(
            self.graph,
            formats,
            ranges,
            activation=self.activation,
            fixed=self.weights,
            runtime=self.runtime,
        )

    @property
    def shares_parameters(self) -> bool:
        """Whether all parameters of the graph are in the memory of those of `model`."""
        own = {parameter.data_ptr() for parameter in self.model.parameters()}
        return all(parameter.data_ptr() in own for parameter in self.graph.module.parameters())

    def simulate(self, formats: Formats | QuantizationPlan) -> QuantizedModel:
        """The model with the layers of `formats` quantized, in torch; or as a plan says.

        Raises:
            ModelError: if a layer does not exist.
            DataError: if a format is static and there is nothing to calibrate on.
        """
        plan = formats if isinstance(formats, QuantizationPlan) else self.plan(formats)
        return QuantizedModel(self.graph, plan)

    def write(self, path: Path, formats: Formats | QuantizationPlan) -> Path:
        """The same as a file.

        Raises:
            ModelError: if a layer does not exist.
            DataError: if a format is static and there is nothing to calibrate on.
            ExportError: if the model has an operation that ONNX has not.
        """
        return export_quantized(self.simulate(formats), self._inputs, path)

    def _needed_batches(self) -> _Batches:
        if self._batches is None:
            raise DataError(
                f"{len(self.layers)} layers are to be int8 and there is nothing to calibrate on. "
                "Give batches of training inputs as `calibration`."
            )
        return self._batches


class _Batches:
    """Calibration batches; of an iterator, those that were looked at are kept for another time."""

    def __init__(self, batches: Iterable[ModelInputs]) -> None:
        self._batches = batches
        self._is_iterator = iter(batches) is batches
        self._kept: list[ModelInputs] = []

    def __iter__(self) -> Iterator[ModelInputs]:
        yield from self._kept
        yield from self._batches

    def first(self, count: int) -> list[ModelInputs]:
        """So many samples."""
        if self._is_iterator:
            missing = count - sum(batch.batch_size for batch in self._kept)
            while missing > 0 and (batch := next(iter(self._batches), None)) is not None:
                self._kept.append(batch)
                missing -= batch.batch_size
        return list(first_samples(self._kept if self._is_iterator else self._batches, count))
