from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from compressor.errors import ConfigError, ModelError, SurgeryError
from compressor.structure.describe import diff, rebuild
from compressor.training.algorithms.weight_standardization import (
    apply_weight_standardization,
    standardize_weight,
)


def images() -> Tensor:
    return torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(0))


def make_net() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.ReLU(), nn.Conv2d(8, 4, 3, bias=False)
        )


def test_each_filter_has_mean_0_and_variance_1() -> None:
    weight = 5 + 3 * torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(0))
    for row, filter in zip(standardize_weight(weight), weight, strict=True):
        expected = (filter - filter.mean()) / filter.std(correction=0)
        torch.testing.assert_close(row, expected)


def test_what_is_standardized_stays_so() -> None:
    weight = torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    once = standardize_weight(weight)
    torch.testing.assert_close(standardize_weight(once), once)


def test_a_constant_filter_becomes_0_and_its_gradient_is_finite() -> None:
    weight = torch.ones(1, 2, 3, 3, requires_grad=True)
    made = standardize_weight(weight)
    made.sum().backward()
    assert torch.equal(made, torch.zeros_like(made))
    assert weight.grad is not None
    assert torch.isfinite(weight.grad).all()


def test_the_weights_are_the_same_objects_under_other_names() -> None:
    model = make_net()
    weights = [model[0].weight, model[3].weight]
    edit = apply_weight_standardization(model)
    names = [f"{place}.parametrizations.weight.original" for place in (0, 3)]
    parameters = dict(model.named_parameters())
    assert all(parameters[n] is weight for n, weight in zip(names, weights, strict=True))
    assert edit.added == frozenset(names)
    assert edit.removed == {"0.weight", "3.weight"}


def test_behind_a_norm_the_length_of_filters_does_not_matter() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8, eps=1e-12))
    with torch.no_grad():  # of mean 0 already, so that only the length changes
        model[0].weight -= model[0].weight.mean((1, 2, 3), keepdim=True)
    before = model(images())
    apply_weight_standardization(model)
    torch.testing.assert_close(model(images()), before, rtol=1e-4, atol=1e-5)


def test_last_layers_can_be_left_out() -> None:
    model = make_net()
    apply_weight_standardization(model, n_last_layers_ignore=1)
    assert parametrize.is_parametrized(model[0])
    assert not parametrize.is_parametrized(model[3])


def test_done_twice_is_done_once() -> None:
    model = make_net()
    apply_weight_standardization(model)
    keys = list(model.state_dict())
    apply_weight_standardization(model)
    assert list(model.state_dict()) == keys
    assert len(model[0].parametrizations.weight) == 1


def test_baked_in_it_is_a_plain_convolution_that_computes_the_same() -> None:
    model = make_net()
    apply_weight_standardization(model)
    expected = model(images())
    for place in (0, 3):
        parametrize.remove_parametrizations(model[place], "weight")
    assert type(model[0]) is nn.Conv2d
    assert model.state_dict().keys() == make_net().state_dict().keys()
    torch.testing.assert_close(model(images()), expected)


def test_the_structure_is_rebuilt_from_a_file() -> None:
    model = make_net()
    apply_weight_standardization(model)
    model[0].parametrizations.weight.original.requires_grad_(False)
    new = rebuild(make_net(), json.loads(json.dumps(diff(make_net(), model))))
    assert list(new.state_dict()) == list(model.state_dict())
    new.load_state_dict(model.state_dict())
    assert torch.equal(new(images()), model(images()))
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    assert flags == {name: p.requires_grad for name, p in new.named_parameters()}


def test_a_parametrization_from_two_parameters_cannot_go_into_a_file() -> None:
    model = nn.Sequential(nn.Linear(3, 2))
    nn.utils.parametrizations.weight_norm(model[0])
    with pytest.raises(ModelError, match=r"'0\.weight' is computed .* Bake it in first"):
        diff(nn.Sequential(nn.Linear(3, 2)), model)


def test_what_cannot_be_meant_is_refused() -> None:
    with pytest.raises(ConfigError, match="n_last_layers_ignore=-1"):
        apply_weight_standardization(make_net(), -1)
    with pytest.raises(ModelError, match="has 2 convolutions of which 2 are left out"):
        apply_weight_standardization(make_net(), 2)
    model = make_net()
    nn.utils.parametrizations.weight_norm(model[3])
    keys = list(model.state_dict())
    with pytest.raises(SurgeryError, match=r"'3\.weight' is computed by a parametrization"):
        apply_weight_standardization(model)
    assert list(model.state_dict()) == keys
