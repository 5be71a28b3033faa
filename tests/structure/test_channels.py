"""Every group that is offered prunes exactly; what would not is quarantined with its reason."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torchvision.models as tv
from torch import Tensor, nn
from torch.nn import functional as F

from compressor.errors import ModelError
from compressor.interfaces.inputs import ModelInputs, output_tensors
from compressor.structure.channels import (
    ChannelGroup,
    ChannelMap,
    Member,
    find_groups,
    make_probe,
    verify_group,
)
from compressor.structure.surgery import get, keep_many
from compressor.testing.models import (
    CifarResNet,
    DictModel,
    TiedModel,
    TinyMLP,
    TinyResNet,
    TinyTransformer,
)


def images(*shape: int) -> ModelInputs:
    return ModelInputs((torch.randn(shape, generator=torch.Generator().manual_seed(0)),))


def tokens() -> ModelInputs:
    return ModelInputs((torch.arange(10).reshape(2, 5),))


def named(found: ChannelMap, name: str) -> ChannelGroup:
    return next(group for group in found.groups if group.name == name)


def masked_call(
    model: nn.Module, inputs: ModelInputs, cuts: Sequence[tuple[ChannelGroup, list[int]]]
) -> list[Tensor]:
    """The whole model with the pruned channels zeroed in the inputs of what reads them."""
    handles = []
    for group, kept in cuts:
        for member in group.consumers:
            layer = get(model, member.module)
            dim = -1 if isinstance(layer, nn.Linear) else 1
            entries = [e for c in set(range(group.size)) - set(kept) for e in member.index[c]]

            def mask(_: nn.Module, args: tuple[Any, ...], d: int = dim, e: Any = entries) -> Any:
                return (args[0].index_fill(d, torch.tensor(e, dtype=torch.long), 0.0), *args[1:])

            handles.append(layer.register_forward_pre_hook(mask))
    with torch.no_grad():
        outputs = output_tensors(inputs.call(model))
    for handle in handles:
        handle.remove()
    return outputs


def assert_prunes_exactly(model: nn.Module, inputs: ModelInputs, found: ChannelMap) -> None:
    """All groups at once, half of each: pruned equals masked, and differs from the whole."""
    probe, inputs = make_probe(model), inputs.double()
    cuts = [(group, list(range(0, group.size, 2))) for group in found.groups]
    expected = masked_call(probe, inputs, cuts)
    whole = masked_call(probe, inputs, [])
    keep_many(probe, cuts)
    with torch.no_grad():
        outputs = output_tensors(inputs.call(probe))
    for output, masked in zip(outputs, expected, strict=True):
        torch.testing.assert_close(output, masked, rtol=1e-9, atol=1e-12)
    assert any(not torch.allclose(a, b) for a, b in zip(expected, whole, strict=True))


def test_a_residual_network_has_its_streams_and_inner_groups() -> None:
    model, inputs = TinyResNet(), images(2, 1, 8, 8)
    found = find_groups(model, inputs)
    assert {group.name: group.size for group in found.groups} == {
        "conv1": 16,  # the stream of the first stage
        "layer1.0.conv1": 16,
        "layer2.0.conv1": 32,
        "layer2.0.conv2": 32,  # the stream of the second
        "layer2.1.conv1": 32,
    }
    assert found.quarantined == ()
    assert_prunes_exactly(model, inputs, found)


def test_the_members_of_a_group_are_the_layers_that_it_runs_through() -> None:
    group = named(find_groups(TinyResNet(), images(2, 1, 8, 8)), "layer1.0.conv1")
    assert [(member.module, member.side) for member in group.members] == [
        ("layer1.0.conv1", "out"),
        ("layer1.0.bn1", "out"),
        ("layer1.0.conv2", "in"),
    ]
    assert group.members[2].index == tuple((i,) for i in range(16))


def test_padded_shortcuts_are_quarantined_and_the_inner_groups_found() -> None:
    """torch-pruning 1.6 does not see channel padding; the model that it prunes raises."""
    model, inputs = CifarResNet(20), images(2, 3, 32, 32)
    found = find_groups(model, inputs)
    names = [f"layer{stage}.{block}.conv1" for stage in (1, 2, 3) for block in range(3)]
    assert [group.name for group in found.groups] == names
    [(name, reason)] = found.quarantined
    assert name == "conv1"
    assert "does not run" in reason
    assert_prunes_exactly(model, inputs, found)


def test_finding_changes_nothing() -> None:
    model = TinyResNet().train()
    model.linear.weight.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rng = torch.get_rng_state()
    find_groups(model, images(2, 1, 8, 8))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training
    assert not model.linear.weight.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), rng)


def test_the_same_groups_in_every_run() -> None:
    model, inputs = TinyResNet(), images(2, 1, 8, 8)
    assert find_groups(model, inputs) == find_groups(model, inputs)


def test_a_frozen_model_has_the_same_groups() -> None:
    model, inputs = TinyResNet(), images(2, 1, 8, 8)
    assert find_groups(model.requires_grad_(False), inputs).groups


def test_channels_that_are_outputs_are_not_offered() -> None:
    inputs = ModelInputs(({"image": torch.randn(2, 1, 8, 8), "scale": torch.ones(2)},))
    assert find_groups(DictModel(), inputs) == ChannelMap((), ())
    assert [g.name for g in find_groups(TinyMLP(), images(2, 64)).groups] == ["fc1", "fc2"]


def test_a_layer_norm_is_quarantined_by_the_check() -> None:
    """Mean and variance over fewer entries are others than over zeroed ones."""
    model = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3))
    found = find_groups(model, images(2, 6))
    [(name, reason)] = found.quarantined
    assert name == "0"
    assert "the output is off by" in reason


def test_a_transformer_offers_its_mlps() -> None:
    model = TinyTransformer()
    found = find_groups(model, tokens())
    assert [group.name for group in found.groups] == ["blocks.0.fc1", "blocks.1.fc1"]
    assert {name for name, _ in found.quarantined} >= {"blocks.0.qkv", "blocks.1.qkv"}
    assert_prunes_exactly(model, tokens(), found)


def test_tied_weights_are_quarantined() -> None:
    found = find_groups(TiedModel(), tokens())
    assert found.groups == ()
    assert all("tied" in reason for _, reason in found.quarantined)


class Net(nn.Module):
    """Layers by name, and the function that calls them."""

    def __init__(self, call: Callable[[Any, Tensor], Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self.call = call
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self, x)


def test_a_flattened_map_belongs_to_its_channels() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.PReLU(4), nn.Flatten(), nn.Linear(4 * 9, 2))
    found = find_groups(model, images(2, 1, 5, 5))
    assert named(found, "0").members[-1].index[1] == tuple(range(9, 18))
    assert [member.module for member in named(found, "0").members] == ["0", "1", "3"]
    assert_prunes_exactly(model, images(2, 1, 5, 5), found)


def test_a_concatenation_keeps_its_parts_apart() -> None:
    model = Net(
        lambda m, x: m.c(torch.cat([m.a(x), m.b(x)], 1)),
        a=nn.Conv2d(1, 3, 1),
        b=nn.Conv2d(1, 5, 1),
        c=nn.Conv2d(8, 2, 1),
    )
    found = find_groups(model, images(2, 1, 4, 4))
    assert [(group.name, group.size) for group in found.groups] == [("a", 3), ("b", 5)]
    assert named(found, "b").consumers[0].index == ((3,), (4,), (5,), (6,), (7,))
    assert_prunes_exactly(model, images(2, 1, 4, 4), found)


def test_a_grouped_convolution_is_pruned_a_whole_group_at_a_time() -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 8, 1),
        nn.ReLU(),
        nn.Conv2d(8, 12, 3, groups=4),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.Conv2d(12, 2, 1),
    )
    found = find_groups(model, images(2, 1, 5, 5))
    [group] = found.groups
    assert (group.name, group.size) == ("0", 4)
    assert [member.index[1] for member in group.members] == [
        (2, 3),
        (3, 4, 5),
        (2, 3),
        (3, 4, 5),
        (3, 4, 5),
    ]
    assert_prunes_exactly(model, images(2, 1, 5, 5), found)


def test_a_depthwise_convolution_joins_what_is_before_and_behind_it() -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 6, 1), nn.Conv2d(6, 6, 3, groups=6), nn.ReLU6(), nn.Conv2d(6, 2, 1)
    )
    found = find_groups(model, images(2, 1, 5, 5))
    assert [(group.name, group.size) for group in found.groups] == [("0", 6)]
    assert_prunes_exactly(model, images(2, 1, 5, 5), found)


def test_a_group_norm_is_pruned_a_whole_group_at_a_time() -> None:
    model = nn.Sequential(nn.Conv2d(1, 8, 1), nn.GroupNorm(4, 8), nn.Conv2d(8, 2, 1))
    found = find_groups(model, images(2, 1, 5, 5))
    assert named(found, "0").size == 4
    assert_prunes_exactly(model, images(2, 1, 5, 5), found)


def test_a_shared_layer_is_cut_once() -> None:
    model = Net(
        lambda m, x: m.c(F.relu(m.b(F.relu(m.b(F.relu(m.a(x))))))),
        a=nn.Linear(4, 6),
        b=nn.Linear(6, 6),
        c=nn.Linear(6, 2),
    )
    found = find_groups(model, images(2, 4))
    assert [group.name for group in found.groups] == ["a"]
    assert_prunes_exactly(model, images(2, 4), found)


def test_hard_coded_shapes_are_quarantined() -> None:
    model = Net(
        lambda m, x: m.b(m.a(x).reshape(-1, 2, 3).flatten(1)), a=nn.Linear(4, 6), b=nn.Linear(6, 2)
    )
    found = find_groups(model, images(2, 4))
    assert found.groups == ()
    assert [name for name, _ in found.quarantined] == ["a"]


def test_a_channel_that_a_function_reads_by_number_is_quarantined() -> None:
    """Nothing raises here: only the comparison of values shows that the wrong channel is read."""

    def call(net: Any, x: Tensor) -> Tensor:
        hidden = net.a(x)
        return net.b(F.relu(hidden)) + hidden.detach()[:, :1]

    model = Net(call, a=nn.Linear(4, 6), b=nn.Linear(6, 2))
    [(name, reason)] = find_groups(model, images(2, 4)).quarantined
    assert name == "a"
    assert "the output is off by" in reason


def test_channels_that_meet_a_bare_parameter_are_quarantined() -> None:
    model = Net(lambda m, x: m.b(m.a(x) * m.scale), a=nn.Linear(4, 6), b=nn.Linear(6, 2))
    model.scale = nn.Parameter(torch.ones(6))
    [(name, reason)] = find_groups(model, images(2, 4)).quarantined
    assert name == "a"
    assert "bare parameter of shape (6,)" in reason


def test_a_model_that_torch_pruning_cannot_read_has_no_groups() -> None:
    """It divides by zero on the channel shuffle."""
    found = find_groups(
        tv.shufflenet_v2_x0_5(num_classes=2).requires_grad_(True), images(2, 3, 32, 32)
    )
    assert found.groups == ()
    assert "torch-pruning cannot read this model" in found.quarantined[0][1]


def test_zero_initialised_layers_do_not_make_the_check_vacuous() -> None:
    model = TinyResNet()
    for parameter in (model.linear.weight, model.layer1[0].bn2.weight):
        nn.init.zeros_(parameter)
    assert len(find_groups(model, images(2, 1, 8, 8)).groups) == 5


def test_a_check_that_shows_no_change_proves_nothing() -> None:
    model = Net(lambda m, x: m.b(m.a(x)) * 0.0 + x, a=nn.Linear(4, 6), b=nn.Linear(6, 4))
    reasons = dict(find_groups(model, images(2, 4)).quarantined)
    assert "proves nothing" in reasons["a"]


def test_verify_group_finds_a_wrong_index() -> None:
    model, inputs = TinyMLP(), images(2, 64)
    [right, _] = find_groups(model, inputs).groups
    assert verify_group(model, inputs, right) is None
    out, reads = right.members
    reversed_reads = Member(reads.module, "in", reads.index[::-1], 32)
    reason = verify_group(model, inputs, ChannelGroup("fc1", 32, (out, reversed_reads)))
    assert reason is not None
    assert "off by" in reason


def test_a_group_of_one_channel_is_not_offered() -> None:
    model = nn.Sequential(nn.Linear(3, 1), nn.Linear(1, 2))
    [(name, reason)] = find_groups(model, images(2, 3)).quarantined
    assert (name, reason) == ("0", "It has a single channel, so none can be removed.")


def test_a_model_that_does_not_run_is_an_error() -> None:
    with pytest.raises(ModelError, match=r"does not run on inputs of shapes \(2, 3\)"):
        find_groups(TinyMLP(), images(2, 3))


def test_a_model_without_a_float_output_is_an_error() -> None:
    model = Net(lambda m, x: m.a(x).argmax(1), a=nn.Linear(4, 6))
    with pytest.raises(ModelError, match="no floating point tensor"):
        find_groups(model, images(2, 4))


def small_densenet() -> nn.Module:
    return tv.DenseNet(growth_rate=4, block_config=(2, 2), num_init_features=8, bn_size=2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "groups"),
    [(tv.resnet18, 12), (tv.mobilenet_v2, 25), (small_densenet, 10)],
)
def test_torchvision_models_are_pruned_in_all_their_groups(
    make: Callable[[], nn.Module], groups: int
) -> None:
    torch.manual_seed(0)
    model, inputs = make(), images(2, 3, 32, 32)
    found = find_groups(model, inputs)
    assert (len(found.groups), found.quarantined) == (groups, ())
    assert_prunes_exactly(model, inputs, found)
