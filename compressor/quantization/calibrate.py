"""The ranges of a model's values, observed while it runs on calibration batches."""

from __future__ import annotations

from collections.abc import Collection, Iterable

import torch
from torch import Tensor, fx, nn

from compressor.errors import CompressorError, DataError, ModelError, first_line
from compressor.interfaces.inputs import ModelInputs
from compressor.quantization.graph import QuantizationGraph
from compressor.quantization.graph_state import add_child
from compressor.quantization.model import copy_graph
from compressor.quantization.observers import OBSERVERS, Method, Observer
from compressor.quantization.scheme import ACTIVATION, Scheme
from compressor.structure.trace import FORWARD_FAILURES

# The largest value of the graph, in one run; a batch that needs more is run in parts.
MEMORY_BYTES = 64 * 2**20


def calibrate(
    graph: QuantizationGraph,
    batches: Iterable[ModelInputs],
    values: Collection[str],
    *,
    method: Method = "minmax",
    scheme: Scheme = ACTIVATION,
) -> dict[str, tuple[Tensor, Tensor]]:
    """The range of each of `values` over `batches`, (low, high), in bounded memory.

    Args:
        graph: of the model, on the device of the batches.
        batches: calls of the model.
        values: names in the graph; see `plan.observed_values`.
        method: "minmax" covers every value; "percentile" leaves a few of the largest out; "entropy"
            and "mse" choose what `scheme` loses least by.
        scheme: of the integers that shall cover the range.

    Raises:
        DataError: if there is no batch, or the model does not run on one.
        ModelError: if a value is not finite; names the value.
    """
    module, observers = _observed(graph, values, method)
    is_empty, size = True, max(1, MEMORY_BYTES // graph.sample_bytes())
    with torch.no_grad():
        for number, batch in enumerate(batches, 1):
            is_empty = False
            for part in batch.parts(size):
                _run(module, part, number)
    if is_empty:
        raise DataError("There is no calibration batch. Give at least one batch of training data.")
    return {name: observer.range(scheme) for name, observer in observers.items()}


def _run(module: nn.Module, part: ModelInputs, number: int) -> None:
    try:
        part.call(module)
    except CompressorError:
        raise
    except FORWARD_FAILURES as error:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in part.tensors())
        raise DataError(
            f"The model does not run on calibration batch {number}, of shapes {shapes}: "
            f"{first_line(error)} Batches may differ in their number of samples alone."
        ) from error


class _Tap(nn.Module):
    """Shows an observer what passes."""

    def __init__(self, name: str, observer: Observer) -> None:
        super().__init__()
        self._name = name
        self._observer = observer

    def forward(self, x: Tensor) -> Tensor:
        try:
            self._observer.update(x)
        except ModelError as error:
            raise ModelError(
                f"During calibration the value {self._name!r} was not finite. Look for NaN in the "
                "calibration data, or for an overflow in the layer of that name."
            ) from error
        return x


def _observed(
    graph: QuantizationGraph, values: Collection[str], method: Method
) -> tuple[fx.GraphModule, dict[str, Observer]]:
    """The graph with an observer behind each value."""
    module, _ = copy_graph(graph.module)
    observers: dict[str, Observer] = {}
    taps = nn.Module()
    path = add_child(module, "taps", taps)
    for node in list(module.graph.nodes):
        if node.name in values:
            observers[node.name] = OBSERVERS[method]()
            name = add_child(taps, node.name, _Tap(node.name, observers[node.name]))
            with module.graph.inserting_after(node):
                module.graph.call_module(f"{path}.{name}", (node,))
    module.recompile()
    return module, observers
