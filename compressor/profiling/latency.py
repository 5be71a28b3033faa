"""Timing as a ratio: calls take turns in blocks, so that drift of the machine hits all alike.

Blocks and not single calls alternate: with each call the next would find the caches cold, which
costs small models 10 to 15 %. Blocks are short and many, and the fastest one counts: whatever else
runs on the machine only ever adds time, for longer than a block. On a busy machine the ratio of two
networks of about a millisecond then repeats within 1 %, where medians of blocks of 60 ms, in the
same time, differ by 4 to 10 %. Of calls much longer than a block no such thing is known.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from compressor.interfaces.inputs import ModelInputs, device_of
from compressor.profiling.inference import inference

Call = Callable[[], object]
LEAST_ROUNDS = 9
LONG_MS = 60.0
MOST_CALLS = 2**20  # of a block, where the clock does not see a single call


@dataclass(frozen=True)
class Timing:
    """Time of one call, out of several rounds.

    Attributes:
        best_ms: the least of the rounds' means; what figures are made of.
        median_ms: of the rounds' means.
        low_ms: lower quartile.
        high_ms: upper quartile.
        calls: how many were timed in all.
    """

    best_ms: float
    median_ms: float
    low_ms: float
    high_ms: float
    calls: int


def interleave(
    calls: Mapping[str, Call],
    *,
    total_ms: float = 540.0,
    block_ms: float = 6.0,
    warmup_ms: float = 200.0,
    device: torch.device | str = "cpu",
) -> dict[str, Timing]:
    """Time `calls` in turn; every second round goes backwards.

    A call's time is its share of a block of equal calls in a row, so on CUDA the queue stays full.

    Args:
        calls: by name.
        total_ms: about how long each call is timed, in `LEAST_ROUNDS` blocks or more.
        block_ms: about how long a block lasts; a longer call is a block by itself.
        warmup_ms: each call is repeated at least so long before anything is timed.
        device: where the calls compute; on "cuda" blocks are timed with CUDA events.
    """
    time_block = _time_cuda_block if torch.device(device).type == "cuda" else _time_cpu_block
    sizes, blocks, short = {}, {}, set()
    for name, call in calls.items():
        call_ms = _warm_up(call, warmup_ms, time_block)
        sizes[name] = max(1, min(MOST_CALLS, round(block_ms / max(call_ms, 1e-9))))
        if call_ms < LONG_MS:
            short.add(name)
        blocks[name] = max(round(total_ms / max(block_ms, call_ms)), LEAST_ROUNDS)
    rounds = max(blocks.values(), default=0)
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds):
        for name in reversed(list(calls)) if number % 2 else calls:
            if number * blocks[name] // rounds == (number - 1) * blocks[name] // rounds:
                continue  # a long call: its blocks are spread over all rounds
            if name in short:
                calls[name]()  # finds the caches cold, which a long call does not notice
            samples[name].append(time_block(calls[name], sizes[name]) / sizes[name])
    return {name: _timing(samples[name], len(samples[name]) * sizes[name]) for name in calls}


@contextmanager
def eager_call(
    model: nn.Module, inputs: ModelInputs, *, threads: int | None = None
) -> Iterator[Call]:
    """`model` on `inputs` as a call to time: evaluation mode, no gradients, inputs on its device.

    Args:
        model: mode, gradients and random state are restored afterwards.
        inputs: one call's arguments.
        threads: of torch inside; None leaves them. Restored afterwards.
    """
    inputs = inputs.to(device_of(model))
    threads_before = torch.get_num_threads()
    torch.set_num_threads(threads or threads_before)
    try:
        with inference(model):
            yield lambda: inputs.call(model)
    finally:
        torch.set_num_threads(threads_before)


def _warm_up(call: Call, warmup_ms: float, time_block: Callable[[Call, int], float]) -> float:
    """Milliseconds of one call, once it is warm."""
    call()  # the first one may allocate and compile
    spent_ms, size = 0.0, 1
    while True:
        block_ms = time_block(call, size)
        spent_ms += block_ms
        if spent_ms >= warmup_ms or size >= MOST_CALLS:
            return block_ms / size
        size *= 2


def _time_cpu_block(call: Call, size: int) -> float:
    start = time.perf_counter()
    for _ in range(size):
        call()
    return (time.perf_counter() - start) * 1e3


def _time_cuda_block(call: Call, size: int) -> float:
    start = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    start.record()
    for _ in range(size):
        call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


def _timing(samples_ms: list[float], calls: int) -> Timing:
    low, median, high = statistics.quantiles(samples_ms, n=4, method="inclusive")
    return Timing(min(samples_ms), median, low, high, calls)
