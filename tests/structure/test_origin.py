"""Models know what they were cut from: they are saved without it, and loaded on a new one."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import compressor
from compressor.errors import ModelError
from compressor.structure import archive
from compressor.structure.record import ORIGIN
from compressor.structure.surgery import Skip, replace
from compressor.testing.models import TinyMLP, TinyResNet

ROWS = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def make_net() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return TinyResNet().eval()


@pytest.fixture(scope="module")
def pruned() -> nn.Module:
    return compressor.prune(make_net(), ROWS, kept_fraction=0.5).model


def saved_and_loaded(model: nn.Module, folder: Path) -> nn.Module:
    compressor.save(model, folder)
    return compressor.load(folder, make_net())


def test_a_pruned_model_is_saved_without_its_reference(pruned: nn.Module, tmp_path: Path) -> None:
    loaded = saved_and_loaded(pruned, tmp_path / "small")
    assert type(loaded) is TinyResNet
    assert torch.equal(loaded(ROWS), pruned(ROWS))
    compressor.save(pruned, tmp_path / "given", reference=make_net())
    for name in ("structure.json", "model.safetensors"):
        given, noted = tmp_path / "given" / name, tmp_path / "small" / name
        assert given.read_bytes() == noted.read_bytes()


def test_a_copy_that_was_trained_is_saved_too(pruned: nn.Module, tmp_path: Path) -> None:
    model = copy.deepcopy(pruned).train()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model(ROWS).square().mean().backward()
    optimizer.step()
    model.eval()
    assert not torch.equal(model(ROWS), pruned(ROWS))
    assert torch.equal(saved_and_loaded(model, tmp_path)(ROWS), model(ROWS))


def test_a_loaded_model_is_saved_again(pruned: nn.Module, tmp_path: Path) -> None:
    loaded = saved_and_loaded(pruned, tmp_path / "first")
    again = saved_and_loaded(loaded, tmp_path / "second")
    assert torch.equal(again(ROWS), pruned(ROWS))


def make_rows_net() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))


def test_what_was_cut_twice_is_of_the_first_reference(tmp_path: Path) -> None:
    x = torch.randn(2, 8)
    once = compressor.prune(make_rows_net(), x, kept_fraction=0.5).model
    twice = compressor.prune(once, x, kept_fraction=0.5).model
    compressor.save(twice, tmp_path)
    assert compressor.load(tmp_path, make_rows_net())[0].out_features == 4
    assert torch.equal(compressor.load(tmp_path, make_rows_net())(x), twice(x))


def test_an_edit_of_ones_own_after_pruning_is_saved(pruned: nn.Module, tmp_path: Path) -> None:
    model = copy.deepcopy(pruned)
    replace(model, "layer2.1.bn2", nn.Identity())
    loaded = saved_and_loaded(model, tmp_path)
    assert torch.equal(loaded(ROWS), model(ROWS))
    assert not torch.equal(loaded(ROWS), pruned(ROWS))


def test_a_model_that_nobody_compressed_says_to_give_the_reference(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"TinyMLP does not say what it .* Give reference="):
        compressor.save(TinyMLP(), tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_the_note_holds_no_values_and_is_in_no_state_dict(pruned: nn.Module) -> None:
    origin = vars(pruned)[ORIGIN]
    assert all(parameter.is_meta for parameter in origin.outline.parameters())
    assert not any(ORIGIN in name for name in pruned.state_dict())
    assert dict(pruned.named_modules()).keys() <= dict(origin.outline.named_modules()).keys()


def test_a_note_does_not_follow_changes_of_the_reference(tmp_path: Path) -> None:
    net, x = make_rows_net(), torch.randn(2, 8)
    small = compressor.prune(net, x, kept_fraction=0.5).model
    replace(net, "1", Skip())
    compressor.save(small, tmp_path)
    assert torch.equal(compressor.load(tmp_path, make_rows_net())(x), small(x))


def test_a_whole_model_is_pickled_with_its_note(tmp_path: Path) -> None:
    net = make_rows_net()
    small = compressor.prune(net, torch.randn(2, 8), kept_fraction=0.5).model
    content = io.BytesIO()
    torch.save(small, content)
    unpickled = torch.load(io.BytesIO(content.getvalue()), weights_only=False)
    for model in (unpickled, pickle.loads(pickle.dumps(small))):
        compressor.save(model, tmp_path)
        assert torch.equal(compressor.load(tmp_path, net)[0].weight, small[0].weight)


@pytest.mark.slow
def test_torchs_own_ways_of_tracing_pass_the_note_over(pruned: nn.Module) -> None:
    exported = torch.export.export(pruned, (ROWS,)).module()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*torch.jit.trace", Warning)
        traced = torch.jit.trace(pruned, (ROWS,))
    for module in (exported, traced):
        torch.testing.assert_close(module(ROWS), pruned(ROWS))


def test_bytes_are_made_without_the_reference_too(pruned: nn.Module) -> None:
    there = archive.from_bytes(archive.to_bytes(pruned), make_net())
    assert torch.equal(there(ROWS), pruned(ROWS))
