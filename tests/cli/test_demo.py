"""The demo trains once, says what is wrong with its folder, and runs to the end."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from compressor.cli import demo
from compressor.cli.digits import digit_loaders
from compressor.errors import CheckpointError, StudyError
from compressor.interfaces import Device


def reference(folder: Path, *, seed: int = 0) -> torch.nn.Module:
    loader = digit_loaders()["train"]
    return demo.trained_reference(folder, loader, epochs=4, seed=seed, device=Device.CPU)


@pytest.fixture
def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is tested is the file."""
    monkeypatch.setattr(demo, "train", lambda model, *_, **__: model.linear.bias.data.fill_(7.0))


@pytest.mark.usefixtures("no_training")
def test_a_second_run_reads_what_the_first_one_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = reference(tmp_path)
    monkeypatch.setattr(demo, "train", None)
    second = reference(tmp_path)
    assert second.linear.bias.eq(7.0).all()  # type: ignore[union-attr,operator]
    for name, tensor in second.state_dict().items():
        assert tensor.equal(first.state_dict()[name]), name


@pytest.mark.slow
def test_training_learns_and_repeats_by_seed(tmp_path: Path) -> None:
    state = torch.get_rng_state()
    first, second = (reference(tmp_path / name, seed=3) for name in ("a", "b"))
    assert torch.get_rng_state().equal(state)
    assert first.linear.weight.equal(second.linear.weight)  # type: ignore[union-attr,operator,arg-type]
    images, labels = next(iter(digit_loaders()["test"]))
    assert (first(images).argmax(1) == labels).float().mean() > 0.5


@pytest.mark.usefixtures("no_training")
def test_a_folder_of_another_demo_is_refused(tmp_path: Path) -> None:
    reference(tmp_path, seed=0)
    with pytest.raises(StudyError, match=r"another demo.*another --run-dir"):
        reference(tmp_path, seed=1)


@pytest.mark.usefixtures("no_training")
def test_a_damaged_reference_is_named(tmp_path: Path) -> None:
    reference(tmp_path)
    path = tmp_path / "reference.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"reference\.safetensors is damaged"):
        reference(tmp_path)


def test_a_folder_that_cannot_be_written_is_refused_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "train", None)
    (tmp_path / "file").write_text("")
    with pytest.raises(StudyError, match="cannot be written"):
        reference(tmp_path / "file" / "below")


@pytest.mark.slow
def test_the_demo_certifies_a_smaller_model_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    before = run_demo(tmp_path)
    assert before["certificate"]["within_delta"] is True
    assert before["certificate"]["size_ratio"] > 1
    assert before["certificate"]["macs_ratio"] >= 1
    written = {
        path: path.stat().st_mtime_ns for path in (tmp_path / "variants").rglob("*.safetensors")
    }
    after = run_demo(tmp_path)
    assert after["certificate"]["metric"] == before["certificate"]["metric"]
    assert all(path.stat().st_mtime_ns == mtime for path, mtime in written.items())


def run_demo(folder: Path) -> dict[str, Any]:
    """The result that `compressor demo --quick` writes."""
    demo = ["compressor", "demo", "--quick", "--run-dir", str(folder)]
    done = subprocess.run(
        [sys.executable, "-m", "tests.brevity", *demo],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return result
