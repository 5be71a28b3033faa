"""One harness for the files of all rows: metric, latency, memory and size in ONNX Runtime."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import Tensor

from benchmarks.common import ROOT
from benchmarks.quantization_peers import open_session
from compressor.profiling.latency import Timing, interleave

BATCH_SIZES = (1, 32)
TOTAL_MS, BLOCK_MS = 1600.0, 10.0
QUICK_TOTAL_MS, QUICK_BLOCK_MS = 90.0, 10.0


@dataclass(frozen=True)
class Judgement:
    """What a file scores.

    Attributes:
        right: samples that it names the class of.
        judged: samples in all.
    """

    right: int
    judged: int

    @property
    def percent(self) -> float:
        """Of right answers."""
        return 100 * self.right / self.judged


def judge(path: Path, loader: Iterable[tuple[Tensor, Tensor]], threads: int = 1) -> Judgement:
    """Accuracy of a file with one input, whose first output is logits."""
    session = open_session(path, threads)
    name = session.get_inputs()[0].name
    right = judged = 0
    for inputs, labels in loader:
        logits = session.run(None, {name: inputs.numpy()})[0]
        right += int((logits.argmax(1) == labels.numpy()).sum())
        judged += len(labels)
    return Judgement(right, judged)


def time_files(
    files: Mapping[str, Path], samples: Tensor, *, is_quick: bool = False
) -> dict[int, dict[str, Timing]]:
    """Batch size -> name -> time of a call at one thread, all files in turns.

    Args:
        files: with one input each.
        samples: of which a call gets as many as it needs, repeated if there are too few.
        is_quick: fewer and shorter blocks.
    """
    total_ms, block_ms = (QUICK_TOTAL_MS, QUICK_BLOCK_MS) if is_quick else (TOTAL_MS, BLOCK_MS)
    sessions = {name: open_session(path) for name, path in files.items()}
    times = {}
    for size in BATCH_SIZES:
        repeats = -(-size // len(samples))
        batch = samples.repeat(repeats, *[1] * (samples.dim() - 1))[:size].numpy()
        calls = {
            name: partial(session.run, None, {session.get_inputs()[0].name: batch})
            for name, session in sessions.items()
        }
        times[size] = interleave(
            calls, total_ms=total_ms, block_ms=block_ms, warmup_ms=15 * block_ms
        )
    return times


def peak_memory_mib(path: Path) -> float:
    """See `benchmarks.versus_memory`."""
    command = [sys.executable, "-m", "benchmarks.versus_memory", str(path.resolve())]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return float(done.stdout)


def file_digest(path: Path) -> str:
    """SHA-256 of its bytes."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
