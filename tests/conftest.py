"""One thread a process: the suite runs on two of them, and small nets are slower on more.

Clocks run for milliseconds, see `tests.brevity`.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterator

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start

import torch

from tests.brevity import be_brief

torch.set_num_threads(1)
be_brief()

# What is measured in tests stays out of the user's cache; processes that tests start inherit it.
_CACHE = tempfile.TemporaryDirectory(prefix="compressor-tests-")
os.environ["COMPRESSOR_CACHE"] = _CACHE.name


@pytest.fixture(autouse=True)
def silent_logger() -> Iterator[None]:
    """Nothing is shown in the next test because this one, or a fixture of it, asked for it."""
    logger = logging.getLogger("compressor")
    propagates = logger.propagate
    yield
    logger.handlers[:] = [each for each in logger.handlers if isinstance(each, logging.NullHandler)]
    logger.setLevel(logging.NOTSET)
    assert logger.propagate == propagates


def pytest_unconfigure(config: pytest.Config) -> None:
    """Remove the cache."""
    del config
    _CACHE.cleanup()
