"""What 2:4 sparsity gains in time: linear layers on the sparse tensor cores of a GPU.

python -m benchmarks.sparse_2_4

Only CUDA from compute capability 8.0 on has kernels for it; elsewhere there is nothing to measure,
and nothing is claimed.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.sparse import to_sparse_semi_structured

from benchmarks.common import finish, make_parser
from compressor.training.algorithms.gradual_sparsity import nm_mask

SIZES = (1024, 4096, 8192)  # inputs and outputs of the layer
ROWS = (64, 1024, 8192)  # that it is called with
TOLERANCE = 1e-2  # of the largest output: half precision, summed in another order
NO_CUDA = "no CUDA of compute capability 8.0 or later: 2:4 has no kernels here and gains no time"


def main() -> None:
    """Measure, or say that there is nothing to measure."""
    parser = make_parser(__doc__)
    arguments = parser.parse_args()
    if not has_sparse_kernels():
        print(NO_CUDA)
        return
    started = time.monotonic()
    rows = [
        measure_layer(size, count, dtype, arguments)
        for dtype in (torch.float16, torch.bfloat16)
        for size in (SIZES[:1] if arguments.quick else SIZES)
        for count in (ROWS[:1] if arguments.quick else ROWS)
    ]
    speedups = [row["speedup"] for row in rows]
    summary = {
        "largest_speedup": max(speedups),
        "median_speedup": statistics.median(speedups),
        "wrong": sum(row["error"] > TOLERANCE for row in rows),
    }
    finish(rows, summary, arguments, started)


def has_sparse_kernels() -> bool:
    """Whether this machine's GPU multiplies 2:4 matrices."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)


def measure_layer(
    size: int, rows: int, dtype: torch.dtype, arguments: argparse.Namespace
) -> dict[str, Any]:
    """A linear layer of `size` inputs and outputs on `rows` rows, dense and 2:4."""
    generator = torch.Generator(device="cuda").manual_seed(arguments.seed)
    weight = torch.randn(size, size, device="cuda", generator=generator)
    weight = (weight * nm_mask(weight, 2, 4)).to(dtype) / size**0.5
    x = torch.randn(rows, size, device="cuda", generator=generator).to(dtype)
    sparse = to_sparse_semi_structured(weight)
    with torch.no_grad():
        calls: dict[str, Callable[[], Tensor]] = {
            "dense": lambda: torch.nn.functional.linear(x, weight),
            "sparse": lambda: torch.nn.functional.linear(x, sparse),
        }
        expected, found = calls["dense"]().float(), calls["sparse"]().float()
        milliseconds = time_on_gpu(calls, rounds=3 if arguments.quick else 15)
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "size": size,
        "rows": rows,
        "dense_ms": milliseconds["dense"],
        "sparse_ms": milliseconds["sparse"],
        "speedup": milliseconds["dense"] / milliseconds["sparse"],
        "error": ((found - expected).abs().max() / expected.abs().max()).item(),
    }


def time_on_gpu(
    calls: dict[str, Callable[[], Tensor]], rounds: int, block: int = 50
) -> dict[str, float]:
    """Median milliseconds of a call, in alternating blocks on a full queue; the first warms up."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name, call in calls.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(block):
                call()
            end.record()
            torch.cuda.synchronize()
            if number:
                times[name].append(start.elapsed_time(end) / block)
    return {name: statistics.median(values) for name, values in times.items()}


if __name__ == "__main__":
    main()
