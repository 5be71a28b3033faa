"""Modules whose code fixes widths get programs, and are pruned, trained, exported and reloaded."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compressor.export.onnx import export_onnx
from compressor.interfaces.inputs import ModelInputs
from compressor.structure import archive
from compressor.structure.channels import find_groups
from compressor.structure.cutting import keep_many
from compressor.structure.groups import ChannelGroup, ChannelMap
from compressor.structure.programs.programmed import is_programmed
from compressor.testing.models import CifarResNet
from tests.structure.labels.nets import Net, assert_prunes_exactly, named, randomized, rows, sizes
from tests.structure.programs import Gated, LeNet


def halves(found: ChannelMap) -> list[tuple[ChannelGroup, Sequence[int]]]:
    """Every second channel of each group."""
    return [(group, range(0, group.size, 2)) for group in found.groups]


def programmed(model: nn.Module) -> list[str]:
    """Names of the modules that run programs."""
    return [name for name, module in model.named_modules() if is_programmed(module)]


def test_a_number_in_a_view_falls_with_the_channels() -> None:
    torch.manual_seed(0)
    model, inputs = LeNet(), rows(2, 1, 32, 32)
    found = find_groups(model, inputs)
    assert sizes(found) == {"conv1": 6, "conv2": 16, "fc1": 20}
    assert found.quarantined == ()
    [count] = named(found, "conv2").counts
    assert (count.module, count.amounts) == ("", (25,) * 16)  # 5×5 entries a channel
    assert_prunes_exactly(model, inputs, found)
    keep_many(model, halves(found))
    assert programmed(model) == [""]
    assert isinstance(model, LeNet)
    assert model.fc1.in_features == 8 * 25


def test_zeros_for_channels_are_channels() -> None:
    """The parameter-free shortcut: the stage before and its padding are pruned apart."""
    torch.manual_seed(0)
    model, inputs = CifarResNet(20), rows(2, 3, 32, 32)
    found = find_groups(model, inputs)
    inner = {f"layer{k}.{b}.conv1": 16 << (k - 1) for k in (1, 2, 3) for b in range(3)}
    added = {"layer2.0.conv2": 16, "layer3.0.conv2": 32}  # what the streams have more than before
    assert sizes(found) == inner | {"conv1": 16} | added
    assert found.quarantined == ()
    assert_prunes_exactly(model, inputs, found)
    keep_many(model, halves(found))
    assert programmed(model) == ["layer2.0.shortcut", "layer3.0.shortcut"]


def test_a_split_by_a_number_falls_with_the_channels() -> None:
    model, inputs = Gated(), rows(2, 5, 8)
    found = find_groups(model, inputs)
    assert sizes(found) == {"up": 12}
    assert_prunes_exactly(model, inputs, found)


def test_a_program_says_that_it_is_given_fewer_channels() -> None:
    """Where only what it is given falls, and none of its own integers but their sum."""

    def call(_: Any, x: Tensor) -> Tensor:
        return torch.cat([x[:, 2:] * 2, x[:, :2]], 1)

    model, inputs = nn.Sequential(nn.Linear(4, 8), Net(call), nn.Linear(8, 3)), rows(2, 4)
    found = find_groups(model, inputs)
    assert sizes(found) == {"0": 8}
    assert_prunes_exactly(model, inputs, found)


def test_no_program_is_made_where_none_is_needed() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(4 * 9, 2))
    found = find_groups(model, rows(2, 1, 5, 5))
    assert [group.prepared for group in found.groups] == [()]


def test_code_that_cannot_be_a_program_leaves_its_reason() -> None:
    """What is drawn by chance cannot be compared with the code that it came from."""

    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x).view(-1, 6)
            out: Tensor = self.b(F.relu(x))
            return out

    model = Noisy()
    model.register_forward_hook(lambda *_: None)
    [(name, reason)] = find_groups(model, rows(2, 4)).quarantined
    assert name == "a"
    assert "the model does not run" in reason
    assert "it has hooks" in reason


@pytest.mark.slow
@pytest.mark.parametrize("depth", [None, 8])
def test_a_pruned_model_trains_as_the_masked_one(depth: int | None) -> None:
    """Gradients of what is kept are those of the original with zeros for what is not."""
    model, inputs = _example(depth)
    found = find_groups(model, inputs)
    randomized(model)
    masked, pruned = copy.deepcopy(model), copy.deepcopy(model)
    cuts = halves(found)
    left = {name: [list(range(n)) for n in p.shape] for name, p in model.named_parameters()}
    for group, kept in cuts:
        for member in group.members:
            gone = {e for c in group.pruned(kept) for e in member.index[c]}
            tensor = masked.state_dict()[member.tensor]
            for entry in gone:
                tensor.select(member.dim, entry).zero_()
            if member.tensor in left:
                own = left[member.tensor]
                own[member.dim] = [e for e in own[member.dim] if e not in gone]
    keep_many(pruned, cuts)
    target = torch.tensor([0, 1])
    for net in (masked, pruned):
        F.cross_entropy(inputs.double().call(net), target).backward()
    whole = dict(masked.named_parameters())
    for name, parameter in pruned.named_parameters():
        expected = whole[name].grad
        assert expected is not None
        for dim, entries in enumerate(left[name]):
            expected = expected.index_select(dim, torch.tensor(entries))
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("depth", [None, 8])
def test_the_loss_of_a_pruned_model_falls(depth: int | None) -> None:
    model, inputs = _example(depth)
    keep_many(model, halves(find_groups(model, inputs)))
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for _ in range(12):
        loss = F.cross_entropy(inputs.call(model), torch.tensor([0, 1]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


@pytest.mark.slow
@pytest.mark.parametrize("depth", [None, 8])
def test_a_pruned_model_is_exported_and_reloaded(depth: int | None, tmp_path: Any) -> None:
    reference, inputs = _example(depth)
    model = copy.deepcopy(reference).eval()
    keep_many(model, halves(find_groups(model, inputs)))
    archive.save(model, tmp_path, reference=reference)
    loaded = archive.load(tmp_path, reference).eval()
    more = inputs.with_batch(3)
    with torch.no_grad():
        expected = more.call(model)
        assert torch.equal(more.call(loaded), expected)
    path = export_onnx(model, inputs, tmp_path / "model.onnx")
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    [name] = [given.name for given in session.get_inputs()]
    [output] = session.run(None, {name: more.args[0].numpy()})
    torch.testing.assert_close(torch.from_numpy(output), expected, rtol=1e-4, atol=1e-4)


def _example(depth: int | None) -> tuple[nn.Module, ModelInputs]:
    """LeNet, whose own `forward` is rewritten, or a CIFAR ResNet, of which the shortcuts are."""
    torch.manual_seed(0)
    if depth is None:
        return LeNet(), rows(2, 1, 32, 32)
    return CifarResNet(depth), rows(2, 3, 16, 16)
