"""What `benchmarks.scaling` reckons from what it measures."""

from __future__ import annotations

import pytest

from benchmarks.scaling import Network, efficiency, fit_network, makespan
from benchmarks.scaling_ranks import APART, lost_to_edits


def test_a_network_is_found_again_from_its_messages() -> None:
    network = Network(bytes_per_second=2e9, latency=1e-4)
    times = {
        str(size): 1000 * (2 * network.latency + size * 2**20 / network.bytes_per_second)
        for size in (0.25, 1, 16)
    }
    found = fit_network(times)
    assert found.bytes_per_second == pytest.approx(2e9)
    assert found.latency == pytest.approx(1e-4)


def test_a_ring_moves_nearly_twice_the_gradients_however_many_there_are() -> None:
    fast = Network(bytes_per_second=1e9, latency=0.0)
    # By hand: 0.1 GB of gradients, 2 * 63 / 64 of them through each link, 0.1 s a GB/s.
    assert efficiency(1.0, 1e8, fast, 64) == pytest.approx(1 / (1 + 2 * 63 / 64 * 0.1))
    assert efficiency(1.0, 1e8, fast, 64, hidden=0.5) == 1


def test_a_round_takes_its_slowest_variant_and_every_measurement() -> None:
    assert makespan([10.0], [1.0], workers=4, seed=0, trials=10) == pytest.approx(3 * 10 + 10)
    assert makespan([10.0, 20.0], [0.0], workers=100, seed=0, trials=100) == pytest.approx(20)


def test_what_an_edit_takes_is_over_the_usual_steps() -> None:
    steps = [2.0] * (APART * 4)
    for number in (1, 2):
        first = APART * number - 2
        steps[first], steps[first + 2] = 5.0, 4.0
    assert lost_to_edits(steps, 2) == pytest.approx(3 + 2)
