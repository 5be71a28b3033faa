"""Chains that stand for a layer: equal at full rank, counted right, and written as JSON."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import Tensor, nn

from compressor.errors import SurgeryError
from compressor.interfaces.inputs import ModelInputs
from compressor.profiling.counts import count
from compressor.structure.describe import diff, rebuild
from compressor.structure.factored import (
    Factored,
    blank,
    chain_macs,
    chain_shapes,
    factor_names,
    factorize,
    forms_of,
    full_ranks,
    input_moment,
    ranks_for,
    settled_ranks,
    weight_entries,
)
from compressor.structure.surgery import replace
from compressor.testing.models import TinyMLP


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


SETTINGS = [
    (nn.Linear(7, 5), (3, 7)),
    (nn.Linear(5, 7, bias=False), (2, 4, 5)),
    (nn.Conv2d(5, 7, 1, stride=2, padding=1), (2, 5, 6, 6)),
    (nn.Conv1d(5, 7, 1), (2, 5, 6)),
    (nn.Conv2d(5, 6, 3, stride=2, padding=1), (2, 5, 9, 8)),
    (nn.Conv2d(5, 6, (3, 5), stride=(1, 2), padding=(2, 1), dilation=(2, 1)), (2, 5, 12, 9)),
    (nn.Conv2d(5, 6, 3, padding="same", dilation=2, bias=False), (2, 5, 8, 8)),
    (nn.Conv2d(5, 6, (2, 3), padding="valid"), (2, 5, 8, 8)),
    (nn.Conv2d(5, 6, 3, padding=1, padding_mode="reflect"), (2, 5, 8, 8)),
    (nn.Conv2d(5, 6, 3, padding=(2, 1), padding_mode="circular"), (2, 5, 8, 8)),
    (nn.Conv2d(5, 6, 3, padding="same", padding_mode="replicate"), (2, 5, 8, 8)),
    (nn.Conv2d(5, 6, (1, 3)), (2, 5, 8, 8)),
    (nn.Conv1d(5, 6, 3, padding=1), (2, 5, 8)),
    (nn.Conv3d(3, 4, (1, 2, 3), padding=1), (2, 3, 5, 5, 5)),
]
CASES = [(layer, shape, form) for layer, shape in SETTINGS for form in forms_of(layer)]
IDS = [f"{form}-{layer}" for layer, _, form in CASES]


@pytest.mark.parametrize(("layer", "shape", "form"), CASES, ids=IDS)
@pytest.mark.parametrize("is_whitened", [False, True], ids=["plain", "whitened"])
def test_at_full_rank_the_chain_computes_the_layer(
    layer: nn.Module, shape: tuple[int, ...], form: str, is_whitened: bool
) -> None:
    layer, x = copy.deepcopy(layer).double(), draw(*shape)
    moment = input_moment(layer, form, x) if is_whitened else None
    chain = factorize(layer, form, full_ranks(form, layer.weight.shape), moment)
    expected = layer(x)
    assert (chain(x) - expected).norm() <= 1e-12 * expected.norm()
    chain = factorize(layer.float(), form, full_ranks(form, layer.weight.shape), moment)
    expected = layer(x.float())
    assert (chain(x.float()) - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize(("layer", "shape", "form"), CASES, ids=IDS)
def test_entries_macs_and_shapes_are_those_of_the_chain_that_runs(
    layer: nn.Module, shape: tuple[int, ...], form: str
) -> None:
    ranks = tuple(max(rank // 2, 1) for rank in full_ranks(form, layer.weight.shape))
    chain = factorize(layer, form, ranks)
    assert chain.ranks == ranks
    assert sum(part.weight.numel() for part in chain.layers) == weight_entries(
        form, ranks, layer.weight.shape
    )
    x = torch.zeros(shape)
    assert chain_macs(chain.layers, shape) == count(chain, ModelInputs((x,))).macs
    assert chain_shapes(chain.layers, shape)[-1] == chain(x).shape == layer(x).shape
    assert (chain.layers[-1].bias is None) == (layer.bias is None)
    assert all(part.bias is None for part in chain.layers[:-1])


# The moment takes padding as zeros, and a 1×1 convolution as one without stride.
WITH_MOMENT = [
    pytest.param(layer, shape, form, id=f"{form}-{layer}")
    for layer, shape, form in CASES
    if isinstance(layer, nn.Linear)
    or (layer.padding_mode == "zeros" and (form != "svd" or max(layer.stride) == 1))
]


@pytest.mark.parametrize(("layer", "shape", "form"), WITH_MOMENT)
def test_the_moment_is_that_of_what_the_first_layer_reads(
    layer: nn.Module, shape: tuple[int, ...], form: str
) -> None:
    """The mean square of each of its outputs is vᵀ M v, before M is shrunk."""
    layer, x = copy.deepcopy(layer).double(), draw(*shape).cumsum(1)
    first = factorize(layer, form, full_ranks(form, layer.weight.shape)).layers[0]
    outputs = first(x) if isinstance(layer, nn.Linear) else first(x).movedim(1, -1)
    rows, weight = outputs.flatten(0, -2), first.weight.detach().flatten(1)
    moment = input_moment(layer, form, x)
    size = len(moment)
    share = size / (size + len(rows))
    unshrunk = (moment - share * moment.diagonal().mean() * torch.eye(size)) / (1 - share)
    squares = torch.einsum("rd,de,re->r", weight, unshrunk, weight)
    torch.testing.assert_close(squares, rows.square().mean(0))


def test_what_has_no_form_is_refused() -> None:
    for layer in (nn.Conv2d(4, 4, 3, groups=2), nn.ConvTranspose2d(4, 4, 3), nn.ReLU()):
        assert forms_of(layer) == ()
    with pytest.raises(SurgeryError, match=r"no low-rank form 'svd'.*tucker2, spatial"):
        factorize(nn.Conv2d(4, 4, 3), "svd", (2,))
    with pytest.raises(SurgeryError, match="Did you mean 'tucker2'"):
        full_ranks("tucker", (4, 4, 3, 3))


@pytest.mark.parametrize(("layer", "shape", "form"), CASES, ids=IDS)
@pytest.mark.parametrize("fraction", [0.25, 0.5, 0.75])
def test_ranks_are_the_largest_that_keep_a_fraction(
    layer: nn.Module, shape: tuple[int, ...], form: str, fraction: float
) -> None:
    size = layer.weight.shape
    ranks = ranks_for(form, size, fraction)
    assert weight_entries(form, ranks, size) <= fraction * layer.weight.numel()
    more = tuple(rank + 1 for rank in ranks)
    assert weight_entries(form, more, size) > fraction * layer.weight.numel()


def test_a_narrowed_layer_takes_what_it_has_or_stays_whole() -> None:
    assert settled_ranks("svd", (10,), (64, 64)) == (10,)
    assert settled_ranks("svd", (10,), (64, 8)) == ()  # 10 is cut to 8, and 8 saves nothing
    assert settled_ranks("svd", (6,), (64, 8)) == (6,)
    assert settled_ranks("tucker2", (8, 8), (16, 4, 3, 3)) == (8, 4)
    assert settled_ranks("svd", (0,), (64, 64)) == ()


def test_flags_types_and_modes_are_the_layers() -> None:
    layer = nn.Linear(6, 4).to(torch.bfloat16).requires_grad_(False).eval()
    chain = factorize(layer, "svd", (2,))
    assert not chain.training
    assert {p.dtype for p in chain.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in chain.parameters())
    assert chain.layers[-1].bias is not layer.bias


def test_a_chain_trains() -> None:
    chain = factorize(nn.Linear(6, 4), "svd", (2,)).train()
    chain(torch.ones(3, 6)).square().sum().backward()
    assert all(
        parameter.grad is not None and parameter.grad.any() for parameter in chain.parameters()
    )


def test_a_model_with_chains_is_rebuilt_from_json() -> None:
    model = TinyMLP()
    edited = copy.deepcopy(model)
    replace(edited, "fc2", factorize(edited.fc2, "svd", (4,)))
    rebuilt = rebuild(model, json.loads(json.dumps(diff(model, edited))))
    rebuilt.load_state_dict(edited.state_dict(), strict=True)
    assert isinstance(rebuilt.fc2, Factored)
    assert (rebuilt.fc2.form, rebuilt.fc2.ranks) == ("svd", (4,))
    x = torch.ones(2, 64)
    assert rebuilt(x).equal(edited(x))


def test_the_layers_of_a_chain_are_known_by_the_name_it_stands_for() -> None:
    model = TinyMLP()
    replace(model, "fc2", blank(model.fc2, "svd", (4,)))
    assert factor_names(model, "fc1") == ("fc1",)
    assert factor_names(model, "fc2") == ("fc2.first", "fc2.last")
