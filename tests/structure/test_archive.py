"""What is saved comes back bit-equal; what is damaged is refused with what is wrong."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

import compressor.structure.archive as archive
from compressor.errors import CheckpointError, ModelError
from compressor.interfaces.inputs import ModelInputs
from compressor.structure import cutting, surgery
from compressor.structure.archive import load, packed_size_bytes, save
from compressor.structure.channels import find_groups
from compressor.structure.surgery import Skip
from compressor.structure.trace import copy_model
from compressor.testing.models import CifarResNet, TiedModel, TinyMLP


def compressed(reference: nn.Module) -> nn.Module:
    model = copy_model(reference)
    surgery.replace(model, "layer3.1", Skip())
    surgery.slice_parameter(model, "linear.weight", 0, range(5))
    surgery.slice_parameter(model, "linear.bias", 0, range(5))
    model.linear.out_features = 5
    return model.eval()


def test_a_saved_model_comes_back_on_an_untrained_reference(tmp_path: Path) -> None:
    model, x = compressed(CifarResNet(14)), torch.randn(2, 3, 32, 32)
    save(model, tmp_path / "new" / "folder", reference=CifarResNet(14))
    loaded = load(tmp_path / "new" / "folder", CifarResNet(14))
    assert torch.equal(loaded(x), model(x))
    assert type(loaded) is CifarResNet
    assert loaded.linear.out_features == 5


def test_the_files_travel_as_bytes(tmp_path: Path) -> None:
    model, x = compressed(CifarResNet(14)), torch.randn(2, 3, 32, 32)
    files = archive.to_bytes(model, reference=CifarResNet(14))
    save(model, tmp_path, reference=CifarResNet(14))
    assert files == {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    there = archive.from_bytes({**files, "plan.json": b"{}"}, CifarResNet(14))
    assert torch.equal(there(x), model(x))
    with pytest.raises(CheckpointError, match=r"structure\.json is missing"):
        archive.from_bytes({"model.safetensors": b""}, CifarResNet(14))


def test_the_folder_holds_two_files_and_no_pickle(tmp_path: Path) -> None:
    save(TinyMLP(), tmp_path, reference=TinyMLP())
    assert sorted(os.listdir(tmp_path)) == ["model.safetensors", "structure.json"]
    assert json.loads((tmp_path / "structure.json").read_text())["format"] == 1


def test_tied_weights_are_stored_once_and_come_back_tied(tmp_path: Path) -> None:
    model = TiedModel().eval()
    save(model, tmp_path, reference=TiedModel())
    loaded = load(tmp_path, TiedModel())
    assert loaded.head.weight is loaded.embedding.weight
    assert torch.equal(loaded.head.weight, model.head.weight)
    stored = (tmp_path / "model.safetensors").stat().st_size
    assert stored < 4 * sum(p.numel() for p in model.parameters()) + 1000


def test_saving_again_replaces_the_first(tmp_path: Path) -> None:
    save(TinyMLP(), tmp_path, reference=TinyMLP())
    model = TinyMLP()
    save(model, tmp_path, reference=TinyMLP())
    assert torch.equal(load(tmp_path, TinyMLP()).fc1.weight, model.fc1.weight)


class Versioned(nn.Linear):
    """As torchvision's MNASNet: weights without a version are taken for those of its first one."""

    _version = 2

    def _load_from_state_dict(
        self, state: dict[str, Any], prefix: str, metadata: dict[str, Any], *rest: Any
    ) -> None:
        if metadata.get("version") != 2:
            raise ValueError("the weights are of another version")
        super()._load_from_state_dict(state, prefix, metadata, *rest)


def test_a_module_that_asks_for_its_version_is_told(tmp_path: Path) -> None:
    model = nn.Sequential(Versioned(2, 3), nn.ReLU())
    save(model, tmp_path, reference=model)
    loaded = load(tmp_path, nn.Sequential(Versioned(2, 3), nn.ReLU()))
    assert torch.equal(loaded[0].weight, model[0].weight)


@pytest.mark.parametrize("name", ["structure.json", "model.safetensors"])
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    save(TinyMLP(), tmp_path, reference=TinyMLP())
    (tmp_path / name).unlink()
    with pytest.raises(CheckpointError, match=f"{name} is missing"):
        load(tmp_path, TinyMLP())


@pytest.mark.parametrize("name", ["structure.json", "model.safetensors"])
def test_a_truncated_file_is_named(tmp_path: Path, name: str) -> None:
    save(TinyMLP(), tmp_path, reference=TinyMLP())
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match=rf"{name} is truncated or altered"):
        load(tmp_path, TinyMLP())


def test_one_flipped_bit_is_found(tmp_path: Path) -> None:
    save(TinyMLP(), tmp_path, reference=TinyMLP())
    content = bytearray((tmp_path / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match="checksum"):
        load(tmp_path, TinyMLP())


@pytest.mark.parametrize("text", ["[]", "{}", "3", '{"format": 99}'])
def test_another_json_is_refused(tmp_path: Path, text: str) -> None:
    save(TinyMLP(), tmp_path, reference=TinyMLP())
    (tmp_path / "structure.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"structure\.json"):
        load(tmp_path, TinyMLP())


@pytest.mark.parametrize("other", [CifarResNet(8), TinyMLP(hidden=16)])
def test_another_reference_is_refused(tmp_path: Path, other: nn.Module) -> None:
    save(TinyMLP(), tmp_path, reference=TinyMLP())
    with pytest.raises(CheckpointError, match="was compressed from TinyMLP"):
        load(tmp_path, other)


def test_a_full_disk_leaves_the_old_files_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = TinyMLP()
    save(model, tmp_path, reference=TinyMLP())

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(archive.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save(TinyMLP(), tmp_path, reference=TinyMLP())
    assert sorted(os.listdir(tmp_path)) == ["model.safetensors", "structure.json"]
    assert torch.equal(load(tmp_path, TinyMLP()).fc1.weight, model.fc1.weight)


def test_files_are_as_readable_as_the_user_wants(tmp_path: Path) -> None:
    save(TinyMLP(), tmp_path, reference=TinyMLP())
    (tmp_path / "plain").touch()
    mode = stat.S_IMODE((tmp_path / "plain").stat().st_mode)
    assert stat.S_IMODE((tmp_path / "model.safetensors").stat().st_mode) == mode


def test_state_that_is_no_tensor_is_refused(tmp_path: Path) -> None:
    class Stateful(TinyMLP):
        def get_extra_state(self) -> dict[str, int]:
            return {"step": 3}

        def set_extra_state(self, state: dict[str, int]) -> None:
            pass

    with pytest.raises(CheckpointError, match="_extra_state"):
        save(Stateful(), tmp_path, reference=Stateful())


def sparse(model: nn.Module, fraction: float = 0.9) -> nn.Module:
    """With this fraction of every matrix at 0."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                flat = parameter.view(-1)
                flat[: round(fraction * len(flat))] = 0
    return model.eval()


def test_a_model_without_zeros_is_stored_as_it_always_was(tmp_path: Path) -> None:
    model = TinyMLP()
    save(model, tmp_path, reference=TinyMLP())
    content = (tmp_path / "model.safetensors").read_bytes()
    assert content == safetensors.torch.save(dict(model.state_dict()))
    assert json.loads((tmp_path / "structure.json").read_text())["format"] == 1


def test_zeros_make_the_file_smaller_and_come_back(tmp_path: Path) -> None:
    model, x = sparse(CifarResNet(14)), torch.randn(2, 3, 32, 32)
    save(model, tmp_path, reference=CifarResNet(14))
    stored = (tmp_path / "model.safetensors").stat().st_size
    entries = sum(p.numel() for p in model.parameters() if p.dim() > 1)
    dense = len(safetensors.torch.save(dict(model.state_dict())))
    # A bit an entry and the tenth of them, instead of all.
    assert stored == pytest.approx(dense - entries * (4 - 0.4 - 1 / 8), rel=0.02)
    assert packed_size_bytes(model) == stored
    loaded = load(tmp_path, CifarResNet(14))
    assert torch.equal(loaded(x), model(x))
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert json.loads((tmp_path / "structure.json").read_text())["format"] == 2


def test_tied_sparse_weights_are_packed_once(tmp_path: Path) -> None:
    model = sparse(TiedModel())
    save(model, tmp_path, reference=TiedModel())
    loaded = load(tmp_path, TiedModel())
    assert loaded.head.weight is loaded.embedding.weight
    assert torch.equal(loaded.head.weight, model.head.weight)


def test_a_file_of_an_older_version_is_read(tmp_path: Path) -> None:
    """Format 1 has zeros in full."""
    model = sparse(TinyMLP())
    save(model, tmp_path, reference=TinyMLP())
    dense = safetensors.torch.save(dict(model.state_dict()))
    structure = json.loads((tmp_path / "structure.json").read_text())
    structure |= {"format": 1, "weights_sha256": hashlib.sha256(dense).hexdigest()}
    (tmp_path / "model.safetensors").write_bytes(dense)
    (tmp_path / "structure.json").write_text(json.dumps(structure))
    assert torch.equal(load(tmp_path, TinyMLP()).fc1.weight, model.fc1.weight)


@pytest.mark.slow
def test_a_cifar_resnet_survives_pruning_and_saving(tmp_path: Path) -> None:
    torch.manual_seed(0)
    reference = CifarResNet(20)
    model, x = copy_model(reference.eval()), torch.randn(2, 3, 32, 32)
    found = find_groups(model, ModelInputs((x,)))
    assert len(found.groups) >= 9  # one in each block at least
    cutting.keep_many(model, [(group, range(group.size // 2)) for group in found.groups])
    save(model, tmp_path, reference=reference)
    assert torch.equal(load(tmp_path, CifarResNet(20))(x), model(x))


def test_a_class_is_no_reference(tmp_path: Path) -> None:
    save(TinyMLP(), tmp_path, reference=TinyMLP())
    with pytest.raises(ModelError, match=r"`reference` is the class TinyMLP .*=TinyMLP\(\.\.\.\)"):
        load(tmp_path, TinyMLP)  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="`model` is the class TinyMLP"):
        save(TinyMLP, tmp_path)  # type: ignore[arg-type]


def test_the_folder_of_a_run_says_where_its_model_is(tmp_path: Path) -> None:
    model = tmp_path / "exports" / "model"
    save(TinyMLP(), model, reference=TinyMLP())
    with pytest.raises(CheckpointError, match="its model is in") as error:
        load(tmp_path, TinyMLP())
    assert repr(str(model)) in str(error.value)
