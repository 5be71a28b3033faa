"""Edits keep the model whole: shapes, attributes, ties, flags, and what the trainer is told."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from compressor.errors import SurgeryError
from compressor.structure import cutting, surgery
from compressor.structure.groups import ChannelGroup, Member
from compressor.structure.layers import layer_members
from compressor.structure.surgery import Edit, Skip
from compressor.testing.models import TiedModel, TinyMLP, TinyResNet


def group_of(
    model: nn.Module, name: str, size: int, *sides: tuple[str, Literal["out", "in"], int]
) -> ChannelGroup:
    """A group whose channel i is entry i, or the i-th run of entries, of each side of a layer."""
    made: tuple[Member, ...] = ()
    for module, side, total in sides:
        width = total // size
        index = [range(i * width, (i + 1) * width) for i in range(size)]
        made += layer_members(module, surgery.get(model, module), side, index)
    return ChannelGroup(name, size, made)


FC1 = group_of(TinyMLP(), "fc1", 32, ("fc1", "out", 32), ("fc2", "in", 32))


def test_kept_channels_are_the_old_weights_in_order() -> None:
    model, kept = TinyMLP(), [1, 4, 31]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    cutting.keep_channels(model, FC1, kept)
    assert torch.equal(model.fc1.weight, before["fc1.weight"][kept])
    assert torch.equal(model.fc1.bias, before["fc1.bias"][kept])
    assert torch.equal(model.fc2.weight, before["fc2.weight"][:, kept])
    assert (model.fc1.out_features, model.fc2.in_features) == (3, 3)
    assert model(torch.randn(2, 64)).shape == (2, 10)


def test_keeping_all_channels_changes_no_value() -> None:
    model, x = TinyMLP(), torch.randn(2, 64)
    before = model(x)
    cutting.keep_channels(model, FC1, range(32))
    assert torch.equal(model(x), before)


def test_the_edit_names_what_was_sliced_and_where() -> None:
    edit = cutting.keep_channels(TinyMLP(), FC1, [0, 2])
    assert edit == Edit(
        sliced={
            "fc1.weight": ((0, (0, 2)),),
            "fc1.bias": ((0, (0, 2)),),
            "fc2.weight": ((1, (0, 2)),),
        }
    )


def test_new_parameters_keep_grad_flag_and_dtype() -> None:
    model = TinyMLP().to(torch.bfloat16)
    model.fc1.weight.requires_grad_(False)
    cutting.keep_channels(model, FC1, [0, 2])
    assert model.fc1.weight.requires_grad is False
    assert model.fc1.bias.requires_grad is True
    assert model.fc2.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("kept", [[], [0, 0], [1, 0], [-1], [32]])
def test_numbers_that_are_no_channels_are_refused(kept: list[int]) -> None:
    with pytest.raises(SurgeryError, match="from 0 to 31"):
        cutting.keep_channels(TinyMLP(), FC1, kept)


def test_a_flattened_map_loses_all_its_columns() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Flatten(), nn.Linear(4 * 9, 2))
    columns = model[2].weight.clone().reshape(2, 4, 9)
    group = group_of(model, "0", 4, ("0", "out", 4), ("2", "in", 36))
    cutting.keep_channels(model, group, [1, 3])
    assert torch.equal(model[2].weight, columns[:, [1, 3]].reshape(2, 18))
    assert model(torch.randn(1, 1, 3, 3)).shape == (1, 2)


def test_norms_lose_scale_shift_and_statistics() -> None:
    norm = nn.BatchNorm2d(4)
    norm.running_mean.copy_(torch.arange(4.0))
    model = nn.Sequential(norm)
    cutting.keep_channels(model, group_of(model, "0", 4, ("0", "out", 4)), [1, 2])
    assert norm.running_mean.tolist() == [1.0, 2.0]
    assert (norm.num_features, len(norm.weight), len(norm.running_var)) == (2, 2, 2)


@pytest.mark.parametrize(
    ("layer", "side", "attribute", "expected"),
    [
        (nn.LayerNorm(4), "out", "normalized_shape", (2,)),
        (nn.GroupNorm(1, 4), "out", "num_channels", 2),
        (nn.PReLU(4), "out", "num_parameters", 2),
        (nn.Embedding(9, 4), "out", "embedding_dim", 2),
        (nn.ConvTranspose2d(4, 3, 2), "in", "in_channels", 2),
        (nn.ConvTranspose1d(3, 4, 2), "out", "out_channels", 2),
        (nn.Conv1d(3, 4, 2), "out", "out_channels", 2),
        (nn.InstanceNorm1d(4, affine=True), "out", "num_features", 2),
    ],
)
def test_each_layer_class_counts_its_channels_anew(
    layer: nn.Module, side: str, attribute: str, expected: object
) -> None:
    model = nn.Sequential(layer)
    cutting.keep_channels(model, group_of(model, "0", 4, ("0", side, 4)), [0, 3])
    assert getattr(layer, attribute) == expected


def test_a_transposed_convolution_loses_the_right_dimension() -> None:
    model = nn.Sequential(nn.ConvTranspose2d(4, 3, 2))
    cutting.keep_channels(model, group_of(model, "0", 4, ("0", "in", 4)), [0, 3])
    assert model[0].weight.shape == (2, 3, 2, 2)
    assert model(torch.randn(1, 2, 4, 4)).shape == (1, 3, 5, 5)


def test_a_depthwise_convolution_changes_its_groups() -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 3, groups=4))
    cutting.keep_channels(
        model, group_of(model, "0", 4, ("0", "out", 8), ("0", "in", 4)), [0, 1, 3]
    )
    assert (model[0].groups, model[0].in_channels, model[0].out_channels) == (3, 3, 6)
    assert model(torch.randn(1, 3, 4, 4)).shape == (1, 6, 2, 2)


def test_a_part_of_a_convolution_group_is_refused_and_nothing_changes() -> None:
    model = nn.Sequential(nn.Conv2d(8, 8, 3, groups=2))
    group = group_of(model, "0", 8, ("0", "out", 8), ("0", "in", 8))
    with pytest.raises(SurgeryError, match="works in blocks of 4"):
        cutting.keep_channels(model, group, [0, 1, 2])
    assert model[0].weight.shape == (8, 4, 3, 3)


def test_a_group_of_another_size_is_refused() -> None:
    model = TinyMLP()
    cutting.keep_channels(model, FC1, [0, 1, 2])
    with pytest.raises(SurgeryError, match="has 3 entries, not the 32"):
        cutting.keep_channels(model, FC1, [0, 1])


def test_groups_that_share_a_layer_are_cut_in_one_call() -> None:
    """A concatenation: the numbers of the second half would be wrong after the first is cut."""
    model = nn.ModuleDict({"a": nn.Linear(2, 3), "b": nn.Linear(2, 3), "c": nn.Linear(6, 1)})
    columns = model["c"].weight.clone()
    first = ChannelGroup("a", 3, (Member("c.weight", 1, "in", ((0,), (1,), (2,)), 6),))
    second = ChannelGroup("b", 3, (Member("c.weight", 1, "in", ((3,), (4,), (5,)), 6),))
    cutting.keep_many(model, [(first, [0]), (second, [1, 2])])
    assert torch.equal(model["c"].weight, columns[:, [0, 4, 5]])


def test_tied_parameters_that_are_cut_together_stay_tied() -> None:
    model = TiedModel()
    members = [("embedding", "out", 16), ("hidden", "in", 16), ("hidden", "out", 16)]
    edit = cutting.keep_channels(
        model, group_of(model, "all", 16, *members, ("head", "in", 16)), range(0, 16, 2)
    )
    assert model.head.weight is model.embedding.weight
    assert model(torch.tensor([[1, 2]])).shape == (1, 2, 32)
    assert edit.sliced["head.weight"] == edit.sliced["embedding.weight"]


def test_a_parametrized_weight_is_refused_with_the_way_out() -> None:
    model = TinyMLP()
    parametrize.register_parametrization(model.fc1, "weight", nn.Identity())
    with pytest.raises(SurgeryError, match="remove_parametrizations"):
        cutting.keep_channels(model, FC1, [0])


def test_an_attention_layer_is_refused() -> None:
    model = nn.ModuleDict({"a": nn.MultiheadAttention(4, 2)})
    with pytest.raises(SurgeryError, match="MultiheadAttention cannot be sliced"):
        cutting.keep_channels(model, group_of(model, "a", 4, ("a", "out", 4)), [0])


def test_a_shared_module_is_replaced_everywhere() -> None:
    shared, new = nn.Linear(2, 2), nn.Identity()
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared, nn.ReLU())})
    edit = surgery.replace(model, "b.0", new)
    assert model["a"] is new
    assert model["b"][0] is new
    assert edit.removed == {"a.weight", "a.bias", "b.0.weight", "b.0.bias"}


def test_a_module_may_be_replaced_by_one_that_holds_it() -> None:
    model, x = TinyMLP(), torch.randn(2, 64)
    before, old = model(x), model.fc2
    edit = surgery.replace(model, "fc2", nn.Sequential(old))
    assert torch.equal(model(x), before)
    assert edit.added == {"fc2.0.weight", "fc2.0.bias"}
    assert edit.removed == {"fc2.weight", "fc2.bias"}


def test_a_replacement_takes_the_mode_of_what_it_replaces() -> None:
    model = TinyMLP().eval()
    surgery.replace(model, "fc2", nn.Dropout())
    assert not model.fc2.training


def test_the_root_cannot_be_replaced_or_removed() -> None:
    with pytest.raises(SurgeryError, match="whole model"):
        surgery.replace(TinyMLP(), "", Skip())
    with pytest.raises(SurgeryError, match="whole model"):
        surgery.remove(TinyMLP(), "")


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(SurgeryError, match="Did you mean 'layer1'"):
        surgery.replace(TinyResNet(), "layr1", Skip())


def test_a_removed_module_is_gone() -> None:
    model = TinyMLP()
    edit = surgery.remove(model, "fc3")
    assert not hasattr(model, "fc3")
    assert edit.removed == {"fc3.weight", "fc3.bias"}


def test_skip_gives_its_first_argument_back() -> None:
    x = torch.randn(2)
    assert Skip()(x, 1, mask=None) is x


def test_slice_parameter_reaches_every_name() -> None:
    model = TiedModel()
    edit = surgery.slice_parameter(model, "head.weight", 0, [3, 5])
    assert model.embedding.weight.shape == (2, 16)
    assert edit.sliced == {
        "embedding.weight": ((0, (3, 5)),),
        "head.weight": ((0, (3, 5)),),
    }


@pytest.mark.parametrize(("name", "dim"), [("fc1.weight", 2), ("fc1.scale", 0)])
def test_slice_parameter_refuses_what_is_not_there(name: str, dim: int) -> None:
    with pytest.raises(SurgeryError, match=r"no (dimension 2|parameter)"):
        surgery.slice_parameter(TinyMLP(), name, dim, [0])


def test_set_tensor_changes_one_name_only() -> None:
    model = TiedModel()
    surgery.set_tensor(model, "head.weight", nn.Parameter(torch.zeros(32, 16)))
    assert model.embedding.weight.any()
    with pytest.raises(SurgeryError, match="no buffer"):
        surgery.set_tensor(model, "head.weight", torch.zeros(32, 16))


def test_edits_compose_in_order() -> None:
    first = Edit(sliced={"a": ((0, (0, 2)),), "b": ((0, (1,)),)}, added=frozenset({"n"}))
    second = Edit(
        sliced={"a": ((1, (3,)),), "n": ((0, (0,)),)},
        added=frozenset({"b"}),
        removed=frozenset({"b"}),
    )
    both = first.then(second)
    assert both.sliced == {"a": ((0, (0, 2)), (1, (3,)))}
    assert (both.added, both.removed) == ({"n", "b"}, {"b"})


def test_what_came_and_went_is_neither_added_nor_removed() -> None:
    came, went = Edit(added=frozenset({"n"})), Edit(removed=frozenset({"n"}))
    assert came.then(went) == Edit()


def test_undone_brings_back_modules_tensors_and_attributes() -> None:
    model, x = TinyMLP(), torch.randn(2, 64)
    before, weight = model(x), model.fc1.weight
    with surgery.undone(model):
        cutting.keep_channels(model, FC1, [0])
        surgery.replace(model, "fc3", Skip())
        assert model(x).shape == (2, 32)
    assert model.fc1.weight is weight
    assert model.fc1.out_features == 32
    assert torch.equal(model(x), before)
