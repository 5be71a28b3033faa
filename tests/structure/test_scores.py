"""Scores of whole groups, and what the criteria need to see for them."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from torch import Tensor, nn

from compressor.errors import ConfigError
from compressor.interfaces.inputs import ModelInputs
from compressor.structure.groups import ChannelGroup, Member
from compressor.structure.layers import layer_members
from compressor.structure.observing import mean_activations, mean_squared_gradients, observe
from compressor.structure.scores import CRITERIA, Observed, group_importance
from compressor.testing.models import TinyMLP

FOUR = tuple((i,) for i in range(4))
PAIRS = tuple((2 * i, 2 * i + 1) for i in range(4))


def group_of(
    model: nn.Module, *sides: tuple[str, Literal["out", "in"], tuple[tuple[int, ...], ...]]
) -> ChannelGroup:
    members = [
        member
        for name, side, index in sides
        for member in layer_members(name, model.get_submodule(name), side, index)
    ]
    return ChannelGroup(sides[0][0], len(sides[0][2]), tuple(members))


def three_layers() -> tuple[nn.Module, ChannelGroup]:
    """A convolution whose four channels a norm scales; a linear layer reads them twice each."""
    torch.manual_seed(0)
    model = nn.ModuleDict(
        {"conv": nn.Conv2d(3, 4, 2), "norm": nn.BatchNorm2d(4), "linear": nn.Linear(8, 2)}
    )
    with torch.no_grad():
        model["norm"].weight.copy_(torch.tensor([1.0, -4.0, 2.0, 3.0]))
    return model, group_of(
        model, ("conv", "out", FOUR), ("norm", "out", FOUR), ("linear", "in", PAIRS)
    )


def test_a_group_is_the_mean_over_its_weights_each_relative_to_its_mean() -> None:
    """What makes, scales and reads the channels counts; biases and statistics do not."""
    model, group = three_layers()
    conv, norm, linear = model["conv"].weight, model["norm"].weight, model["linear"].weight
    raw = [
        [float(conv[c].detach().norm()) for c in range(4)],
        [abs(norm[c].item()) for c in range(4)],
        [float(linear[:, 2 * c : 2 * c + 2].detach().norm()) for c in range(4)],
    ]
    by_hand = [sum(row[c] / (sum(row) / 4) for row in raw) / 3 for c in range(4)]
    assert group_importance(model, group, "l2").tolist() == pytest.approx(by_hand)
    with torch.no_grad():
        model["conv"].weight *= 100
        model["conv"].bias *= 100
    assert group_importance(model, group, "l2").tolist() == pytest.approx(by_hand)


@pytest.mark.parametrize(
    ("layer", "dim"),
    [(nn.Embedding(5, 4), 1), (nn.ConvTranspose2d(3, 4, 2), 1), (nn.Linear(3, 4), 0)],
)
def test_channels_are_found_in_whatever_dimension_the_layer_holds_them(
    layer: nn.Module, dim: int
) -> None:
    model = nn.Sequential(layer)
    with torch.no_grad():
        layer.weight.select(dim, 2).mul_(100)
    assert group_importance(model, group_of(model, ("0", "out", FOUR)), "l1").argmax() == 2


def test_a_parameter_outside_of_any_layer_counts() -> None:
    model = nn.Module()
    model.position = nn.Parameter(torch.tensor([[[1.0, 9.0, 2.0, 3.0]]]))
    group = ChannelGroup("position", 4, (Member("position", 2, "out", FOUR, 4),))
    assert group_importance(model, group, "l2").argsort().tolist() == [0, 2, 3, 1]


def test_channels_of_unequal_numbers_of_entries_are_scored() -> None:
    model = nn.Sequential(nn.Linear(1, 4))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0], [2.0], [3.0], [4.0]]))
    member = Member("0.weight", 0, "out", ((0,), (1, 2, 3)), 4)
    scores = group_importance(model, ChannelGroup("0", 2, (member,)), "l1")
    assert scores.tolist() == pytest.approx([1 / 5, 9 / 5])


def test_bn_scale_reads_the_norm_alone() -> None:
    model, group = three_layers()
    assert group_importance(model, group, "bn_scale").tolist() == pytest.approx(
        [1 / 2.5, 4 / 2.5, 2 / 2.5, 3 / 2.5]
    )


def test_lamp_is_taken_of_the_whole_group() -> None:
    model, group = three_layers()
    lamp = group_importance(model, group, "lamp")
    assert float(lamp.max()) == pytest.approx(1.0)
    assert float(lamp.mean()) < 1


@pytest.mark.parametrize("criterion", CRITERIA)
def test_what_a_criterion_cannot_score_is_scored_by_l2(criterion: str) -> None:
    """No gradients, no activations, and no norm."""
    model = nn.Sequential(nn.Linear(3, 4))
    group = group_of(model, ("0", "out", FOUR))
    scores = group_importance(model, group, criterion)
    if criterion in ("bn_scale", "taylor", "hessian", "activation"):
        assert scores.equal(group_importance(model, group, "l2"))
    else:
        assert scores.shape == (4,)


def test_an_unknown_criterion_names_the_nearest() -> None:
    model, group = three_layers()
    with pytest.raises(ConfigError, match="Did you mean 'taylor'"):
        group_importance(model, group, "tailor")


BATCHES = torch.randn(3, 2, 64, generator=torch.Generator().manual_seed(1))


def backward(model: nn.Module) -> None:
    for batch in BATCHES:
        model(batch).square().sum().backward()


def gradient_of(model: nn.Module, batch: Tensor, name: str) -> Tensor:
    (gradient,) = torch.autograd.grad(model(batch).square().sum(), [model.get_parameter(name)])
    return gradient


def test_gradients_are_those_of_all_batches_together() -> None:
    model = TinyMLP()
    model.fc1.requires_grad_(False)
    observed = observe(model, "taylor", ModelInputs((BATCHES[0],)), backward)
    by_hand = sum(gradient_of(model, batch, "fc2.weight") for batch in BATCHES)
    torch.testing.assert_close(observed.gradients["fc2.weight"], by_hand)
    assert "fc1.weight" in observed.gradients  # frozen for training, not for this
    assert all(parameter.grad is None for parameter in model.parameters())


def test_squares_are_taken_of_each_batch_and_averaged() -> None:
    model = TinyMLP()
    squares = mean_squared_gradients(model, backward)
    by_hand = sum(gradient_of(model, batch, "fc2.weight").square() for batch in BATCHES) / 3
    torch.testing.assert_close(squares["fc2.weight"], by_hand)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_activations_are_mean_magnitudes_by_channel() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(16, 3))
    x = torch.randn(5, 1, 4, 4)
    found = mean_activations(model, ModelInputs((x,)))
    torch.testing.assert_close(found["0"], model[0](x).abs().mean((0, 2, 3)))
    torch.testing.assert_close(found["2"], model(x).abs().mean(0))
    assert "1" not in found


def test_a_channel_that_is_never_active_goes_first() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)).eval()
    with torch.no_grad():
        model[0].weight[2] *= 10  # large weights,
        model[1].weight[2] = 0  # and nothing of them arrives
    group = group_of(model, ("1", "out", FOUR), ("2", "in", FOUR))
    observed = observe(model, "activation", ModelInputs((torch.randn(2, 1, 4, 4),)), None)
    assert group_importance(model, group, "activation", observed).argmin() == 2


def test_what_needs_nothing_runs_nothing() -> None:
    assert observe(nn.Identity(), "l1", ModelInputs(), None) == Observed()
