"""What cannot be pruned is named with its reason; what only looks so is pruned."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import orthogonal, spectral_norm, weight_norm
from torch.nn.utils.parametrize import remove_parametrizations

from compressor.interfaces.inputs import ModelInputs
from compressor.structure.channels import find_groups
from compressor.structure.groups import ChannelMap
from compressor.testing.models import DictModel
from tests.structure.labels.nets import Net, assert_prunes_exactly, named, rows, sizes


def reason(found: ChannelMap, layer: str) -> str:
    """Why the outputs of `layer` are frozen."""
    return next(why for why, layers in found.frozen if layer in layers)


def linears(*widths: int) -> dict[str, nn.Module]:
    """Layers a, b, c … between these widths."""
    pairs = zip("abcdef", widths, widths[1:], strict=False)
    return {name: nn.Linear(before, after) for name, before, after in pairs}


def test_an_operation_without_a_rule_freezes_what_reaches_it_and_is_named() -> None:
    model = nn.Sequential(
        nn.Linear(4, 6), nn.ReLU(), Net(lambda _, x: torch.fft.rfft(x).abs()), nn.Linear(4, 6),
        nn.ReLU(), nn.Linear(6, 2),
    )  # fmt: skip
    found = find_groups(model, rows(2, 4))
    assert sizes(found) == {"3": 6}
    assert reason(found, "0") == "the operation aten.fft_rfft in '2' has no rule"


def test_outputs_are_frozen_because_they_are_outputs() -> None:
    found = find_groups(Net(lambda m, x: m.a(x), **linears(4, 6)), rows(2, 4))
    assert found == ChannelMap((), (), (("they are the model's outputs", ("a",)),))


def test_all_of_several_outputs_are_frozen() -> None:
    inputs = ModelInputs(({"image": torch.randn(2, 1, 8, 8), "scale": torch.ones(2)},))
    found = find_groups(DictModel(), inputs)
    assert (found.groups, found.quarantined) == ((), ())
    assert reason(found, "conv") == reason(found, "head") == "they are the model's outputs"


def test_what_an_input_is_added_to_is_frozen() -> None:
    found = find_groups(Net(lambda m, x: m.b(m.a(x) + x), **linears(4, 4, 2)), rows(2, 4))
    assert reason(found, "a") == "they meet entries that cannot be removed, at aten.add"


def test_a_layer_norm_is_named_with_its_module() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3))
    found = find_groups(model, rows(2, 6))
    assert (found.groups, found.quarantined) == ((), ())
    assert reason(found, "0") == "aten.layer_norm in '1' normalises over them"


def test_several_inputs_of_one_call_reach_their_layers() -> None:
    model = Net(lambda m, x, y: m.c(m.a(x) * m.b(y)), **linears(4, 6), b=nn.Linear(5, 6))
    model.c = nn.Linear(6, 2)
    inputs = ModelInputs((rows(2, 4).args[0],), {"y": rows(2, 5).args[0]})
    found = find_groups(model, inputs)
    assert sizes(found) == {"a": 6}
    assert_prunes_exactly(model, inputs, found)


def test_parameters_that_no_layer_holds_are_cut() -> None:
    """A class token, positions, and the scale of a layer."""

    def call(m: Any, x: Tensor) -> Tensor:
        x = m.a(x)
        x = torch.cat([m.token.expand(len(x), -1, -1), x], 1) + m.position
        out: Tensor = m.b(x * m.scale)[:, 0]
        return out

    model = Net(call, **linears(4, 6, 2))
    for name, shape in {"token": (1, 1, 6), "position": (4, 6), "scale": (6,)}.items():
        setattr(model, name, nn.Parameter(torch.randn(shape)))
    found = find_groups(model, rows(2, 3, 4))
    assert {(m.tensor, m.dim) for m in named(found, "a").members} == {
        ("a.weight", 0),
        ("a.bias", 0),
        ("token", 2),
        ("position", 1),
        ("scale", 0),
        ("b.weight", 1),
    }
    assert_prunes_exactly(model, rows(2, 3, 4), found)


def test_a_buffer_is_cut_with_the_channels_that_it_scales() -> None:
    model = Net(lambda m, x: m.b(m.a(x) * m.scale), **linears(4, 6, 2))
    model.register_buffer("scale", torch.rand(6))
    found = find_groups(model, rows(2, 4))
    assert ("scale", 0) in {(m.tensor, m.dim) for m in named(found, "a").members}
    assert_prunes_exactly(model, rows(2, 4), found)


def test_a_tensor_that_is_no_buffer_stops_the_channels() -> None:
    model = Net(lambda m, x: m.b(m.a(x) * m.scale), **linears(4, 6, 2))
    model.scale = torch.rand(6)  # type: ignore[assignment]
    found = find_groups(model, rows(2, 4))
    assert found.groups == ()
    assert "they meet entries that cannot be removed" in reason(found, "a")


def test_labels_pass_through_blocks_without_gradient_or_with_autocast() -> None:
    def call(m: Any, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = F.relu(m.a(x))
        with torch.autocast("cpu", enabled=False):
            x = F.relu(m.b(x))
        out: Tensor = m.c(x)
        return out

    model = Net(call, **linears(4, 6, 5, 2))
    found = find_groups(model, rows(2, 4))
    assert sizes(found) == {"a": 6, "b": 5}
    assert_prunes_exactly(model, rows(2, 4), found)


def test_a_tied_embedding_is_cut_under_both_names() -> None:
    """The width of the embedding and of what reads it: one tensor, one cut."""

    def call(m: Any, x: Tensor) -> Tensor:
        out: Tensor = m.head(F.relu(m.a(m.table(x))) * 2)
        return out

    model = Net(call, table=nn.Embedding(9, 6), a=nn.Linear(6, 6), head=nn.Linear(6, 9, bias=False))
    model.head.weight = model.table.weight  # type: ignore[union-attr]
    inputs = ModelInputs((torch.arange(8).reshape(2, 4),))
    found = find_groups(model, inputs)
    [group] = found.groups
    assert group.size == 6
    tensors = [m.tensor for m in group.members]
    assert tensors.count("table.weight") == 1
    assert "head.weight" not in tensors
    assert_prunes_exactly(model, inputs, found)


@pytest.mark.filterwarnings("ignore:The tensor attributes .*_flat_weights:UserWarning")
def test_a_hidden_state_that_is_given_stops_the_units() -> None:
    model = Net(lambda m, x, h: m.b(m.r(x, h)[0]), r=nn.GRU(4, 6), b=nn.Linear(6, 2))
    inputs = ModelInputs((torch.randn(3, 2, 4), torch.randn(1, 2, 6)))
    found = find_groups(model, inputs)
    assert "is given its first state" in reason(found, "r")


def test_a_state_that_is_given_stops_the_units_of_a_cell() -> None:
    model = Net(lambda m, x, h: m.b(m.r(x, h)), r=nn.GRUCell(4, 6), b=nn.Linear(6, 2))
    inputs = ModelInputs((torch.randn(2, 4), torch.randn(2, 6)))
    found = find_groups(model, inputs)
    assert found.groups == ()
    assert "is given its first state" in reason(found, "r")


def test_a_first_state_that_is_a_fixed_tensor_stops_the_units() -> None:
    model = Net(lambda m, x: m.b(m.r(x, m.state)), r=nn.RNNCell(4, 6), b=nn.Linear(6, 2))
    model.state = torch.rand(2, 6)  # type: ignore[assignment]
    found = find_groups(model, rows(2, 4))
    assert (found.groups, found.quarantined) == ((), ())
    assert "is given its first state" in reason(found, "r")


def test_an_image_of_a_vector_keeps_the_places_that_a_convolution_mixes() -> None:
    """A kernel that is laid over the only label of a place: nothing can go, and it is said why."""

    def call(m: Any, x: Tensor) -> Tensor:
        out: Tensor = m.c(m.a(x).view(-1, 1, 4, 4))
        return out

    model = Net(call, a=nn.Linear(6, 16), c=nn.Conv2d(1, 2, 3))
    found = find_groups(model, rows(2, 6))
    assert found.groups == ()
    assert reason(found, "a") == "aten.conv2d in 'c' mixes neighbours"


@pytest.mark.parametrize("parametrize", [spectral_norm, orthogonal])
def test_a_parametrized_weight_that_freezes_says_how_to_go_on(
    parametrize: Callable[[nn.Module], nn.Module],
) -> None:
    model = Net(lambda m, x: m.b(F.relu(m.a(x))), **linears(4, 6, 2))
    parametrize(model.a)  # type: ignore[arg-type]
    inputs = rows(2, 4)
    found = find_groups(model, inputs)
    whys = [why for why, layers in found.frozen if "a.parametrizations.weight" in layers]
    assert whys
    way_out = "torch.nn.utils.parametrize.remove_parametrizations before pruning"
    assert all(way_out in why for why in whys)
    remove_parametrizations(model.a, "weight")  # type: ignore[arg-type]  # and that helps
    found = find_groups(model, inputs)
    assert sizes(found) == {"a": 6}
    assert_prunes_exactly(model, inputs, found)


def test_a_weight_norm_is_not_blamed_for_what_others_freeze() -> None:
    model = Net(lambda m, x: m.a(x) + x, a=weight_norm(nn.Linear(4, 4)))
    found = find_groups(model, rows(2, 4))
    assert found.groups == ()
    assert not any("remove_parametrizations" in why for why, _ in found.frozen)
