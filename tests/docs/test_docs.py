"""The code in the guides runs, from top to bottom, and so does what README says of pruning."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from compressor import Config, load
from compressor.testing.models import TinyResNet
from docs.generate import PAGES

FOLDER = Path(__file__).parents[2] / "docs"
BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["training.md", "structure.md", "quantization.md", "search.md"])
def test_every_block_of_the_guide_runs(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "guide"}
    blocks = BLOCK.findall((FOLDER / name).read_text())
    assert len(blocks) >= 4
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for number, block in enumerate(blocks):
            exec(compile(block, f"{name}, block {number + 1}", "exec"), namespace)


@pytest.mark.parametrize("name", ["workstation.md", "ray.md"])
def test_the_configurations_of_the_guides_to_several_processes_are_taken(name: str) -> None:
    namespace: dict[str, object] = {"__name__": "guide"}
    for block in BLOCK.findall((FOLDER / "distributed" / name).read_text()):
        exec(compile(block, name, "exec"), namespace)
    config = Config.from_dict(namespace["config"])  # type: ignore[arg-type]
    assert config.executor.kind == "ray"


@pytest.mark.slow
def test_the_readme_prunes_and_saves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = BLOCK.findall((FOLDER.parent / "README.md").read_text())
    (block,) = [block for block in blocks if "compressor.prune(" in block]
    inputs = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    namespace: dict[str, Any] = {"model": TinyResNet().eval(), "inputs": inputs}
    exec(compile(block, "README.md", "exec"), namespace)
    again = load("small", TinyResNet())
    torch.testing.assert_close(again(inputs), namespace["small"](inputs))


@pytest.mark.parametrize("name", PAGES)
def test_pages_made_from_the_code_are_up_to_date(name: str) -> None:
    assert (FOLDER / name).read_text() == PAGES[name](), "run python -m docs.generate"
