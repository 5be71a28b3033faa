"""Difference and reference give the model back, whatever was done to it; or an error at once."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from compressor.errors import CheckpointError, ModelError
from compressor.interfaces.inputs import ModelInputs
from compressor.structure import cutting, surgery
from compressor.structure.channels import find_groups
from compressor.structure.describe import apply_difference, diff, outline, rebuild
from compressor.structure.groups import ChannelGroup
from compressor.structure.layers import layer_members
from compressor.structure.surgery import Skip
from compressor.structure.trace import copy_model
from compressor.testing.models import (
    CifarResNet,
    TiedModel,
    TinyMLP,
    TinyResNet,
    TinyTransformer,
)


def as_json(reference: nn.Module, model: nn.Module) -> dict[str, Any]:
    text: dict[str, Any] = json.loads(json.dumps(diff(reference, model)))
    return text


def through_json(reference: nn.Module, model: nn.Module) -> nn.Module:
    """`model` as it comes back from the text of its difference, its weights loaded strictly."""
    rebuilt = rebuild(reference, as_json(reference, model))
    rebuilt.load_state_dict(model.state_dict(), strict=True)
    return rebuilt.train(model.training)


def assert_same(first: nn.Module, second: nn.Module) -> None:
    assert repr(first) == repr(second)
    flags = [(name, p.requires_grad, p.dtype) for name, p in first.named_parameters()]
    assert flags == [(name, p.requires_grad, p.dtype) for name, p in second.named_parameters()]
    for (name, a), b in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def narrow(model: nn.Module, *members: tuple[str, str, int]) -> None:
    size = members[0][2]
    index = [(i,) for i in range(size)]
    made = tuple(
        member
        for module, side, _ in members
        for member in layer_members(module, surgery.get(model, module), side, index)  # type: ignore[arg-type]
    )
    cutting.keep_channels(model, ChannelGroup("g", size, made), range(0, size, 2))


def narrow_block(model: nn.Module) -> None:
    block = "layer1.0"
    narrow(model, *((f"{block}.{name}", side, 16) for name, side in INNER))


INNER = [("conv1", "out"), ("bn1", "out"), ("conv2", "in")]

EDITS: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], object]]] = {
    "nothing": (TinyMLP, lambda m: None),
    "conv and batch norm": (TinyResNet, narrow_block),
    "a lambda in every block": (lambda: CifarResNet(14), narrow_block),
    "a block is skipped": (
        lambda: CifarResNet(14),
        lambda m: surgery.replace(m, "layer2.1", Skip()),
    ),
    "linear": (TinyMLP, lambda m: narrow(m, ("fc1", "out", 32), ("fc2", "in", 32))),
    "layer norm": (TinyTransformer, lambda m: narrow(m, ("norm", "out", 16), ("head", "in", 16))),
    "a parametrized weight": (
        TinyResNet,
        lambda m: parametrize.register_parametrization(m.conv1, "weight", nn.Identity()),
    ),
    "a layer becomes two": (
        TinyMLP,
        lambda m: surgery.replace(
            m, "fc2", nn.Sequential(nn.Linear(32, 4, bias=False), nn.Linear(4, 32))
        ),
    ),
    "a bias is dropped": (TinyMLP, lambda m: surgery.set_tensor(m, "fc1.bias", None)),
    "a module is removed": (TinyMLP, lambda m: surgery.remove(m, "fc3")),
    "a layer is frozen": (TinyMLP, lambda m: m.fc1.requires_grad_(False)),
    "half precision": (TinyMLP, lambda m: m.half()),
    "a batch norm forgets": (
        TinyResNet,
        lambda m: surgery.replace(m, "bn1", nn.BatchNorm2d(16, track_running_stats=False)),
    ),
    "a tied table is cut": (
        TiedModel,
        lambda m: surgery.slice_parameter(m, "head.weight", 0, range(8)),
    ),
    "a tie is cut": (
        TiedModel,
        lambda m: surgery.set_tensor(m, "head.weight", nn.Parameter(torch.zeros(32, 16))),
    ),
    "a tie is made": (
        TinyMLP,
        lambda m: surgery.set_tensor(m, "fc2.bias", m.fc1.bias),
    ),
    "half of a tie is frozen": (TiedModel, lambda m: freeze_a_copy(m)),
    "all at once": (TinyMLP, lambda m: change_all(m)),
}


def freeze_a_copy(model: nn.Module) -> None:
    surgery.set_tensor(model, "head.weight", nn.Parameter(torch.zeros(32, 16), False))


def change_all(model: nn.Module) -> None:
    narrow(model, ("fc1", "out", 32), ("fc2", "in", 32))
    pair = nn.Sequential(nn.Linear(16, 4, bias=False), nn.Linear(4, 32))
    surgery.replace(model, "fc2", pair)
    surgery.remove(model, "fc3")
    model.fc1.bias.requires_grad_(False)


@pytest.mark.parametrize(("make", "edit"), EDITS.values(), ids=EDITS)
def test_difference_and_weights_give_the_model_back(
    make: Callable[[], nn.Module], edit: Callable[[nn.Module], object]
) -> None:
    reference = make()
    model = copy_model(reference)
    edit(model)
    assert_same(through_json(make(), model), model)


def test_a_rebuilt_model_computes_the_same() -> None:
    reference, x = CifarResNet(14).eval(), torch.randn(2, 3, 32, 32)
    model = copy_model(reference)
    narrow_block(model)
    surgery.replace(model, "layer3.1", Skip())
    assert torch.equal(through_json(reference, model)(x), model(x))


def test_only_what_differs_is_described() -> None:
    reference = TinyMLP()
    model = copy_model(reference)
    narrow(model, ("fc1", "out", 32), ("fc2", "in", 32))
    described = diff(reference, model)
    assert described["changed"]["fc2"] == {
        "attributes": {"in_features": 16},
        "parameters": {
            "weight": {"shape": [32, 16], "dtype": "float32", "requires_grad": True},
        },
    }
    assert set(described["changed"]) == {"fc1", "fc2"}
    assert described["replaced"] == {}


def test_rebuilding_leaves_the_reference_alone() -> None:
    reference = CifarResNet(14)
    model = copy_model(reference)
    narrow_block(model)
    before = repr(reference)
    rebuilt = rebuild(reference, diff(reference, model))
    assert repr(reference) == before
    assert not {id(p) for p in rebuilt.parameters()} & {id(p) for p in reference.parameters()}


def test_weights_that_nobody_loaded_show() -> None:
    reference = TinyMLP()
    model = copy_model(reference)
    narrow(model, ("fc1", "out", 32), ("fc2", "in", 32))
    rebuilt = rebuild(reference, diff(reference, model))
    assert rebuilt(torch.randn(1, 64)).isnan().all()


def test_tied_parameters_come_back_tied_at_their_new_size() -> None:
    reference = TiedModel()
    model = copy_model(reference)
    surgery.slice_parameter(model, "head.weight", 0, range(8))
    rebuilt = through_json(reference, model)
    assert rebuilt.head.weight is rebuilt.embedding.weight
    assert rebuilt.head.weight.shape == (8, 16)


def test_parameters_that_were_untied_come_back_untied() -> None:
    """Else the second one loaded would overwrite the first, and no shape would tell."""
    reference = TiedModel()
    model = copy_model(reference)
    surgery.set_tensor(model, "head.weight", nn.Parameter(torch.zeros(32, 16)))
    assert_same(through_json(reference, model), model)


def test_a_shared_module_that_was_replaced_stays_shared() -> None:
    shared = nn.Linear(2, 2)
    reference = nn.Sequential(shared, nn.ReLU(), shared)
    model = copy_model(reference)
    surgery.replace(model, "0", nn.Linear(2, 2, bias=False))
    rebuilt = through_json(reference, model)
    assert rebuilt[0] is rebuilt[2]
    assert rebuilt[0].bias is None


def test_a_shared_module_that_was_split_is_refused() -> None:
    shared = nn.Linear(2, 2)
    reference = nn.Sequential(shared, nn.ReLU(), shared)
    model = copy_model(reference)
    model[2] = nn.Linear(2, 2)
    with pytest.raises(ModelError, match="same module"):
        diff(reference, model)


class Foreign(nn.Module):
    """Of a package that no file may name."""


def test_a_class_of_another_package_is_refused() -> None:
    reference = TinyMLP()
    model = copy_model(reference)
    surgery.replace(model, "fc2", Foreign())
    with pytest.raises(ModelError, match=r"'fc2' is a .*Foreign"):
        diff(reference, model)


def test_a_new_module_beside_the_old_ones_is_refused() -> None:
    reference = TinyMLP()
    model = copy_model(reference)
    model.fc4 = nn.Linear(2, 2)
    with pytest.raises(ModelError, match="'fc4'"):
        diff(reference, model)


def test_an_attribute_that_is_no_data_is_refused() -> None:
    reference = TinyMLP()
    model = copy_model(reference)
    new = nn.Linear(32, 32)
    new.table = {1: 2}
    surgery.replace(model, "fc2", nn.Sequential(new))
    with pytest.raises(ModelError, match=r"'fc2\.0\.table'.*dict"):
        diff(reference, model)


def test_a_patched_forward_is_refused() -> None:
    reference = TinyMLP()
    model = copy_model(reference)
    model.fc2.forward = lambda x: x
    with pytest.raises(ModelError, match=r"'fc2\.forward'"):
        diff(reference, model)


BUFFERS = {
    "float": torch.tensor([1.5, float("nan"), -0.0, float("inf")]),
    "bfloat16": torch.randn(3, 2, generator=torch.Generator().manual_seed(0)).bfloat16(),
    "transposed": torch.arange(6).reshape(2, 3).T,
    "bool": torch.tensor([True, False]),
    "complex": torch.tensor([1 + 2j]),
    "number": torch.tensor(3),
    "empty": torch.zeros(0, 4),
}


@pytest.mark.parametrize("values", BUFFERS.values(), ids=BUFFERS)
def test_a_buffer_that_no_state_dict_holds_comes_back_by_the_bit(values: torch.Tensor) -> None:
    reference = TinyMLP()
    reference.register_buffer("table", torch.zeros(9), persistent=False)
    model = copy_model(reference)
    model.table = values
    rebuilt = through_json(reference, model)
    assert rebuilt.table.dtype == values.dtype
    assert rebuilt.table.shape == values.shape
    actual, expected = (t.contiguous().flatten().view(torch.uint8) for t in (rebuilt.table, values))
    assert torch.equal(actual, expected)
    assert "table" not in rebuilt.state_dict()


def test_a_new_module_keeps_a_buffer_that_no_state_dict_holds() -> None:
    reference, model = TinyMLP(), TinyMLP()
    new = nn.Linear(model.fc2.in_features, model.fc2.out_features)
    layer = nn.Sequential(nn.Identity(), new)
    layer.register_buffer("table", torch.randn(4), persistent=False)
    surgery.replace(model, "fc2", layer)
    rebuilt = through_json(reference, model)
    assert torch.equal(rebuilt.fc2.table, layer.table)
    assert rebuilt.state_dict().keys() == model.state_dict().keys()


class Keyless(nn.Module):
    """As timm's BEiT, whose keys have no bias: the zeros are a buffer beside two parameters."""

    def __init__(self, size: int = 6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(size, 4))
        self.bias = nn.Parameter(torch.randn(size))
        self.register_buffer("offset", torch.randn(size), persistent=False)
        self.head = nn.Linear(size, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = nn.functional.linear(x, self.weight, self.bias + self.offset)
        return self.head(hidden.relu())


def test_a_pruned_buffer_that_no_state_dict_holds_comes_back_pruned() -> None:
    model = Keyless()
    x = torch.randn(3, 4)
    pruned = copy_model(model)
    (group,) = find_groups(pruned, ModelInputs((x,))).groups
    assert "offset" in {member.tensor for member in group.members}
    cutting.keep_channels(pruned, group, [0, 2, 5])
    rebuilt = through_json(Keyless(), pruned)  # whose own offset has other values
    assert torch.equal(rebuilt.offset, model.offset[[0, 2, 5]])
    assert torch.equal(rebuilt(x), pruned(x))


def test_damaged_values_of_a_buffer_are_refused() -> None:
    reference = TinyMLP()
    reference.register_buffer("table", torch.zeros(4), persistent=False)
    model = copy_model(reference)
    model.table = torch.zeros(2)
    difference = as_json(reference, model)
    spec = difference["changed"][""]["buffers"]["table"]
    for broken in ("AAAA", "?", spec["values"][:-4]):
        spec["values"] = broken
        with pytest.raises(CheckpointError, match="does not fit"):
            rebuild(reference, difference)


@pytest.mark.parametrize("name", ["os:system", "torch.nn:missing", "torch.hub:load", "torch.nnx:X"])
def test_a_class_that_is_no_layer_is_not_loaded(name: str) -> None:
    reference = TinyMLP()
    record = {"class": name, "attributes": {}, "parameters": {}, "buffers": {}, "children": {}}
    difference = {**diff(reference, reference), "replaced": {"fc2": record}}
    with pytest.raises(CheckpointError, match="no layer of torch"):
        rebuild(reference, difference)


def test_a_difference_of_another_model_is_refused() -> None:
    reference = CifarResNet(14)
    model = copy_model(reference)
    surgery.replace(model, "layer2.1", Skip())
    with pytest.raises(CheckpointError, match="does not fit a TinyMLP"):
        rebuild(TinyMLP(), diff(reference, model))


def test_a_difference_of_another_format_is_refused() -> None:
    with pytest.raises(CheckpointError, match="format 99"):
        rebuild(TinyMLP(), {"format": 99})


def names_of(model: nn.Module) -> dict[str, nn.Parameter]:
    return dict(model.named_parameters(remove_duplicate=False))


@pytest.mark.parametrize(("make", "edit"), EDITS.values(), ids=EDITS)
def test_a_difference_is_applied_in_place_and_its_edit_is_true(
    make: Callable[[], nn.Module], edit: Callable[[nn.Module], object]
) -> None:
    """As a trainer does that resumes: the outline is of before, the model is built anew."""
    model = make()
    before = outline(model)
    edit(model)
    resumed = make()
    old = names_of(resumed)
    described = apply_difference(resumed, as_json(before, model))
    new = names_of(resumed)
    assert described.added == {name for name in new if new[name] is not old.get(name)}
    assert described.removed == {name for name in old if old[name] is not new.get(name)}
    assert not described.sliced
    resumed.load_state_dict(model.state_dict(), strict=True)
    assert_same(resumed, model)
    assert diff(resumed, model) == diff(model, model)  # the ties too


@pytest.mark.parametrize(("make", "edit"), EDITS.values(), ids=EDITS)
def test_an_error_midway_leaves_the_model_as_it_was(
    make: Callable[[], nn.Module], edit: Callable[[nn.Module], object]
) -> None:
    reference = make()
    model = copy_model(reference)
    edit(model)
    broken = diff(reference, model)
    broken["tied"] = [*broken["tied"], ["nowhere.weight", "fc1.weight"]]  # comes last
    values = [(module, dict(vars(module))) for module in reference.modules()]
    tensors, text = names_of(reference), repr(reference)
    flags = [parameter.requires_grad for parameter in reference.parameters()]
    with pytest.raises(CheckpointError, match="does not fit"):
        apply_difference(reference, broken)
    assert repr(reference) == text
    assert names_of(reference).keys() == tensors.keys()
    assert all(names_of(reference)[name] is tensor for name, tensor in tensors.items())
    assert [parameter.requires_grad for parameter in reference.parameters()] == flags
    for module, attributes in values:
        assert vars(module).keys() == attributes.keys()
        assert all(vars(module)[key] is value for key, value in attributes.items())


def test_the_root_is_replaced_in_a_copy_only() -> None:
    reference, model = nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 1), nn.Linear(1, 2))
    assert_same(through_json(reference, model), model)
    with pytest.raises(CheckpointError, match=r"whole Linear by a .*Sequential.*`rebuild`"):
        apply_difference(reference, diff(reference, model))


def test_a_parameter_that_is_only_frozen_stays_the_same_object() -> None:
    model = TiedModel()
    before = outline(model)
    model.head.weight.requires_grad_(False)
    resumed = TiedModel()
    weight = resumed.head.weight
    edit = apply_difference(resumed, as_json(before, model))
    assert resumed.embedding.weight is resumed.head.weight is weight
    assert not weight.requires_grad
    assert not edit.added | edit.removed


def test_a_module_that_hangs_twice_in_a_new_one_comes_back_once() -> None:
    """Its second place used to be lost, without an error when it has no parameters."""
    reference = TinyMLP()
    model = copy_model(reference)
    act, layer = nn.Tanh(), nn.Linear(32, 32)
    new = nn.Sequential(layer, act, layer, act)
    new.register_module("4", None)
    surgery.replace(model, "fc2", new)
    rebuilt = through_json(reference, model)
    assert rebuilt.fc2[0] is rebuilt.fc2[2]
    assert rebuilt.fc2[1] is rebuilt.fc2[3]
    assert rebuilt.fc2[4] is None
    assert names_of(rebuilt).keys() == names_of(model).keys()


def test_a_module_that_hangs_in_two_new_ones_is_refused() -> None:
    reference = TinyMLP(32)
    model = copy_model(reference)
    shared = nn.Linear(32, 32)
    surgery.replace(model, "fc1", nn.Sequential(shared))
    surgery.replace(model, "fc2", nn.Sequential(shared))
    with pytest.raises(ModelError, match=r"'fc2\.0' is a module of the new 'fc1' as well"):
        diff(reference, model)
