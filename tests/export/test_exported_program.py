from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from compressor.errors import ExportError
from compressor.export.exported_program import load_exported_program, save_exported_program
from compressor.interfaces.inputs import ModelInputs
from compressor.testing.models import DictModel, TinyResNet

pytestmark = pytest.mark.slow


def full_disk(*_: object) -> None:
    raise OSError(28, "No space left on device")


def test_a_loaded_program_agrees_at_any_batch_size(tmp_path: Path) -> None:
    model = TinyResNet()
    path = save_exported_program(model, ModelInputs((torch.randn(1, 1, 8, 8),)), tmp_path / "m.pt2")
    assert model.training
    model.eval()
    program = load_exported_program(path)
    for count in (1, 5):
        x = torch.randn(count, 1, 8, 8)
        torch.testing.assert_close(program(x), model(x))


def test_dicts_go_in_and_come_out(tmp_path: Path) -> None:
    model = DictModel().eval()
    batch = {"image": torch.randn(3, 1, 8, 8), "scale": torch.ones(3)}
    path = save_exported_program(model, ModelInputs((batch,)), tmp_path / "m.pt2")
    torch.testing.assert_close(load_exported_program(path)(batch), model(batch))


class Images(nn.Module):
    def forward(self, images: list[Tensor]) -> Tensor:
        return torch.stack([image.mean((1, 2)) for image in images])


def test_the_channels_of_three_images_in_a_list_are_no_batch(tmp_path: Path) -> None:
    """Each has three channels: it would be traced as if their number were the batch's."""
    images = [torch.randn(3, 4, size) for size in (4, 6, 8)]
    path = save_exported_program(Images(), ModelInputs((images,)), tmp_path / "m.pt2")
    program = load_exported_program(path)
    torch.testing.assert_close(program(images), Images()(images))
    with pytest.raises(AssertionError, match="Guard failed"):
        program([image[:2] for image in images])


class FixedBatch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.view(4, -1)


def test_a_fixed_batch_size_is_an_error_with_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"without a fixed batch size"):
        save_exported_program(FixedBatch(), ModelInputs((torch.ones(4, 2),)), tmp_path / "m.pt2")


def test_a_full_disk_is_no_fault_of_the_model_and_leaves_no_part_of_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compressor.files.os.fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save_exported_program(nn.Linear(2, 2), ModelInputs((torch.ones(2, 2),)), tmp_path / "m.pt2")
    assert not list(tmp_path.iterdir())
