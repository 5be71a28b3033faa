"""Every group that is offered prunes exactly; what would not is left alone, with its reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision.models as tv
from torch import Tensor, nn
from torch.nn import functional as F

from compressor.interfaces.inputs import ModelInputs
from compressor.structure.channels import find_groups
from compressor.structure.cutting import keep_many
from compressor.structure.groups import ChannelMap
from compressor.testing.models import (
    CifarResNet,
    DictModel,
    TiedModel,
    TinyMLP,
    TinyResNet,
    TinyTransformer,
)
from tests.structure.labels.nets import (
    Net,
    assert_prunes_exactly,
    named,
    rows,
    sizes,
    tokens,
)


def test_a_residual_network_has_its_streams_and_inner_groups() -> None:
    model, inputs = TinyResNet(), rows(2, 1, 8, 8)
    found = find_groups(model, inputs)
    assert sizes(found) == {
        "conv1": 16,  # the stream of the first stage
        "layer1.0.conv1": 16,
        "layer2.0.conv1": 32,
        "layer2.0.conv2": 32,  # the stream of the second
        "layer2.1.conv1": 32,
    }
    assert found.quarantined == ()
    assert_prunes_exactly(model, inputs, found)


def test_the_members_of_a_group_are_the_tensors_that_it_runs_through() -> None:
    group = named(find_groups(TinyResNet(), rows(2, 1, 8, 8)), "layer1.0.conv1")
    norm = [f"bn1.{key}" for key in ("weight", "bias", "running_mean", "running_var")]
    assert [(member.tensor, member.dim, member.side) for member in group.members] == [
        ("layer1.0.conv1.weight", 0, "out"),
        *((f"layer1.0.{name}", 0, "out") for name in norm[:2]),
        ("layer1.0.conv2.weight", 1, "in"),
        *((f"layer1.0.{name}", 0, "out") for name in norm[2:]),
    ]
    assert all(member.index == tuple((i,) for i in range(16)) for member in group.members)


def test_finding_changes_nothing() -> None:
    model = TinyResNet().train()
    model.linear.weight.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rng = torch.get_rng_state()
    find_groups(model, rows(2, 1, 8, 8))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training
    assert not model.linear.weight.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), rng)


def test_the_same_groups_in_every_run() -> None:
    model, inputs = TinyResNet(), rows(2, 1, 8, 8)
    assert find_groups(model, inputs) == find_groups(model, inputs)


def test_a_frozen_model_has_the_same_groups() -> None:
    model, inputs = TinyResNet(), rows(2, 1, 8, 8)
    found = find_groups(model, inputs)
    assert find_groups(model.requires_grad_(False), inputs) == found


def test_channels_that_are_outputs_are_not_offered() -> None:
    inputs = ModelInputs(({"image": torch.randn(2, 1, 8, 8), "scale": torch.ones(2)},))
    assert find_groups(DictModel(), inputs).groups == ()
    assert sizes(find_groups(TinyMLP(), rows(2, 64))) == {"fc1": 32, "fc2": 32}


def test_a_transformer_offers_its_mlps_and_its_heads() -> None:
    model = TinyTransformer()
    found = find_groups(model, tokens())
    assert sizes(found) == {
        "blocks.0.qkv": 2,
        "blocks.0.fc1": 64,
        "blocks.1.qkv": 2,
        "blocks.1.fc1": 64,
    }
    heads = named(found, "blocks.1.qkv")
    # The second of two heads of 8: its queries, keys and values in the one weight of 48 rows.
    own = tuple(range(8, 16))
    assert heads.members[0].index[1] == (*own, *(e + 16 for e in own), *(e + 32 for e in own))
    assert ("blocks.1", "heads") in {(c.module, c.attribute) for c in heads.counts}
    assert_prunes_exactly(model, tokens(), found)


def test_tied_weights_are_cut_once() -> None:
    model = TiedModel()
    found = find_groups(model, tokens())
    assert sizes(found) == {"hidden": 16}
    assert_prunes_exactly(model, tokens(), found)
    keep_many(model, [(found.groups[0], range(4))])
    assert model.head.weight is model.embedding.weight
    assert model.embedding.weight.shape == (32, 4)


def test_a_flattened_map_belongs_to_its_channels() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.PReLU(4), nn.Flatten(), nn.Linear(4 * 9, 2))
    found = find_groups(model, rows(2, 1, 5, 5))
    assert named(found, "0").members[-1].index[1] == tuple(range(9, 18))
    assert named(found, "0").modules == ("0", "1", "3")
    assert_prunes_exactly(model, rows(2, 1, 5, 5), found)


def test_a_concatenation_keeps_its_parts_apart() -> None:
    model = Net(
        lambda m, x: m.c(torch.cat([m.a(x), m.b(x)], 1)),
        a=nn.Conv2d(1, 3, 1),
        b=nn.Conv2d(1, 5, 1),
        c=nn.Conv2d(8, 2, 1),
    )
    found = find_groups(model, rows(2, 1, 4, 4))
    assert sizes(found) == {"a": 3, "b": 5}
    assert named(found, "b").consumers[0].index == ((3,), (4,), (5,), (6,), (7,))
    assert_prunes_exactly(model, rows(2, 1, 4, 4), found)


def test_a_grouped_convolution_is_pruned_a_whole_group_at_a_time() -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 8, 1), nn.ReLU(), nn.Conv2d(8, 12, 3, groups=4), nn.Conv2d(12, 2, 1)
    )
    found = find_groups(model, rows(2, 1, 5, 5))
    assert sizes(found) == {"0": 4}
    entries = {(m.tensor, m.dim): m.index[1] for m in found.groups[0].members}
    assert entries["0.weight", 0] == (2, 3)
    assert entries["2.weight", 0] == entries["3.weight", 1] == (3, 4, 5)
    assert_prunes_exactly(model, rows(2, 1, 5, 5), found)
    keep_many(model, [(found.groups[0], [0, 2, 3])])
    assert (model[2].groups, model[2].in_channels, model[2].out_channels) == (3, 6, 9)


class Branching(nn.Module):
    """Which of its layers it runs depends on the data; the others can still be read."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        if x.sum() > 0:
            x = F.relu(self.b(x))
        out: Tensor = self.c(x)
        return out


def test_a_model_that_cannot_be_exported_is_read_by_torch_pruning() -> None:
    torch.manual_seed(0)
    model, inputs = Branching(), rows(2, 4)
    found = find_groups(model, inputs)
    assert sizes(found) == {"a": 6, "b": 6}
    assert found.quarantined == ()
    assert_prunes_exactly(model, inputs, found)


def test_what_neither_can_read_has_no_groups_and_a_reason() -> None:
    """torch-pruning divides by zero on a channel shuffle."""

    class Shuffled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1)

        def forward(self, x: Tensor) -> Any:
            x = self.a(x)
            if x.sum() > 1e9:
                return x
            n, c, h, w = x.shape
            return self.b(x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w))

    found = find_groups(Shuffled(), rows(2, 3, 4, 4))
    assert found.groups == ()
    [(_, reason)] = found.quarantined
    assert reason


def test_groups_of_one_channel_are_not_offered() -> None:
    model = nn.Sequential(nn.Linear(3, 1), nn.Linear(1, 2))
    assert find_groups(model, rows(2, 3)).groups == ()


def test_a_model_without_channels_to_prune_has_none() -> None:
    assert find_groups(nn.Sequential(nn.Linear(3, 2)), rows(2, 3)) == ChannelMap(
        (), (), (("they are the model's outputs", ("0",)),)
    )


def small_densenet() -> nn.Module:
    return tv.DenseNet(growth_rate=4, block_config=(2, 2), num_init_features=8, bn_size=2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "groups"),
    [
        (tv.resnet18, 12),
        (tv.mobilenet_v2, 25),
        (small_densenet, 10),
        (tv.shufflenet_v2_x0_5, 20),  # and one whose channels all mix: a single one is left
        (lambda: CifarResNet(20), 12),
    ],
)
def test_known_models_are_pruned_in_all_their_groups(
    make: Callable[[], nn.Module], groups: int
) -> None:
    torch.manual_seed(0)
    model, inputs = make(), rows(2, 3, 32, 32)
    found = find_groups(model, inputs)
    assert (len(found.groups), found.quarantined) == (groups, ())
    assert_prunes_exactly(model, inputs, found)


@pytest.mark.slow
def test_a_decoder_that_returns_its_cache_is_read_without_it() -> None:
    """`torch.export` knows no DynamicCache, and autograd's graph of it had no end."""
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    found = find_groups(model, ModelInputs((), {"input_ids": torch.arange(24).reshape(2, 12)}))
    heads, features = found.groups
    assert (heads.size, features.size) == (2, 64)
    assert model.config.use_cache
