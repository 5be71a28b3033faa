"""How much memory training takes."""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path

import torch

from compressor.training.callbacks.monitor import Monitor
from compressor.training.state import State

STATM = Path("/proc/self/statm")


class MemoryMonitor(Monitor):
    """Logs bytes: "memory/peak_rss_bytes" and, on Linux, "memory/rss_bytes" of the process.

    On CUDA also "memory/cuda_allocated_bytes", which tensors hold now, "memory/cuda_peak_bytes",
    the most they held since the process began or the peak was reset, and
    "memory/cuda_reserved_bytes", which torch has taken from the device.

    Args:
        interval: between values.
    """

    def look(self, state: State) -> None:
        """Log what is taken now."""
        values = {"memory/peak_rss_bytes": peak_rss_bytes()}
        if STATM.exists():
            values["memory/rss_bytes"] = rss_bytes()
        if state.device.type == "cuda":
            values["memory/cuda_allocated_bytes"] = torch.cuda.memory_allocated(state.device)
            values["memory/cuda_peak_bytes"] = torch.cuda.max_memory_allocated(state.device)
            values["memory/cuda_reserved_bytes"] = torch.cuda.memory_reserved(state.device)
        state.log({name: float(value) for name, value in values.items()})


def rss_bytes() -> int:
    """Bytes of this process that are in memory now; on Linux."""
    pages = int(STATM.read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def peak_rss_bytes() -> int:
    """The most bytes of this process that were in memory at a time."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
