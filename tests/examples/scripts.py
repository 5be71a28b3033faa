"""Runs a script of `examples/` in this process."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import onnxruntime as ort
import pytest
import torch
from torch import Tensor

from compressor import Result

EXAMPLES = Path(__file__).parents[2] / "examples"


def load(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module; it finds its neighbours until the test ends."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


def run(module: ModuleType, *arguments: object) -> Result:
    """What `main` returns in its short form; the global random state is put back."""
    with torch.random.fork_rng():
        result = module.main(["--quick", *map(str, arguments)])
    assert isinstance(result, Result)
    return result


def outputs_of_file(path: Path, inputs: dict[str, Tensor]) -> Tensor:
    """The first output of an ONNX file, without the package."""
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    arrays = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
    return torch.from_numpy(arrays[0])
