"""Randomness from one seed, in streams that do not disturb each other or the user's."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

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


def rng_state() -> dict[str, Any]:
    """Where the global generators of torch (CPU and CUDA), numpy and random are, as plain data.

    It goes into checkpoints: tensors, numbers, strings and None in lists and dicts.
    """
    version, numbers, gauss = random.getstate()
    is_awake: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if is_awake else None,
        "numpy": _to_plain(np.random.get_state(legacy=False)),
        "random": [version, torch.from_numpy(np.fromiter(numbers, dtype=np.int64)), gauss],
    }


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Put the global generators where `rng_state` found them: they draw the same again.

    Devices that were not there then keep their generators as they are.
    """
    torch.set_rng_state(state["torch"])
    if state["cuda"] is None:
        # CUDA was asleep, to wake up with the CPU's seed; it may be awake by now.
        torch.cuda.manual_seed_all(torch.initial_seed())
    else:
        here = range(torch.cuda.device_count())
        for index, values in zip(here, state["cuda"], strict=False):
            torch.cuda.set_rng_state(values, index)
    np.random.set_state(_from_plain(state["numpy"]))
    version, numbers, gauss = state["random"]
    random.setstate((version, tuple(numbers.tolist()), gauss))


@contextmanager
def isolated_rng(seed: int) -> Iterator[None]:
    """Seed the global generators of torch (CPU and CUDA), numpy and random; put them back after."""
    before = rng_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    try:
        yield
    finally:
        set_rng_state(before)


def _to_plain(value: Any) -> Any:
    """Arrays as type and bytes: torch does not know all of numpy's types."""
    if isinstance(value, Mapping):
        return {key: _to_plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        return [value.dtype.str, torch.from_numpy(value.view(np.uint8).copy())]
    return value


def _from_plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _from_plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return value[1].numpy().view(value[0])
    return value
