"""The U-Net's example: its metric is the one of the definition, and its short form runs."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(autouse=True)
def on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scripts import their neighbours by name."""
    monkeypatch.syspath_prepend(str(EXAMPLES))


class Echo(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        """Logits of the classes that the pixels are."""
        return F.one_hot(x[:, 0].long(), 11).permute(0, 3, 1, 2).float()


def test_the_metric_is_the_mean_of_intersections_over_unions() -> None:
    from segmentation import MeanIoU

    generator = torch.Generator().manual_seed(0)
    masks = torch.randint(11, (6, 8, 8), generator=generator)
    guesses = torch.randint(11, (6, 1, 8, 8), generator=generator)
    guesses[:3, 0] = masks[:3]
    batches = [(guesses[:4].float(), masks[:4]), (guesses[4:].float(), masks[4:])]
    ratios = []
    for kind in range(11):
        ours, theirs = guesses[:, 0] == kind, masks == kind
        ratios.append(float((ours & theirs).sum() / (ours | theirs).sum()))
    found = MeanIoU().apply(Echo(), batches)
    assert found["mIoU"] == pytest.approx(100 * sum(ratios) / 11, rel=1e-5)


@pytest.mark.slow
def test_the_short_form_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["segmentation.py", "--quick", "--run-dir", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", arguments)
    with torch.random.fork_rng():
        runpy.run_path(str(EXAMPLES / "segmentation.py"), run_name="__main__")
    assert "The file to deploy" in capsys.readouterr().out
    values = json.loads((tmp_path / "result.json").read_text())
    assert values["certificate"]["metric_name"] == "mIoU"
    assert values["certificate"]["within_delta"]
    assert Path(values["artifacts"]["onnx"]).is_file()
