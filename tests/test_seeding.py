from __future__ import annotations

import random
from contextlib import suppress

import numpy as np
import torch

from compressor.seeding import derive_seed, generator, isolated_rng


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
