from __future__ import annotations

import pytest
import torch
from torch import nn

from compressor.interfaces.inputs import ModelInputs
from compressor.profiling import latency
from compressor.profiling.latency import LEAST_ROUNDS, eager_call, interleave
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
    timings = interleave({"a": clock.call("a", 2.0), "b": clock.call("b", 0.5)}, total_ms=120)
    assert timings["a"].best_ms == pytest.approx(2.0)
    assert timings["b"].low_ms == pytest.approx(0.5)
    assert timings["a"].calls == 20 * 3  # blocks of 6 ms
    assert timings["b"].calls == 20 * 12


def test_blocks_alternate_and_every_second_round_goes_backwards(clock: FakeClock) -> None:
    calls = {name: clock.call(name, 20.0) for name in "ab"}
    interleave(calls, total_ms=240, block_ms=60, warmup_ms=20.0)
    assert clock.blocks() == [
        "a",
        "b",
        *"ab" * 4,
        "a",
        "b",
    ]  # warm-up, then ab ba ...
    assert clock.log[:12] == 2 * ["a"] + 2 * ["b"] + 4 * ["a"] + 4 * ["b"]  # one not timed, three


def test_drift_of_the_machine_hits_all_calls_alike(clock: FakeClock) -> None:
    def slowing(name: str, ms: float) -> latency.Call:
        return lambda: clock.call(name, ms * (1 + clock.seconds))()

    timings = interleave({"a": slowing("a", 2.0), "b": slowing("b", 1.0)})
    assert timings["a"].best_ms / timings["b"].best_ms == pytest.approx(2.0, rel=0.05)
    slow = timings["a"]
    assert slow.best_ms < slow.low_ms < slow.median_ms < slow.high_ms


def test_a_call_longer_than_a_block_runs_once_a_round(clock: FakeClock) -> None:
    timing = interleave({"a": clock.call("a", 500.0)})["a"]
    assert (timing.calls, timing.best_ms) == (LEAST_ROUNDS, pytest.approx(500.0))
    assert len(clock.log) == 2 + LEAST_ROUNDS  # with the first, and the warm-up


def test_a_long_call_does_not_shorten_the_time_of_a_short_one(clock: FakeClock) -> None:
    calls = {"long": clock.call("long", 100.0), "short": clock.call("short", 1.0)}
    timings = interleave(calls, total_ms=1000)
    assert timings["long"].calls == 10
    assert timings["short"].calls == 167 * 6
    assert timings["long"].best_ms / timings["short"].best_ms == pytest.approx(100.0)
    last = [i for i, name in enumerate(clock.log) if name == "long"][-1]
    assert last > 0.9 * len(clock.log)  # spread over all rounds


def test_a_call_too_quick_for_the_clock_ends(clock: FakeClock, monkeypatch) -> None:
    monkeypatch.setattr(latency, "MOST_CALLS", 64)
    timing = interleave({"a": clock.call("a", 0.0)}, total_ms=0)["a"]
    assert (timing.calls, timing.best_ms) == (64 * LEAST_ROUNDS, 0.0)


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


def test_what_other_programs_add_does_not_count(clock: FakeClock) -> None:
    """A program beside it that takes the core for 40 ms of every 50."""

    def disturbed(name: str, ms: float) -> latency.Call:
        def call() -> None:
            is_taken = clock.seconds % 0.05 < 0.04
            clock.call(name, 3 * ms if is_taken else ms)()

        return call

    timings = interleave({"a": disturbed("a", 1.0), "b": disturbed("b", 0.5)})
    assert timings["a"].best_ms / timings["b"].best_ms == pytest.approx(2.0, rel=0.01)
    assert timings["a"].median_ms > 1.2
