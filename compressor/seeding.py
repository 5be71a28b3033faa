"""Randomness from one seed, in streams that do not disturb each other or the user's."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def derive_seed(seed: int, *parts: object) -> int:
    """A seed for the stream that `parts` name: the same on every machine and in every process.

    Args:
        seed: of the run.
        parts: values whose `repr` says which stream: strings and numbers.

    Returns:
        0 to 2**63 - 1.

    >>> derive_seed(0, "epoch", 1) == derive_seed(0, "epoch", 1)
    True
    >>> derive_seed(0, "epoch", 1) == derive_seed(0, "epoch", 2)
    False
    """
    text = repr((seed, *parts))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(seed: int, *parts: object) -> torch.Generator:
    """A CPU generator for the stream that `parts` name.

    >>> a, b = (torch.rand(2, generator=generator(0, "mixup")) for _ in range(2))
    >>> torch.equal(a, b)
    True
    """
    return torch.Generator().manual_seed(derive_seed(seed, *parts))


@contextmanager
def isolated_rng(seed: int) -> Iterator[None]:
    """Seed the global generators of torch (CPU and CUDA), numpy and random; put them back after."""
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    started_with = torch.initial_seed()
    is_awake: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    cuda = torch.cuda.get_rng_state_all() if is_awake else None
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    try:
        yield
    finally:
        if (
            cuda is None
        ):  # CUDA still has, or began with, the CPU's seed: waking it up is not needed
            torch.cuda.manual_seed_all(started_with)
        else:
            torch.cuda.set_rng_state_all(cuda)
        torch.set_rng_state(cpu)
        np.random.set_state(numpy)
        random.setstate(python)
