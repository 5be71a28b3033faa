from __future__ import annotations

import pytest
import torch
from torch import nn

from compressor.interfaces.inputs import ModelInputs
from compressor.profiling import latency
from compressor.profiling.latency import eager_call, interleave
from tests.brevity import PATIENT


class FakeClock:
    """Time that passes only in the calls."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.log: list[str] = []

    def call(self, name: str, ms: float) -> latency.Call:
        def pass_time() -> None:
            self.seconds += ms / 1e3
            self.log.append(name)

        return pass_time

    def blocks(self) -> list[str]:
        """The log with equal neighbours written once."""
        pairs = zip([None, *self.log], self.log, strict=False)
        return [name for before, name in pairs if name != before]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    fake = FakeClock()
    monkeypatch.setattr(interleave, "__kwdefaults__", PATIENT)
    monkeypatch.setattr(latency.time, "perf_counter", lambda: fake.seconds)
    return fake


def test_each_call_gets_its_own_time(clock: FakeClock) -> None:
    timings = interleave({"a": clock.call("a", 2.0), "b": clock.call("b", 0.5)}, rounds=4)
    assert timings["a"].median_ms == pytest.approx(2.0)
    assert timings["b"].low_ms == pytest.approx(0.5)
    assert timings["a"].calls == 4 * 30  # blocks of 60 ms
    assert timings["b"].calls == 4 * 120


def test_blocks_alternate_and_every_second_round_goes_backwards(clock: FakeClock) -> None:
    calls = {name: clock.call(name, 20.0) for name in "ab"}
    interleave(calls, rounds=4, warmup_ms=20.0)
    assert clock.blocks() == ["a", "b", "a", "b", "a", "b", "a"]  # warm-up, then ab ba ab ba
    assert clock.log == ["a", "b"] + 3 * ["a"] + 6 * ["b"] + 6 * ["a"] + 6 * ["b"] + 3 * ["a"]


def test_drift_of_the_machine_hits_all_calls_alike(clock: FakeClock) -> None:
    def slowing(name: str, ms: float) -> latency.Call:
        return lambda: clock.call(name, ms * (1 + clock.seconds))()

    timings = interleave({"a": slowing("a", 2.0), "b": slowing("b", 1.0)}, rounds=10)
    assert timings["a"].median_ms / timings["b"].median_ms == pytest.approx(2.0, rel=0.05)
    assert timings["a"].low_ms < timings["a"].median_ms < timings["a"].high_ms


def test_a_call_longer_than_a_block_runs_once_a_round(clock: FakeClock) -> None:
    timing = interleave({"a": clock.call("a", 500.0)}, rounds=1)["a"]
    assert (timing.calls, timing.median_ms) == (1, pytest.approx(500.0))
    assert timing.low_ms == timing.high_ms == timing.median_ms


def test_a_call_too_quick_for_the_clock_ends(clock: FakeClock, monkeypatch) -> None:
    monkeypatch.setattr(latency, "MOST_CALLS", 64)
    timing = interleave({"a": clock.call("a", 0.0)}, rounds=2)["a"]
    assert (timing.calls, timing.median_ms) == (128, 0.0)


def test_an_eager_call_is_in_evaluation_mode_without_gradients_with_its_threads() -> None:
    seen: list[tuple[bool, bool, int]] = []

    class Watches(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append((self.training, torch.is_grad_enabled(), torch.get_num_threads()))
            return super().forward(x)

    model = Watches(2, 2)
    before = torch.get_num_threads()
    with eager_call(model, ModelInputs((torch.zeros(1, 2),)), threads=before + 1) as call:
        call()
    assert seen == [(False, False, before + 1)]
    assert (model.training, torch.is_grad_enabled(), torch.get_num_threads()) == (
        True,
        True,
        before,
    )
