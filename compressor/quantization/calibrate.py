"""The ranges of a float ONNX file's tensors, observed while it runs on calibration batches."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
import onnxruntime as ort
from onnx import helper

from compressor.errors import DataError, ModelError
from compressor.interfaces.inputs import ModelInputs
from compressor.quantization.ranges import (
    FloatArray,
    MinMaxObserver,
    Observer,
    PercentileObserver,
    Range,
)

Method = Literal["minmax", "percentile"]
OBSERVERS: dict[Method, type[MinMaxObserver] | type[PercentileObserver]] = {
    "minmax": MinMaxObserver,
    "percentile": PercentileObserver,
}
# All observed tensors of one run of the file together; a batch that needs more is run in parts.
MEMORY_BYTES = 128 * 2**20


def calibrate(
    onnx_path: Path | str,
    batches: Iterable[ModelInputs],
    tensors: Collection[str],
    *,
    method: Method = "minmax",
    threads: int = 1,
) -> dict[str, Range]:
    """The range of each of `tensors` over `batches`; one batch is held in memory at a time.

    Args:
        onnx_path: a float file with a dynamic batch; it is not changed.
        batches: the tensors of each in the order of the file's inputs, on any device.
        tensors: names of values of the graph.
        method: "minmax" covers every value; "percentile" all but a 100,000th, half at each end.
        threads: of the runtime.

    Raises:
        DataError: if there is no batch.
        ModelError: if a tensor holds a value that is not finite; the message names the tensor.
    """
    names = sorted(set(tensors))
    session = _observing_session(onnx_path, names, threads)
    observers: dict[str, Observer] = {name: OBSERVERS[method]() for name in names}
    for inputs in _in_parts(session, batches, names):
        for name, values in _observe(session, inputs, names).items():
            if values.size:
                _require_finite(name, values)
                observers[name].update(values)
    return {name: observer.range() for name, observer in observers.items()}


def _observing_session(path: Path | str, names: list[str], threads: int) -> ort.InferenceSession:
    """The file with `names` among its outputs."""
    proto = onnx.load(path)
    known = {value.name for value in (*proto.graph.output, *proto.graph.input)}
    for name in names:
        if name not in known:
            proto.graph.output.append(helper.make_empty_tensor_value_info(name))
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    return ort.InferenceSession(
        proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def _in_parts(
    session: ort.InferenceSession, batches: Iterable[ModelInputs], names: list[str]
) -> Iterator[ModelInputs]:
    """The batches, cut so small that what is observed of one part fits `MEMORY_BYTES`."""
    size = 0
    for batch in batches:
        if not size:
            sample = _observe(session, _part(batch, 0, 1), names)
            sample_bytes = sum(values.nbytes for values in sample.values())
            size = max(1, MEMORY_BYTES // max(1, sample_bytes))
        for start in range(0, batch.batch_size, size):
            yield _part(batch, start, size)
    if not size:
        raise DataError("There is no calibration batch. Give at least one batch of training data.")


def _part(inputs: ModelInputs, start: int, size: int) -> ModelInputs:
    whole = inputs.batch_size
    return inputs.map(
        lambda tensor: (
            tensor[start : start + size] if tensor.dim() and len(tensor) == whole else tensor
        )
    )


def _observe(
    session: ort.InferenceSession, inputs: ModelInputs, names: list[str]
) -> dict[str, FloatArray]:
    arrays = (tensor.detach().cpu().numpy() for tensor in inputs.tensors())
    feed = dict(zip((value.name for value in session.get_inputs()), arrays, strict=True))
    computed = [name for name in names if name not in feed]
    return {
        **{name: feed[name] for name in names if name in feed},
        **dict(zip(computed, session.run(computed, feed) if computed else [], strict=True)),
    }


def _require_finite(name: str, values: FloatArray) -> None:
    if not np.isfinite([values.min(), values.max()]).all():
        raise ModelError(
            f"During calibration the tensor {name!r} held a value that is not finite. "
            "Look for NaN in the calibration data, or for an overflow in the layer of that name."
        )
