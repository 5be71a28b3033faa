"""The memory that `benchmarks.search_cost` measures."""

from __future__ import annotations

import pytest

from benchmarks.search_cost import above_imports, in_process, resident_bytes

BLOCK = 200 * 2**20


def hold_a_block() -> dict[str, int]:
    """Memory before and after a block was filled and let go."""
    before = resident_bytes("VmRSS")
    block = bytearray(b"x" * BLOCK)
    del block
    return {"before": before, "now": resident_bytes("VmRSS"), "peak": resident_bytes("VmHWM")}


def fail() -> dict[str, int]:
    """Die before the answer."""
    raise SystemExit(3)


@pytest.mark.slow
def test_the_peak_of_a_process_has_what_it_held_for_a_moment() -> None:
    held = in_process(hold_a_block)
    assert above_imports(held) >= BLOCK
    assert held["now"] - held["before"] < BLOCK / 2


@pytest.mark.slow
def test_a_process_without_an_answer_is_said() -> None:
    with pytest.raises(SystemExit, match="fail ended without an answer"):
        in_process(fail)
