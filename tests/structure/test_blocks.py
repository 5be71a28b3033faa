"""Residual blocks are found whatever their code looks like, and only where leaving out is safe."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision.models as tv
from torch import Tensor, nn
from torch.nn import functional as F

from compressor.errors import ModelError
from compressor.interfaces.inputs import ModelInputs
from compressor.structure.blocks import residual_blocks
from compressor.structure.surgery import Skip, replace
from compressor.testing.models import CifarResNet, TinyMLP, TinyResNet, TinyTransformer

pytestmark = pytest.mark.slow  # each one exports a graph


def names(model: nn.Module, *shape: int) -> list[str]:
    return [block.name for block in residual_blocks(model, ModelInputs((torch.randn(shape),)))]


class Block(nn.Module):
    """`join(x, branch(x))` for one linear branch."""

    def __init__(self, join: Callable[[Tensor, Tensor], Any], out: int = 4) -> None:
        super().__init__()
        self.branch = nn.Sequential(nn.Linear(4, out))
        self.join = join

    def forward(self, x: Tensor) -> Any:
        return self.join(x, self.branch(x))


def test_identity_blocks_are_found_and_strided_ones_are_not() -> None:
    model = TinyResNet()
    blocks = residual_blocks(model, ModelInputs((torch.randn(2, 1, 8, 8),)))
    assert [(block.name, block.shape) for block in blocks] == [
        ("layer1.0", (2, 16, 8, 8)),
        ("layer2.1", (2, 32, 4, 4)),
    ]
    assert blocks[0].modules[:2] == ("layer1.0", "layer1.0.conv1")


def test_cifar_blocks_with_padded_shortcuts_stay() -> None:
    expected = [f"layer{s}.{b}" for s in (1, 2, 3) for b in range(3)]
    expected.remove("layer2.0")
    expected.remove("layer3.0")
    assert names(CifarResNet(20), 2, 3, 32, 32) == expected


def test_all_blocks_may_go_at_once() -> None:
    model = CifarResNet(20)
    for name in names(model, 2, 3, 32, 32):
        replace(model, name, Skip())
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 10)


def test_pre_norm_transformer_blocks_are_found() -> None:
    inputs = ModelInputs((torch.arange(10).reshape(2, 5),))
    assert [b.name for b in residual_blocks(TinyTransformer(), inputs)] == ["blocks.0", "blocks.1"]


@pytest.mark.parametrize(
    "join",
    [
        lambda x, y: x + y,
        lambda x, y: F.relu(y.add_(x)),
        lambda x, y: F.hardswish(F.dropout(x + y + 1)),
        lambda x, y: (F.gelu(y) + x).clone(),
    ],
)
def test_a_sum_with_the_input_is_a_block(join: Callable[[Tensor, Tensor], Any]) -> None:
    assert names(nn.Sequential(nn.Linear(4, 4), Block(join), nn.Linear(4, 2)), 2, 4) == ["1"]


@pytest.mark.parametrize(
    "join",
    [
        lambda x, y: y,  # no sum
        lambda x, y: x * y,
        lambda x, y: y + 1,
        lambda x, y: y + x.mean(),
        lambda x, y: torch.cat([x, y], 1)[:, :4],
        lambda x, y: (x + y, y),  # two outputs
        lambda x, y: F.relu(y) + F.softmax(x, 1),
    ],
)
def test_other_joins_are_not(join: Callable[[Tensor, Tensor], Any]) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(4, 4)
            self.block = Block(join)

        def forward(self, x: Tensor) -> Tensor:
            out = self.block(self.first(x))
            return (out[0] if isinstance(out, tuple) else out) * 2

    assert names(Model(), 2, 4) == []


def test_a_block_that_is_called_twice_is_not_offered() -> None:
    block = Block(lambda x, y: x + y)
    assert names(nn.Sequential(nn.Linear(4, 4), block, block, nn.Linear(4, 2)), 2, 4) == []


def test_a_sum_with_a_parameter_of_the_same_shape_is_no_residual() -> None:
    class Shift(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)
            self.shift = nn.Parameter(torch.randn(2, 4))

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) + self.shift

    assert names(nn.Sequential(nn.Linear(4, 4), Shift(), nn.Linear(4, 2)), 2, 4) == []


def test_only_the_innermost_block_is_offered() -> None:
    inner = Block(lambda x, y: x + y)
    outer = Block(lambda x, y: x + y)
    outer.branch = nn.Sequential(inner)
    assert names(nn.Sequential(nn.Linear(4, 4), outer, nn.Linear(4, 2)), 2, 4) == ["1.branch.0"]


def test_finding_leaves_model_and_mode_alone() -> None:
    model = TinyResNet().train()
    before = dict(model.named_modules())
    names(model, 2, 1, 8, 8)
    assert model.training
    assert dict(model.named_modules()) == before


def test_a_plain_network_has_none() -> None:
    assert names(TinyMLP(), 2, 64) == []


def test_a_model_that_does_not_run_is_an_error() -> None:
    with pytest.raises(ModelError, match="does not run"):
        names(TinyMLP(), 2, 3)


@pytest.mark.parametrize(("make", "count"), [(tv.resnet18, 5), (tv.mobilenet_v2, 10)])
def test_torchvision_models_have_their_identity_blocks(
    make: Callable[[], nn.Module], count: int
) -> None:
    assert len(names(make(), 2, 3, 32, 32)) == count
