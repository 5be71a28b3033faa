"""Folded models against the ones they were folded from, in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compressor.errors import ModelError
from compressor.interfaces.inputs import ModelInputs
from compressor.structure.fusion import Fusion, fold, fold_batchnorm, folded
from compressor.structure.surgery import Skip
from compressor.testing.models import CifarResNet, TinyResNet


def worn(model: nn.Module) -> nn.Module:
    """`model` in float64, with norms that are not the identity."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        for name in ("weight", "bias", "running_mean", "running_var"):
            tensor = getattr(module, name, None)
            if "Norm" in type(module).__name__ and tensor is not None:
                tensor.data.uniform_(0.5, 2, generator=generator)
    return model.double().eval()


def sample(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


LAYERS: list[tuple[Callable[[], list[nn.Module]], tuple[int, ...]]] = [
    (
        lambda: [nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(6)],
        (2, 4, 7, 7),
    ),
    (lambda: [nn.Conv2d(4, 6, 3, groups=2), nn.BatchNorm2d(6)], (2, 4, 7, 7)),
    (lambda: [nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6, affine=False)], (2, 4, 7)),
    (lambda: [nn.Conv3d(2, 3, 2), nn.BatchNorm3d(3)], (2, 2, 4, 4, 4)),
    (lambda: [nn.ConvTranspose2d(4, 6, 3, groups=2), nn.BatchNorm2d(6)], (2, 4, 5, 5)),
    (lambda: [nn.Linear(4, 6, bias=False), nn.BatchNorm1d(6)], (3, 4)),
]


@pytest.mark.parametrize(("make", "shape"), LAYERS)
def test_a_layer_takes_in_the_norm_behind_it(
    make: Callable[[], list[nn.Module]], shape: tuple[int, ...]
) -> None:
    model = worn(nn.Sequential(*make(), nn.ReLU()))
    x = sample(*shape)
    expected = model(x)
    assert fold(model, ModelInputs((x,))) == Fusion((("0", "1"),), ())
    assert [type(module) for module in model.children()][1:] == [nn.ReLU]
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)


def test_the_frozen_norm_of_torchvision_is_folded() -> None:
    from torchvision import ops

    model = worn(nn.Sequential(nn.Conv2d(4, 6, 3), ops.FrozenBatchNorm2d(6)))
    x = sample(2, 4, 7, 7)
    expected = model(x)
    assert fold(model, ModelInputs((x,))).folded == (("0", "1"),)
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)


def test_scale_and_shift_act_on_output_channels() -> None:
    weight, bias, scale, shift = sample(3, 2), sample(3), sample(3), sample(3)
    new_weight, new_bias = fold_batchnorm(weight, bias, scale, shift)
    x = sample(5, 2)
    by_hand = torch.stack([(x @ weight[i] + bias[i]) * scale[i] + shift[i] for i in range(3)], 1)
    torch.testing.assert_close(x @ new_weight.T + new_bias, by_hand)


@pytest.mark.parametrize("make", [TinyResNet, lambda: CifarResNet(8)])
def test_every_norm_of_a_resnet_goes(make: Callable[[], nn.Module]) -> None:
    model = worn(make())
    x = sample(2, 1 if isinstance(model, TinyResNet) else 3, 32, 32)
    expected = model(x)
    norms = sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    assert len(fold(model, ModelInputs((x,))).folded) == norms
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-10)


def test_after_the_with_the_model_trains_as_if_nothing_had_been() -> None:
    model, twin = (worn(TinyResNet()) for _ in range(2))
    twin.load_state_dict(model.state_dict())
    before = dict(model.named_parameters())
    x = sample(4, 1, 8, 8)
    model.train(), twin.train()
    with folded(model, ModelInputs((x,))) as fusion:
        assert fusion.folded
        assert len(dict(model.named_parameters())) < len(before)
    after = dict(model.named_parameters())
    assert before.keys() == after.keys()
    assert all(after[name] is parameter for name, parameter in before.items())
    for net in (model, twin):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        for _ in range(2):
            optimizer.zero_grad()
            net(x).square().mean().backward()
            optimizer.step()
    assert all(model.state_dict()[key].equal(value) for key, value in twin.state_dict().items())


class Reads(nn.Module):
    """A convolution and a norm behind it, with something in the way of a fold."""

    def __init__(self, trait: str) -> None:
        super().__init__()
        self.trait = trait
        self.conv = nn.Conv2d(4, 4, 1)
        self.bn = nn.BatchNorm2d(4, track_running_stats=trait != "batch statistics")
        self.good = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
        if trait == "tied":
            self.good[0].weight = self.conv.weight
        if trait == "parametrized":
            nn.utils.parametrizations.weight_norm(self.conv)

    def forward(self, x: Tensor) -> Tensor:
        x = self.good(x)
        y = self.conv(x)
        if self.trait == "in place":
            F.relu_(y)
        z = self.bn(y)
        if self.trait == "read twice":
            z = z + y
        if self.trait == "called twice":
            z = z + self.bn(self.conv(z))
        if self.trait == "norm read":
            z = z * self.bn.weight.sum()
        return z


TRAITS = ["batch statistics", "parametrized", "in place", "read twice", "called twice", "norm read"]


@pytest.mark.parametrize("trait", TRAITS)
def test_what_is_in_the_way_of_one_fold_leaves_the_others(trait: str) -> None:
    model = worn(Reads(trait))
    x = sample(2, 4, 3, 3)
    expected = model(x)
    assert fold(model, ModelInputs((x,))).folded == (("good.0", "good.1"),)
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)


def test_tied_weights_are_not_folded() -> None:
    model = worn(Reads("tied"))
    assert fold(model, ModelInputs((sample(2, 4, 3, 3),))).folded == ()


def test_a_norm_over_another_dimension_is_not_the_layers() -> None:
    model = worn(nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6)))
    assert fold(model, ModelInputs((sample(2, 6, 4),))).folded == ()


def test_idle_modules_are_left_out() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(
                nn.Linear(4, 4), nn.Identity(), nn.Dropout(), Skip(), nn.ReLU()
            )
            self.dropout = nn.Dropout()

        def forward(self, x: Tensor) -> Tensor:
            return self.dropout(self.body(x))

    net = Net().double().eval()
    x = sample(2, 4)
    expected = net(x)
    fusion = fold(net, ModelInputs((x,)))
    assert fusion.removed == ("body.1", "body.2", "body.3", "dropout")
    assert [type(module) for module in net.modules()][1:] == [
        nn.Sequential,
        nn.Linear,
        nn.ReLU,
        nn.Identity,
    ]
    assert net(x).equal(expected)


def test_modules_that_are_found_by_position_stay() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Identity(), nn.Linear(4, 4), nn.Tanh())

        def forward(self, x: Tensor) -> Tensor:
            return self.body[1](x)

    net = Net().double().eval()
    expected = net(x := sample(2, 4))
    assert fold(net, ModelInputs((x,))).removed == ()
    assert net(x).equal(expected)


def test_a_model_that_insists_on_float32_is_folded_too() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.bn(self.conv(x.float()))

    net = worn(Net()).float()
    x = sample(2, 2, 3, 3).float()
    expected = net(x)
    assert fold(net, ModelInputs((x,))).folded == (("conv", "bn"),)
    torch.testing.assert_close(net(x), expected)


def test_a_model_that_does_not_run_is_left_alone() -> None:
    model = TinyResNet()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ModelError, match="does not run"):
        fold(model, ModelInputs((sample(2, 3),)))
    assert model.state_dict().keys() == before.keys()
