"""The time that a layer takes inside ONNX Runtime, from the runtime's own trace of its nodes."""

from __future__ import annotations

import json
import re
import statistics
import tempfile
import time
from collections import defaultdict
from functools import cache
from pathlib import Path
from typing import Any

import onnx
import torch
from onnx import TensorProto, helper
from torch import Tensor

from compressor.export.onnxruntime_model import open_session

# Kernels that compute a layer. The others in its file convert types or layouts, which in a whole
# model happens at its ends and not around each layer.
LAYER_KERNEL = re.compile("Conv|Gemm|MatMul")
TRUNCATED_MS = 0.5e-3  # the trace has whole microseconds, rounded down
SECONDS = 0.05
LEAST_RUNS, MOST_RUNS = 5, 300  # reading a longer trace takes longer than writing it
UNTRACED_SHARE = 0.3  # of the time: without a trace to read, it gives as many runs
AGREEMENT, MOST_TIMES = 1.05, 6
LEAST_MS = 1e-4  # of a layer: what is left of the smallest one is the clock's noise


def layer_kernel_ms(path: Path, sample: Tensor, threads: int) -> float:
    """Milliseconds of the convolutions and matrix products in one run of the file.

    Timed until the two fastest times agree: another program that takes the core for a while makes a
    layer look up to twice as slow.

    The trace makes every node one to three microseconds slower, which is more than a small layer
    takes. How much, is seen by running the file without it; it is taken off again.

    Args:
        path: a file with one input.
        sample: for that input.
        threads: of one call.
    """
    times_ms: list[float] = []
    while len(times_ms) < MOST_TIMES:
        times_ms = sorted([*times_ms, _timed_ms(path, sample, threads)])
        if len(times_ms) > 1 and times_ms[1] <= AGREEMENT * times_ms[0]:
            break
    return times_ms[0]


def _timed_ms(path: Path, sample: Tensor, threads: int) -> float:
    """`layer_kernel_ms`, once."""
    samples_ms: dict[str, list[float]] = defaultdict(list)
    kinds: dict[str, str] = {}
    for event in _trace(path, sample, threads):
        samples_ms[event["name"]].append(event["dur"] * 1e-3 + TRUNCATED_MS)
        kinds[event["name"]] = event["args"].get("op_name", "")
    traced_ms = {name: _middle_mean(samples) for name, samples in samples_ms.items()}
    untraced_ms = _run_ms(path, sample, threads) - _empty_run_ms(threads)
    trace_ms = max((sum(traced_ms.values()) - untraced_ms) / len(traced_ms), 0.0)
    layers = [name for name, kind in kinds.items() if LAYER_KERNEL.search(kind)]
    return sum(max(traced_ms[name] - trace_ms, LEAST_MS) for name in layers)


def _trace(path: Path, sample: Tensor, threads: int) -> list[dict[str, Any]]:
    """An event for each run of each node."""
    with tempfile.TemporaryDirectory() as folder:
        session = open_session(path, threads, profile_prefix=Path(folder) / "trace")
        _run_times_ms(session, sample, SECONDS)
        events = json.loads(Path(session.end_profiling()).read_text())
    return [e for e in events if e["cat"] == "Node" and e["name"].endswith("_kernel_time")]


def _run_ms(path: Path, sample: Tensor, threads: int) -> float:
    """One run without a trace."""
    session = open_session(path, threads)
    return _middle_mean(_run_times_ms(session, sample, SECONDS * UNTRACED_SHARE))


@cache
def _empty_run_ms(threads: int) -> float:
    """One run of a file that computes next to nothing."""
    value = helper.make_tensor_value_info
    float32 = TensorProto.FLOAT
    node = helper.make_node("Relu", ["input"], ["output"])
    ends = [value("input", float32, [1])], [value("output", float32, [1])]
    proto = helper.make_model(
        helper.make_graph([node], "empty", *ends),
        opset_imports=[helper.make_opsetid("", 20)],
        ir_version=10,
    )
    with tempfile.TemporaryDirectory() as folder:
        onnx.save(proto, Path(folder) / "empty.onnx")
        return _run_ms(Path(folder) / "empty.onnx", torch.zeros(1), threads)


def _run_times_ms(session: Any, sample: Tensor, seconds: float) -> list[float]:
    """Of each of the runs that fit into `seconds`."""
    feed = {session.get_inputs()[0].name: sample.numpy()}
    times_ms: list[float] = []
    now = time.perf_counter()
    end = now + seconds
    while len(times_ms) < LEAST_RUNS or (len(times_ms) < MOST_RUNS and now < end):
        started = now
        session.run(None, feed)
        now = time.perf_counter()
        times_ms.append((now - started) * 1e3)
    return times_ms


def _middle_mean(samples: list[float]) -> float:
    """Mean of the middle half: finer than the clock, unlike the median, and blind to outliers."""
    quarter = len(samples) // 4
    return statistics.fmean(sorted(samples)[quarter : len(samples) - quarter])
