"""One finished run for the tests that look at one; the console's handlers and paths put back."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.testing

from compressor.cli.main import app

YAML = """
factory: tests.cli.tiny_job:make
arguments: {hidden: 32}
config: {delta: 25.0}
"""

Invoke = Callable[..., typer.testing.Result]


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """Commands set up logging, and look for modules in folders."""
    logger = logging.getLogger("compressor")
    handlers, level, paths = list(logger.handlers), logger.level, list(sys.path)
    yield
    logger.handlers[:] = handlers
    logger.setLevel(level)
    sys.path[:] = paths


@pytest.fixture(scope="session")
def invoke() -> Invoke:
    """Run the program in this process."""
    return lambda *words: typer.testing.CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture(scope="session")
def finished(
    invoke: Invoke, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    """The folder of a run that `compressor run` did, and what it printed."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "tiny.yaml").write_text(YAML)
    run_dir = folder / "run"
    done = invoke("run", folder / "tiny.yaml", "--run-dir", run_dir, "--json", "--quiet")
    assert done.exit_code == 0, done.stderr
    return run_dir, json.loads(done.stdout)
