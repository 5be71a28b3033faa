"""What makes the suite quicker and changes nothing that it shows; `tests/conftest.py` calls it.

A run of the engine times each of its variants for a second or two, and single layers until two
times agree, which on a busy machine they do not. Most tests are about what the
engine makes of the figures, so clocks run for milliseconds in tests; a test about the clock says
for how long itself. Processes that tests start call `be_brief` too, and
`python -m tests.brevity MODULE ...` is `python -m MODULE ...` with it.
"""

from __future__ import annotations

import runpy
import sys

from compressor.profiling.latency import interleave
from compressor.targets import node_times

PATIENT = dict(interleave.__kwdefaults__)  # what users get
PATIENT_TIMES = node_times.MOST_TIMES
TOTAL_MS, BLOCK_MS, WARMUP_MS = 25.0, 2.5, 10.0


def be_brief() -> None:
    """Let `interleave` run for 35 ms a call, where it is not told for how long; time layers once.

    In this process.
    """
    brief = {"total_ms": TOTAL_MS, "block_ms": BLOCK_MS, "warmup_ms": WARMUP_MS}
    assert brief.keys() <= PATIENT.keys()
    interleave.__kwdefaults__.update(brief)
    node_times.MOST_TIMES = 1


if __name__ == "__main__":
    be_brief()
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
