"""The code in the guide runs, from top to bottom."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from docs.generate import PAGES

GUIDE = Path(__file__).parents[2] / "docs" / "training.md"


@pytest.mark.slow
def test_every_block_of_the_guide_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "guide"}
    blocks = re.findall(r"^```python\n(.*?)^```", GUIDE.read_text(), re.DOTALL | re.MULTILINE)
    assert len(blocks) > 8
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for number, block in enumerate(blocks):
            exec(compile(block, f"{GUIDE.name}, block {number + 1}", "exec"), namespace)


@pytest.mark.parametrize("name", PAGES)
def test_pages_made_from_the_code_are_up_to_date(name: str) -> None:
    assert (GUIDE.parent / name).read_text() == PAGES[name](), "run python -m docs.generate"
