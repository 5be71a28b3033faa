from __future__ import annotations

import hashlib
from collections.abc import Callable

import pytest
import torch
from torch import nn

from compressor.structure.digest import parameter_digest
from compressor.structure.trace import copy_model
from compressor.testing.models import TiedModel, TinyResNet


def test_the_digest_is_the_hash_of_names_shapes_dtypes_and_bytes() -> None:
    model = nn.Linear(1, 2)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0], [-2.0]]))
        model.bias.zero_()
    told = b"('bias', (2,), 'torch.float32')" + bytes(8)
    told += b"('weight', (2, 1), 'torch.float32')" + bytes.fromhex("0000803f000000c0")
    assert parameter_digest(model) == hashlib.sha256(told).hexdigest()


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "the last bit of a weight": lambda m: m.conv1.weight.data.view(torch.int32)[0, 0, 0, 0].add_(1),
    "a running mean": lambda m: m.bn1.running_mean.add_(1),
    "a counter": lambda m: m.bn1.num_batches_tracked.add_(1),
    "a dtype": lambda m: m.half(),
    "a shape": lambda m: setattr(m.linear, "bias", nn.Parameter(m.linear.bias[None])),
    "a name": lambda m: (setattr(m, "last", m.linear), delattr(m, "linear")),
    "a buffer that is in no state dict": lambda m: m.register_buffer("b", torch.ones(0), False),
    "the sign of zero": lambda m: m.bn1.running_mean.neg_(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_the_digest_notices(change: Callable[[nn.Module], object]) -> None:
    model = TinyResNet()
    before = parameter_digest(model)
    change(model)
    assert parameter_digest(model) != before


def test_the_digest_is_of_values_and_not_of_how_they_lie() -> None:
    model = TinyResNet()
    before = parameter_digest(model)
    assert parameter_digest(model.to(memory_format=torch.channels_last)) == before  # type: ignore[call-overload]
    assert parameter_digest(copy_model(model).eval().requires_grad_(False)) == before


def test_tied_and_equal_parameters_are_the_same() -> None:
    tied = TiedModel()
    untied = copy_model(tied)
    untied.head.weight = nn.Parameter(untied.head.weight.detach().clone())
    assert parameter_digest(tied) == parameter_digest(untied)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.bool, torch.complex64, torch.int64])
def test_tensors_of_all_kinds_are_hashed(dtype: torch.dtype) -> None:
    model = nn.Module()
    model.register_buffer("value", torch.ones((), dtype=dtype))
    before = parameter_digest(model)
    model.value.zero_()
    assert parameter_digest(model) != before
