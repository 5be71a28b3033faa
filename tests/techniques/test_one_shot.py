"""One call prunes a copy to what was asked for, and the result is the masked model."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from compressor.errors import ConfigError, DataError, ModelError
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


def make_chain(*widths: int) -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for taken, made in itertools.pairwise(widths):
        layers += [nn.Linear(taken, made), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


@pytest.mark.slow
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_every_group_keeps_its_least_fraction_whatever_the_work_left(scope: Any) -> None:
    model = make_chain(8, 20, 20, 4)
    with torch.no_grad():
        model[2].weight.mul_(1e-3)  # ranked last: without a floor all of it would go first
    x = torch.randn(2, 8)
    found = prune(model, x, macs_fraction=0.45, scope=scope, least_fraction=0.5)
    assert all(len(kept) >= 10 for kept in found.kept.values())
    least = (8 * 10 + 10 * 10 + 10 * 4) / (8 * 20 + 20 * 20 + 20 * 4)
    with pytest.raises(ConfigError, match=f"cannot be reached.*least_fraction=0.5.* {least:.3f} "):
        prune(model, x, macs_fraction=0.3, scope=scope, least_fraction=0.5)


@pytest.mark.slow
def test_layers_are_ignored_by_name_by_themselves_and_by_every_name() -> None:
    model = make_chain(4, 8, 8, 8, 2)
    x = torch.randn(2, 4)
    by_name = prune(model, x, kept_fraction=0.5, ignored=["0"])
    by_module = prune(model, x, kept_fraction=0.5, ignored=[model[0]])
    assert by_name.kept == by_module.kept
    assert by_name.model[0].out_features == 8
    assert by_name.model[4].out_features == 4


@pytest.mark.slow
@pytest.mark.parametrize("name", ["2", "4"])
def test_a_layer_with_two_names_is_ignored_by_either(name: str) -> None:
    net = make_chain(4, 8, 8, 6, 2)
    tied = nn.Sequential(*net[:4], net[2], nn.Tanh(), *net[4:])  # "2" reads what it makes
    x = torch.randn(2, 4)
    assert prune(tied, x, kept_fraction=0.5).model[2].out_features == 4
    found = prune(tied, x, kept_fraction=0.5, ignored=[name]).model
    assert (found[2].out_features, found[6].out_features) == (8, 3)


@pytest.mark.parametrize(
    ("ignored", "message"),
    [
        ("0", "`ignored` is '0', not a list"),
        (nn.Linear(4, 8), "`ignored` is a Linear, not a list"),
        (
            ["layer1.0.conv_1"],
            r"no module 'layer1\.0\.conv_1' to ignore\. Did you mean 'layer1\.0\.conv1'",
        ),
        ([nn.Linear(4, 8)], "has a Linear that is no module of the model"),
        ([3], "has a int that is no module of the model"),
    ],
)
def test_what_cannot_be_ignored_is_refused(ignored: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        prune(make_model(), X, kept_fraction=0.5, ignored=ignored)


@pytest.mark.slow
@pytest.mark.parametrize("importance", ["taylor", "hessian"])
def test_a_backward_without_gradients_for_the_model_is_refused(importance: str) -> None:
    model = make_chain(4, 8, 2)
    x = torch.randn(2, 4)
    for wrong in (lambda _: None, lambda _: model(x).sum().backward()):
        with pytest.raises(ConfigError, match=f"importance='{importance}' needs them"):
            prune(model, x, kept_fraction=0.5, importance=importance, backward=wrong)


@pytest.mark.slow
@pytest.mark.parametrize("importance", ["l2", "activation", "taylor"])
def test_inference_mode_changes_nothing(importance: str) -> None:
    model = make_chain(4, 8, 2)
    x = torch.randn(2, 4)

    def backward(model: nn.Module) -> None:
        model(x).logsumexp(1).sum().backward()

    def call(inputs: torch.Tensor) -> Any:
        return prune(model, inputs, macs_fraction=0.5, importance=importance, backward=backward)

    expected = call(x)
    with torch.inference_mode():
        found = call(x.clone())  # made in it, as images from a loader are
    assert found.kept == expected.kept
    assert found.macs_fraction == expected.macs_fraction
    found.model(x).sum().backward()  # its tensors are ordinary ones


class Table(nn.Module):
    """Looks up and adds: channels, and nothing that multiplies."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(10, 8)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.words(tokens).tanh().sum(-1)


@pytest.mark.slow
def test_a_model_without_multiplications_is_pruned_by_channels_alone() -> None:
    tokens = torch.arange(6).reshape(2, 3)
    found = prune(Table(), tokens, kept_fraction=0.5)
    assert found.model.words.embedding_dim == 4
    assert (found.macs_fraction, found.params_fraction) == (1.0, 0.5)
    with pytest.raises(ModelError, match="Give kept_fraction"):
        prune(Table(), tokens, macs_fraction=0.5)


@pytest.mark.slow
def test_widths_that_allow_no_cut_are_an_error() -> None:
    model = make_chain(4, 16, 12, 2)
    x = torch.randn(2, 4)
    with pytest.raises(ConfigError, match=r"widest group, '0'.* 16 channels.* multiples of 16 "):
        prune(model, x, kept_fraction=0.5, round_to=16)
    assert prune(model, x, kept_fraction=1.0, round_to=16).macs_fraction == 1


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
def test_torchscript_is_refused_with_the_way_out() -> None:
    net = make_chain(4, 8, 2)
    traced = torch.jit.trace(net, torch.randn(2, 4))
    for model, where in ((traced, "The model"), (nn.Sequential(net, traced), "Its module '1'")):
        with pytest.raises(ModelError, match=f"{where} is TorchScript.* Give the module itself"):
            prune(model, torch.randn(2, 4), kept_fraction=0.5)


def test_a_lazy_layer_that_has_not_run_is_refused_with_the_way_out() -> None:
    net = nn.Sequential(nn.LazyLinear(8), nn.ReLU(), nn.Linear(8, 2))
    with pytest.raises(ModelError, match=r"'0' is a LazyLinear without sizes.* Run the model once"):
        prune(net, torch.randn(2, 4), kept_fraction=0.5)


@pytest.mark.slow
def test_a_fraction_that_cannot_be_reached_says_how_far_it_goes() -> None:
    with pytest.raises(ConfigError, match=r"macs_fraction=0\.01 cannot be reached.* 0\.\d+ are"):
        prune(TinyMLP(), torch.randn(2, 64), macs_fraction=0.01, least_fraction=0.9)


@pytest.mark.slow
def test_a_model_without_channels_to_remove_is_an_error() -> None:
    for model in (nn.Linear(4, 2), make_chain(4, 1, 2)):
        with pytest.raises(ModelError, match="no channels that can be removed") as caught:
            prune(model, torch.randn(2, 4), kept_fraction=0.5)
        assert ".." not in str(caught.value)
        assert ".;" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "Give one of the two"),
        ({"kept_fraction": 0.5, "macs_fraction": 0.5}, "Give one of the two"),
        ({"kept_fraction": 1.5}, r"kept_fraction=1\.5"),
        ({"macs_fraction": 0.0}, r"macs_fraction=0\.0"),
        ({"kept_fraction": 0.5, "importance": "l3"}, "importance='l3' is unknown"),
        ({"kept_fraction": 0.5, "importance": "L2"}, "importance='L2' .* Did you mean 'l2'"),
        ({"kept_fraction": 0.5, "importance": "taylor"}, "Give `backward`"),
        ({"kept_fraction": 0.5, "scope": "locl"}, "no scope 'locl'"),
        ({"kept_fraction": 0.5, "round_to": 0}, "round_to=0"),
        ({"kept_fraction": 0.5, "least_fraction": 1.0}, r"least_fraction=1\.0"),
        ({"macs_fraction": 0.5, "least_fraction": -0.1}, r"least_fraction=-0\.1"),
    ],
)
def test_what_cannot_be_meant_is_refused(options: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        prune(nn.Identity(), X, **options)


def test_what_was_pruned_prints_in_one_line() -> None:
    """It printed the model and every kept channel, twelve thousand characters."""
    found = prune(TinyMLP(64, 32), torch.randn(4, 64), kept_fraction=0.5)
    macs = (64 * 32 + 32 * 32 + 32 * 10) / (64 * 16 + 16 * 16 + 16 * 10)
    assert f"Pruned({macs:.1f}x fewer MACs, " in str(found)
    assert "2 of 2 channel groups pruned" in repr(found)
    assert len(str(found)) < 150


def test_a_loader_is_no_call() -> None:
    loader = DataLoader(TensorDataset(X), batch_size=2)
    with pytest.raises(DataError, match=r"^The inputs are a DataLoader, .* next\(iter\(loader\)\)"):
        prune(make_model(), loader, kept_fraction=0.5)


def test_a_class_is_no_model() -> None:
    with pytest.raises(ModelError, match=r"`model` is the class TinyResNet itself"):
        prune(TinyResNet, X, kept_fraction=0.5)  # type: ignore[arg-type]
