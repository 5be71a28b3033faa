"""What is said of a variant against the goal."""

from __future__ import annotations

from dataclasses import replace

import pytest

from compressor.result import Cost
from compressor.search.goal import Goal

REFERENCE = Cost(params=100, macs=1000, size_bytes=4000, latency_ms=2.0)
GOAL = Goal("accuracy", 90.0, 1.0, True, "size_bytes", reference_cost=REFERENCE)


@pytest.mark.parametrize(
    ("resources", "said"),
    [
        (("size_bytes",), "1.1x larger"),
        (("latency_ms", "macs"), "4.0x faster and 2.0x fewer MACs"),
        (("macs", "size_bytes"), "2.0x fewer MACs and 1.1x larger"),
    ],
)
def test_what_became_worse_is_called_so(resources: tuple[str, ...], said: str) -> None:
    """A file that had grown was "0.91x smaller"."""
    goal = replace(GOAL, resource=resources[0], also=resources[1:], weights=(1.0,) * len(resources))
    assert goal.gain(Cost(params=50, macs=500, size_bytes=4400, latency_ms=0.5)) == said


def test_without_the_reference_nothing_is_said() -> None:
    assert replace(GOAL, reference_cost=None).gain(REFERENCE) == ""
