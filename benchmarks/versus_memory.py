"""How much memory ONNX Runtime takes to load a file and to run it on one sample.

python -m benchmarks.versus_memory FILE

Prints MiB: the most that was ever resident, less what was after the imports. A process of its own,
without torch; arguments are ones.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnxruntime as ort

RUNS = 10
TYPES = {"tensor(float)": np.float32, "tensor(int64)": np.int64, "tensor(int32)": np.int32}


def main() -> None:
    before = status_mib("VmRSS")
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = ort.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
    feed = {}
    for item in session.get_inputs():
        shape = [size if isinstance(size, int) else 1 for size in item.shape]
        feed[item.name] = np.ones(shape, TYPES[item.type])
    for _ in range(RUNS):
        session.run(None, feed)
    print(status_mib("VmHWM") - before)  # getrusage would count the parent's, which outlives exec


def status_mib(name: str) -> float:
    """A value of this process, by Linux's name for it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) / 2**10


if __name__ == "__main__":
    main()
