from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compressor.errors import ModelError
from compressor.interfaces.inputs import ModelInputs
from compressor.structure import surgery
from compressor.testing.models import TinyMLP, TinyResNet, TinyTransformer
from compressor.training.algorithms.residual_branches import residual_branches

IMAGES = ModelInputs((torch.zeros(2, 1, 8, 8),))


def without(outputs: Any) -> Any:
    """Zeros like the outputs of a module."""
    if isinstance(outputs, Tensor):
        return torch.zeros_like(outputs)
    return (torch.zeros_like(outputs[0]), *outputs[1:])


def given_back(block: nn.Module, x: Tensor) -> Tensor:
    """What a block makes of `x` when all the branches that were found in it are left out."""
    block.eval()
    for name in residual_branches(block, ModelInputs((x,))):
        surgery.get(block, name).register_forward_hook(lambda _, __, outputs: without(outputs))
    with torch.no_grad():
        outputs = block(x)
    return outputs if isinstance(outputs, Tensor) else outputs[0]


def test_of_a_block_the_last_module_is_named() -> None:
    model = TinyResNet(width=4)
    assert residual_branches(model, IMAGES) == ["layer1.0.bn2", "layer2.1.bn2"]
    assert all(not module._forward_hooks for module in model.modules())
    assert model.training


def test_attention_and_mlp_are_branches_in_the_order_of_their_sums() -> None:
    tokens = ModelInputs((torch.zeros(2, 5, dtype=torch.int64),))
    expected = [f"blocks.{block}.{name}" for block in (0, 1) for name in ("proj", "fc2")]
    assert residual_branches(TinyTransformer(), tokens) == expected


def make_encoder() -> nn.Module:
    models = importlib.import_module("torchvision.models.vision_transformer")
    block: nn.Module = models.EncoderBlock(2, 8, 16, 0.1, 0.1)
    return block


def make_convnext() -> nn.Module:
    models = importlib.import_module("torchvision.models.convnext")
    block: nn.Module = models.CNBlock(8, 0.5, 0.0)
    return block


def make_mobilenet() -> nn.Module:
    models = importlib.import_module("torchvision.models.mobilenetv2")
    block: nn.Module = models.InvertedResidual(8, 8, 1, 2)
    return block


def make_gpt2() -> nn.Module:
    modeling = importlib.import_module("transformers.models.gpt2.modeling_gpt2")
    config = importlib.import_module("transformers").GPT2Config(
        n_embd=8, n_layer=1, n_head=2, attn_implementation="eager"
    )
    block: nn.Module = modeling.GPT2Block(config, layer_idx=0)
    return block


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: TinyTransformer().blocks[0], (2, 5, 16)),
        (make_encoder, (2, 5, 8)),
        (make_convnext, (2, 8, 6, 6)),
        (make_mobilenet, (2, 8, 6, 6)),
        (make_gpt2, (2, 5, 8)),
    ],
)
def test_a_block_without_its_branches_gives_back_what_it_gets(
    make: Callable[[], nn.Module], shape: tuple[int, ...]
) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    assert torch.equal(given_back(make(), x), x)


class Adding(nn.Module):
    """x + function(linear(x))."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return x + self.function(self.linear(x))


X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "function", [torch.relu, lambda x: 0.5 * x, lambda x: F.dropout(x, 0.5, False)]
)
def test_what_only_scales_may_follow(function: Callable[[Tensor], Tensor]) -> None:
    assert residual_branches(Adding(function), ModelInputs((X,))) == ["linear"]
    assert torch.equal(given_back(Adding(function), X), X)


@pytest.mark.parametrize("function", [F.gelu, lambda x: F.layer_norm(x, (4,)), lambda x: x + 1])
def test_a_branch_that_ends_in_another_function_is_not_named(
    function: Callable[[Tensor], Tensor],
) -> None:
    with pytest.raises(ModelError, match="no module's output is added"):
        residual_branches(Adding(function), ModelInputs((X,)))


def test_a_module_that_is_called_twice_is_not_named() -> None:
    class Again(Adding):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(super().forward(x))

    with pytest.raises(ModelError, match="no module's output is added"):
        residual_branches(Again(torch.relu), ModelInputs((X,)))


def test_a_network_without_sums_is_refused() -> None:
    with pytest.raises(ModelError, match=r"In the TinyMLP.*Name the modules yourself"):
        residual_branches(TinyMLP(), ModelInputs((torch.zeros(2, 64),)))
