from __future__ import annotations

import io
import random
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from compressor.seeding import derive_seed, generator, isolated_rng, rng_state, set_rng_state
from compressor.training.checkpoint import check_plain, read_checkpoint, write_checkpoint


def draw() -> tuple[float, float, float]:
    return torch.rand(()).item(), float(np.random.rand()), random.random()


def test_a_derived_seed_is_the_same_on_every_machine() -> None:
    assert derive_seed(0, "epoch", 1) == 0x69B56F65052D6E30 >> 1  # sha256sum's first 16 digits


def test_streams_differ_by_every_part_and_its_type() -> None:
    parts = [(0,), (1,), (0, 1), (0, "1"), (0, "a", "b"), (0, "ab")]
    seeds = {derive_seed(*part) for part in parts}
    assert len(seeds) == len(parts)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_a_generator_does_not_touch_the_global_one() -> None:
    before = torch.get_rng_state()
    torch.rand(3, generator=generator(0, "mixup"))
    assert torch.equal(before, torch.get_rng_state())


def test_the_same_seed_draws_the_same_inside() -> None:
    with isolated_rng(3):
        first = draw()
    with isolated_rng(3):
        second = draw()
    with isolated_rng(4):
        other = draw()
    assert first == second
    assert not set(first) & set(other)


def test_all_generators_go_on_as_if_nothing_had_been_drawn() -> None:
    states = (torch.get_rng_state(), np.random.get_state(), random.getstate())
    expected = draw()
    torch.set_rng_state(states[0])
    np.random.set_state(states[1])
    random.setstate(states[2])
    with suppress(KeyError), isolated_rng(2**63 - 1):
        draw()
        raise KeyError
    assert draw() == expected


def draw_all() -> list[Any]:
    """Of every kind, an odd number of gaussians: numpy and random draw them in pairs."""
    return [
        *torch.rand(3).tolist(),
        *torch.randn(3).tolist(),
        torch.randperm(7).tolist(),
        *np.random.rand(3).tolist(),
        np.random.randn(),
        np.random.permutation(7).tolist(),
        random.random(),
        random.gauss(0, 1),
        random.sample(range(99), 5),
    ]


@pytest.mark.parametrize("draws", [0, 1, 2, 400])
def test_draws_after_restoring_are_equal(tmp_path: Path, draws: int) -> None:
    with isolated_rng(5):
        for _ in range(draws):
            draw_all()
        write_checkpoint(tmp_path / "rng", {"rng": rng_state()})
        expected = [draw_all() for _ in range(3)]
        torch.manual_seed(1)
        np.random.seed(1)
        random.seed(1)
        draw_all()
        set_rng_state(read_checkpoint(tmp_path / "rng")["rng"])
        assert [draw_all() for _ in range(3)] == expected


def test_a_gaussian_that_was_drawn_ahead_is_kept() -> None:
    with isolated_rng(0):
        np.random.randn()
        random.gauss(0, 1)
        state = rng_state()
        assert state["numpy"]["has_gauss"] == 1
        assert state["random"][2] is not None
        ahead = np.random.randn(), random.gauss(0, 1)
        np.random.seed(0)
        random.seed(0)
        set_rng_state(state)
        assert (np.random.randn(), random.gauss(0, 1)) == ahead


def test_reading_the_states_draws_nothing_and_later_draws_do_not_change_them() -> None:
    with isolated_rng(0):
        expected = draw_all()
    with isolated_rng(0):
        state = rng_state()
        assert draw_all() == expected
        set_rng_state(state)
        assert draw_all() == expected


def test_another_bit_generator_of_numpy_is_kept_too() -> None:
    """Its state has numbers of 128 bits."""
    old = np.random.get_bit_generator()
    try:
        np.random.set_bit_generator(np.random.PCG64(3))
        state = rng_state()
        check_plain(state, "")
        expected = np.random.rand(4).tolist()
        file = io.BytesIO()
        torch.save(state, file)
        file.seek(0)
        set_rng_state(torch.load(file, weights_only=True))
        assert np.random.rand(4).tolist() == expected
    finally:
        np.random.set_bit_generator(old)


def test_cuda_is_asked_only_when_it_is_awake(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[Any] = []
    states = [torch.zeros(2, dtype=torch.uint8), torch.ones(2, dtype=torch.uint8)]
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: states)
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda value, i: done.append((i, value)))
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: done.append(seed))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with isolated_rng(7):
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
        asleep = rng_state()
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
        awake = rng_state()
        done.clear()
        set_rng_state(asleep)
        assert (asleep["cuda"], done) == (None, [7])  # it begins with the CPU's seed
        done.clear()
        set_rng_state(awake)
        assert done == [(0, states[0])]  # the second device is not here
        set_rng_state(asleep)
