"""ONNX files of any origin, timed in turn on random inputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from compressor.errors import ExportError, first_line
from compressor.export.onnxruntime_model import ORT_ERRORS, open_session
from compressor.profiling.latency import Call, Timing, interleave

DTYPES: Mapping[str, Any] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(int8)": np.int8,
    "tensor(int16)": np.int16,
    "tensor(int32)": np.int32,
    "tensor(int64)": np.int64,
    "tensor(uint8)": np.uint8,
    "tensor(bool)": np.bool_,
}


@dataclass(frozen=True)
class OnnxFile:
    """What one file costs.

    Attributes:
        path: of it.
        size_bytes: with the weights that lie beside it.
        params: values that it stores.
        nodes: of its graph.
        timing: of one call.
    """

    path: Path
    size_bytes: int
    params: int
    nodes: int
    timing: Timing

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**asdict(self), "path": str(self.path)}


def time_files(paths: Mapping[str, Path], *, threads: int, batch_size: int) -> dict[str, OnnxFile]:
    """Time the files in turn, all on the same kind of inputs.

    Args:
        paths: by any names.
        threads: of one call.
        batch_size: where the first size of an input is open.

    Raises:
        ExportError: if a file cannot be read or run, or has another open size.
    """
    calls = {name: _call(path, threads, batch_size) for name, path in paths.items()}
    timings = interleave(calls)
    return {name: _describe(path, timings[name]) for name, path in paths.items()}


def _call(path: Path, threads: int, batch_size: int) -> Call:
    session = open_session(path, threads)
    generator = np.random.default_rng(0)
    feed = {item.name: _random(item, path, batch_size, generator) for item in session.get_inputs()}
    try:
        session.run(None, feed)
    except ORT_ERRORS as error:
        raise ExportError(
            f"ONNX Runtime cannot run {path} on {batch_size} samples: {first_line(error)} Give the "
            "batch size that it was exported with as --batch-size."
        ) from error
    return lambda: session.run(None, feed)


def _random(item: Any, path: Path, batch_size: int, generator: np.random.Generator) -> NDArray[Any]:
    """Values for one input: between 0 and 1, whole numbers 0 or 1."""
    open_sizes = [axis for axis, size in enumerate(item.shape) if not isinstance(size, int)]
    if set(open_sizes) - {0} or item.type not in DTYPES:
        raise ExportError(
            f"The input {item.name!r} of {path} is {item.type} of {item.shape}. Only "
            "tensors of which the first size alone is open can be timed: export it with fixed "
            "sizes."
        )
    shape = [batch_size if axis in open_sizes else size for axis, size in enumerate(item.shape)]
    dtype = np.dtype(DTYPES[item.type])
    if dtype.kind == "f":
        return generator.random(shape).astype(dtype)
    return generator.integers(0, 2, shape).astype(dtype)


def _describe(path: Path, timing: Timing) -> OnnxFile:
    beside = path.with_name(f"{path.name}.data")
    size = path.stat().st_size + (beside.stat().st_size if beside.exists() else 0)
    graph = onnx.load(path, load_external_data=False).graph
    params = sum(prod(tensor.dims) for tensor in graph.initializer)
    return OnnxFile(path, size, params, len(graph.node), timing)
