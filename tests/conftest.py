"""One thread a process: the suite runs on two of them, and small nets are slower on more.

Clocks run for milliseconds, see `tests.brevity`.
"""

from __future__ import annotations

import os
import tempfile

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start

import torch

from tests.brevity import be_brief

torch.set_num_threads(1)
be_brief()

# What is measured in tests stays out of the user's cache; processes that tests start inherit it.
_CACHE = tempfile.TemporaryDirectory(prefix="compressor-tests-")
os.environ["COMPRESSOR_CACHE"] = _CACHE.name


def pytest_unconfigure(config: pytest.Config) -> None:
    """Remove the cache."""
    del config
    _CACHE.cleanup()
