"""What the guide to deploying says: its ten lines run where neither package nor torch is."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from compressor.export.quantize import quantize

PAGE = Path(__file__).parents[2] / "docs" / "deploy.md"
BLOCK = re.compile(r"^## Ten lines without this package\n\n```python\n(.*?)^```", re.S | re.M)
ALONE = "import sys; sys.modules.update(compressor=None, torch=None); exec(sys.stdin.read())"


@pytest.mark.slow
def test_the_ten_lines_need_onnxruntime_alone(tmp_path: Path) -> None:
    (lines,) = BLOCK.findall(PAGE.read_text())
    assert len(lines.splitlines()) <= 10
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(7200, 10))
        quantize(model.eval(), [torch.randn(4, 3, 32, 32)]).save_onnx(tmp_path / "model.onnx")
    done = subprocess.run(
        [sys.executable, "-c", ALONE],
        input=lines,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    classes = [int(word) for word in done.stdout.strip().strip("[]").split()]
    assert len(classes) == 4
