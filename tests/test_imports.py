"""Importing costs nothing and does nothing."""

from __future__ import annotations

import subprocess
import sys

import pytest

import compressor


@pytest.mark.parametrize("name", compressor.__all__)
def test_every_public_name_resolves(name: str) -> None:
    assert getattr(compressor, name) is not None
    assert name in dir(compressor)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Engin'"):
        compressor.Engin  # noqa: B018


@pytest.mark.slow
def test_importing_the_package_does_not_import_torch() -> None:
    assert run_python("import sys, compressor; print('torch' in sys.modules)") == "False"


@pytest.mark.slow
def test_importing_every_name_has_no_effects() -> None:
    source = """
import logging, random, threading, warnings
import numpy, torch
def state():
    root = logging.getLogger()
    return (
        list(root.handlers), root.level, list(warnings.filters), threading.active_count(),
        random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist(),
        torch.get_num_threads(), torch.get_default_dtype(), torch.cuda.is_initialized(),
        torch.is_grad_enabled(),
    )
import onnx, onnxruntime, onnxscript, scipy.optimize, torch_pruning, torch.export, torch.onnx
before = state()
import compressor
for name in compressor.__all__:
    getattr(compressor, name)
print([index for index, (a, b) in enumerate(zip(before, state())) if a != b])
"""
    assert run_python(source) == "[]"


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [["--help"], ["demo", "--help"], ["--version"]])
def test_help_does_not_load_torch(arguments: list[str]) -> None:
    source = f"""
import sys
from compressor.cli.main import main
sys.argv = ["compressor", *{arguments!r}]
try:
    main()
except SystemExit as stop:
    assert not stop.code, stop.code
print("torch" in sys.modules)
"""
    assert run_python(source).splitlines()[-1] == "False"


def run_python(source: str) -> str:
    """What a fresh process prints."""
    done = subprocess.run(
        [sys.executable, "-c", source], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()
