"""The time that a layer takes inside ONNX Runtime, from the runtime's own trace of its nodes."""

from __future__ import annotations

import json
import re
import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from torch import Tensor

from compressor.targets.onnxruntime_model import open_session

# Kernels that compute a layer. The others in its file convert types or layouts, which in a whole
# model happens at its ends and not around each layer.
LAYER_KERNEL = re.compile("Conv|Gemm|MatMul")
TRUNCATED_MS = 0.5e-3  # the trace has whole microseconds, rounded down
SECONDS = 0.05
LEAST_RUNS, MOST_RUNS = 5, 300  # reading a longer trace takes longer than writing it


def layer_kernel_ms(path: Path, sample: Tensor, threads: int) -> float:
    """Milliseconds of the convolutions and matrix products in one run of the file.

    Args:
        path: a file with one input.
        sample: for that input.
        threads: of one call.
    """
    totals_ms: dict[str, list[float]] = defaultdict(list)
    for event in _trace(path, sample, threads):
        if LAYER_KERNEL.search(event["args"].get("op_name", "")):
            totals_ms[event["name"]].append(event["dur"] * 1e-3 + TRUNCATED_MS)
    return sum(_middle_mean(samples) for samples in totals_ms.values())


def _trace(path: Path, sample: Tensor, threads: int) -> list[dict[str, Any]]:
    """An event for each run of each node."""
    with tempfile.TemporaryDirectory() as folder:
        session = open_session(path, threads, profile_prefix=Path(folder) / "trace")
        feed = {session.get_inputs()[0].name: sample.numpy()}
        runs = 0
        end = time.perf_counter() + SECONDS
        while runs < LEAST_RUNS or (runs < MOST_RUNS and time.perf_counter() < end):
            session.run(None, feed)
            runs += 1
        events = json.loads(Path(session.end_profiling()).read_text())
    return [e for e in events if e["cat"] == "Node" and e["name"].endswith("_kernel_time")]


def _middle_mean(samples: list[float]) -> float:
    """Mean of the middle half: finer than the clock, unlike the median, and blind to outliers."""
    quarter = len(samples) // 4
    return statistics.fmean(sorted(samples)[quarter : len(samples) - quarter])
