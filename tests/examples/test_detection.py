"""The detector's example: its loss is torchvision's, its metric sees boxes, its short form runs."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(autouse=True)
def on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scripts import their neighbours by name."""
    monkeypatch.syspath_prepend(str(EXAMPLES))


def test_loss_and_boxes_are_those_of_torchvisions_detector() -> None:
    from detection import DetectionLoss, Network, default_boxes, make_loader, make_ssd

    with torch.random.fork_rng():
        torch.manual_seed(0)
        ssd = make_ssd(width=8)
    images, targets = next(iter(make_loader(4, "test", batch_size=4)))
    network = Network(ssd)
    ssd.eval()
    with torch.no_grad():
        expected = ssd(list(images))
        outputs = network(torch.stack(images))
        found = ssd.postprocess_detections(outputs, [default_boxes(ssd)] * 4, [(48, 48)] * 4)
    for ours, theirs in zip(found, expected, strict=True):
        for key in ("boxes", "scores", "labels"):
            torch.testing.assert_close(ours[key], theirs[key])
    ssd.train()
    for module in ssd.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 0.0  # two calls in a row see the same
    terms = DetectionLoss(ssd)(network, (images, targets))
    for name, expected_loss in ssd(list(images), list(targets)).items():
        torch.testing.assert_close(terms[name], expected_loss)


def test_boxes_that_are_right_have_a_precision_of_100(monkeypatch: pytest.MonkeyPatch) -> None:
    from detection import Network, Precision, make_loader, make_ssd

    loader = make_loader(6, "test", batch_size=3)
    ssd = make_ssd(width=8)
    remaining = iter([targets for _, targets in loader])

    def truth(*_: object) -> list[dict[str, torch.Tensor]]:
        return [{**each, "scores": torch.ones(len(each["labels"]))} for each in next(remaining)]

    monkeypatch.setattr(ssd, "postprocess_detections", truth)
    assert Precision(ssd).apply(Network(ssd), loader) == {"mAP": pytest.approx(100.0)}


@pytest.mark.slow
def test_the_short_form_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["detection.py", "--quick", "--run-dir", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", arguments)
    with torch.random.fork_rng():
        runpy.run_path(str(EXAMPLES / "detection.py"), run_name="__main__")
    assert "The file to deploy" in capsys.readouterr().out
    values = json.loads((tmp_path / "result.json").read_text())
    assert values["certificate"]["metric_name"] == "mAP"
    assert Path(values["artifacts"]["onnx"]).is_file()
