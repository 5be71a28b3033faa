from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from compressor.errors import ExportError
from compressor.export.torchscript import save_torchscript
from compressor.interfaces.inputs import ModelInputs
from compressor.testing.models import CifarResNet, DictModel

pytestmark = pytest.mark.slow


def full_disk(*_: object) -> None:
    raise OSError(28, "No space left on device")


def load(path: Path) -> nn.Module:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r".*torch\.jit\.\w+` is deprecated")
        return torch.jit.load(str(path))


def test_a_trace_agrees_at_another_batch_size(tmp_path: Path) -> None:
    model = CifarResNet(8)
    inputs = ModelInputs((torch.randn(2, 3, 32, 32),))
    traced = load(save_torchscript(model, inputs, tmp_path / "m.pt"))
    assert model.training
    x = torch.randn(3, 3, 32, 32)
    torch.testing.assert_close(traced(x), model.eval()(x))


def test_dicts_go_in_and_come_out(tmp_path: Path) -> None:
    model = DictModel().eval()
    batch = {"image": torch.randn(3, 1, 8, 8), "scale": torch.ones(3)}
    traced = load(save_torchscript(model, ModelInputs((), {"batch": batch}), tmp_path / "m.pt"))
    torch.testing.assert_close(traced(batch), model(batch))


class Text(nn.Module):
    def forward(self, x: Tensor) -> str:
        return "no tensor"


def test_what_cannot_be_traced_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="cannot be traced to TorchScript"):
        save_torchscript(Text(), ModelInputs((torch.ones(1),)), tmp_path / "m.pt")


def test_a_full_disk_is_no_fault_of_the_model_and_leaves_no_part_of_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compressor.files.os.fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save_torchscript(nn.Linear(2, 2), ModelInputs((torch.ones(1, 2),)), tmp_path / "m.pt")
    assert not list(tmp_path.iterdir())
