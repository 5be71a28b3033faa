from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compressor.errors import ModelError
from compressor.structure import surgery
from compressor.structure.describe import diff, rebuild
from compressor.structure.surgery import Edit
from compressor.training.algorithms.low_precision_norms import (
    apply_low_precision_groupnorm,
    apply_low_precision_layernorm,
)

Apply = Callable[[nn.Module], Edit]


def inputs(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, 8, 8, generator=torch.Generator().manual_seed(0)).to(dtype)


def make_layer_norm(**options: bool) -> nn.Sequential:
    return drawn(nn.Sequential(nn.LayerNorm(8, **options)))


def make_group_norm(**options: bool) -> nn.Sequential:
    return drawn(nn.Sequential(nn.GroupNorm(2, 8, **options)))


def drawn(model: nn.Sequential) -> nn.Sequential:
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=random))
    return model


KINDS = pytest.mark.parametrize(
    ("make", "apply"),
    [
        (make_layer_norm, apply_low_precision_layernorm),
        (make_group_norm, apply_low_precision_groupnorm),
    ],
)


@KINDS
def test_without_autocast_nothing_changes(make: Callable[..., nn.Sequential], apply: Apply) -> None:
    model = make()
    expected = model(inputs())
    apply(model)
    assert torch.equal(model(inputs()), expected)


@KINDS
def test_in_autocast_it_computes_and_gives_the_low_precision(
    make: Callable[..., nn.Sequential], apply: Apply
) -> None:
    model = make()
    norm = model[0]
    weight, bias, x = norm.weight.bfloat16(), norm.bias.bfloat16(), inputs().bfloat16()
    if isinstance(norm, nn.LayerNorm):
        expected = F.layer_norm(x, (8,), weight, bias)
    else:
        expected = F.group_norm(x, 2, weight, bias)
    exact = model(inputs())
    apply(model)
    with torch.autocast("cpu", torch.bfloat16):
        made = model(inputs())
    assert made.dtype is torch.bfloat16
    assert torch.equal(made, expected)
    # 2**-7: of inputs, weights and outputs, each of 8 bits
    torch.testing.assert_close(made.float(), exact, rtol=2**-7, atol=2**-6)


@KINDS
def test_doubles_and_norms_without_weights_are_left_to_autocast(
    make: Callable[..., nn.Sequential], apply: Apply
) -> None:
    key = "elementwise_affine" if make is make_layer_norm else "affine"
    model = make(**{key: False})
    apply(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(inputs()).dtype is torch.bfloat16
        assert model(inputs(torch.float64)).dtype is torch.float64


@KINDS
def test_gradients_of_the_weights_stay_float32(
    make: Callable[..., nn.Sequential], apply: Apply
) -> None:
    model = make()
    apply(model)
    with torch.autocast("cpu", torch.bfloat16):
        model(inputs()).float().square().mean().backward()
    assert all(p.grad is not None and p.grad.dtype is torch.float32 for p in model.parameters())


@KINDS
def test_parameters_keep_names_and_objects_and_twice_is_once(
    make: Callable[..., nn.Sequential], apply: Apply
) -> None:
    model = make()
    before = dict(model.named_parameters())
    assert apply(model) == surgery.Edit()
    norm = model[0]
    apply(model)
    assert model[0] is norm
    assert all(value is before[name] for name, value in model.named_parameters())


@KINDS
def test_the_structure_is_rebuilt_from_a_file(
    make: Callable[..., nn.Sequential], apply: Apply
) -> None:
    model = make()
    apply(model)
    new = rebuild(make(), diff(make(), model))
    new.load_state_dict(model.state_dict())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(new(inputs()), model(inputs()))


@KINDS
def test_nothing_to_replace_is_an_error(make: Callable[..., nn.Sequential], apply: Apply) -> None:
    with pytest.raises(ModelError, match=r"has no nn\.(Layer|Group)Norm"):
        apply(nn.Sequential(nn.BatchNorm1d(8)))
