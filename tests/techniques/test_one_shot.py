"""One call prunes a copy to what was asked for, and the result is the masked model."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from compressor.errors import ConfigError, ModelError
from compressor.interfaces.inputs import ModelInputs
from compressor.profiling.counts import count
from compressor.structure.scores import CRITERIA
from compressor.techniques.one_shot import prune
from compressor.testing.models import TinyMLP, TinyResNet

X = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return TinyResNet().eval()


def backward(model: nn.Module) -> None:
    for batch in X.split(2):
        model(batch).logsumexp(1).sum().backward()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("importance", "scope"),
    [("l2", "layer"), ("l2", "isomorphic"), *((criterion, "global") for criterion in CRITERIA)],
)
def test_the_multiply_accumulates_fall_to_the_fraction(importance: str, scope: Any) -> None:
    model = make_model()
    before = copy.deepcopy(model.state_dict())
    found = prune(
        model, X, macs_fraction=0.5, importance=importance, scope=scope, backward=backward
    )
    inputs = ModelInputs((X,))
    ratio = count(found.model, inputs).macs / count(model, inputs).macs
    assert ratio == found.macs_fraction <= 0.5
    assert ratio > 0.4  # not more than needed, by steps of single channels
    assert found.params_fraction < 1
    assert found.model(X).shape == (4, 10)
    assert all(model.state_dict()[name].equal(value) for name, value in before.items())


class Stages(nn.Sequential):
    """Pairs of layers of three widths: rounded to 8, each width changes at once in all its pairs.

    On ResNet-56, half of the work asked for was 0.36 of it with equal fractions.
    """

    def __init__(self) -> None:
        super().__init__()
        for width in (16, 32, 64):
            self.extend([nn.LazyConv2d(width, 3, 2, padding=1), nn.ReLU()])
            for _ in range(5):
                self.extend([nn.Conv2d(width, width, 3, padding=1), nn.ReLU()])
        self.extend([nn.Flatten(), nn.LazyLinear(10)])


@pytest.mark.slow
@pytest.mark.parametrize("fraction", [0.5, 0.4, 0.25])
@pytest.mark.parametrize("scope", ["layer", "isomorphic", "global"])
def test_coarse_widths_use_what_is_allowed(scope: Any, fraction: float) -> None:
    torch.manual_seed(0)
    model = Stages()
    images = torch.randn(2, 3, 32, 32)
    model(images)  # gives the lazy layers their sizes
    found = prune(model, images, macs_fraction=fraction, scope=scope, round_to=8)
    assert 0.97 * fraction <= found.macs_fraction <= fraction
    widths = [m.out_channels for m in found.model.modules() if isinstance(m, nn.Conv2d)]
    assert all(width % 8 == 0 for width in widths)


@pytest.mark.slow
def test_the_pruned_model_is_the_model_with_the_channels_masked() -> None:
    model = make_model()
    found = prune(model, X, kept_fraction=0.6, scope="global")
    masked = copy.deepcopy(model)
    with torch.no_grad():
        for group in found.channels.groups:
            for member in group.consumers:
                entries = [e for c in group.pruned(found.kept[group.name]) for e in member.index[c]]
                masked.get_parameter(member.tensor).index_fill_(
                    member.dim, torch.tensor(entries, dtype=torch.long), 0.0
                )
    torch.testing.assert_close(found.model(X), masked(X), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_widths_are_rounded_and_ignored_layers_keep_theirs() -> None:
    model = make_model()
    found = prune(model, X, kept_fraction=0.6, round_to=8, ignored=["layer1"])
    assert found.model.layer1[0].conv1.out_channels == 16  # inside of what is ignored
    assert found.model.conv1.out_channels == 16  # runs through it
    widths = [m.out_channels for m in found.model.modules() if isinstance(m, nn.Conv2d)]
    assert all(width % 8 == 0 for width in widths)
    assert min(widths) < 32


@pytest.mark.slow
def test_a_fraction_that_cannot_be_reached_says_how_far_it_goes() -> None:
    with pytest.raises(ConfigError, match=r"macs_fraction=0\.01 cannot be reached.* 0\.\d+ are"):
        prune(TinyMLP(), torch.randn(2, 64), macs_fraction=0.01, least_fraction=0.9)


@pytest.mark.slow
def test_a_model_without_channels_to_remove_is_an_error() -> None:
    with pytest.raises(ModelError, match="no channels that can be removed"):
        prune(nn.Linear(4, 2), torch.randn(2, 4), kept_fraction=0.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "Give one of the two"),
        ({"kept_fraction": 0.5, "macs_fraction": 0.5}, "Give one of the two"),
        ({"kept_fraction": 1.5}, r"kept_fraction=1\.5"),
        ({"macs_fraction": 0.0}, r"macs_fraction=0\.0"),
        ({"kept_fraction": 0.5, "importance": "l3"}, "importance='l3' is unknown"),
        ({"kept_fraction": 0.5, "importance": "taylor"}, "Give `backward`"),
        ({"kept_fraction": 0.5, "scope": "locl"}, "no scope 'locl'"),
        ({"kept_fraction": 0.5, "round_to": 0}, "round_to=0"),
    ],
)
def test_what_cannot_be_meant_is_refused(options: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        prune(nn.Identity(), X, **options)
