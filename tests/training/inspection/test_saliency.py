"""Input gradients against differences, and without a trace on the model."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from compressor.errors import ModelError
from compressor.training.inspection.saliency import input_gradients


def make_net() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten(),
            nn.Dropout(0.5), nn.Linear(4 * 3 * 3, 3),
        )  # fmt: skip


def make_images(samples: int = 2) -> Tensor:
    return torch.randn(samples, 2, 3, 3, generator=torch.Generator().manual_seed(1))


def test_map_is_the_largest_difference_of_a_channel() -> None:
    net = make_net().double()
    images, targets = make_images().double(), torch.tensor([2, 0])
    maps = input_gradients(net, images, targets)
    net.eval()
    slopes = torch.zeros_like(images)
    step = 1e-5
    for place in range(images.numel()):
        offset = torch.zeros(images.numel(), dtype=torch.float64)
        offset[place] = step
        offset = offset.view_as(images)
        with torch.no_grad():
            change = (net(images + offset) - net(images - offset)) / (2 * step)
        slopes += (offset / step) * change.gather(1, targets[:, None]).view(-1, 1, 1, 1)
    expected = slopes.abs().amax(1)
    expected /= expected.amax((1, 2), keepdim=True)
    torch.testing.assert_close(maps.double(), expected, atol=1e-5, rtol=0)  # maps are float32


def test_map_of_a_linear_score_is_its_weight() -> None:
    weight = torch.tensor([[1.0, -2.0, 0.0, 4.0], [8.0, 0.0, 0.0, 2.0]])
    maps = input_gradients(
        lambda x: x.flatten(1) @ weight.T, torch.ones(2, 2, 2), torch.tensor([0, 1])
    )
    assert maps.tolist() == [[[0.25, 0.5], [0.0, 1.0]], [[1.0, 0.0], [0.0, 0.25]]]


def test_gradients_modes_flags_and_statistics_stay() -> None:
    net = make_net().train()
    net[1].eval()
    net[0].weight.requires_grad_(False)
    net[5].weight.grad = torch.full_like(net[5].weight, 7.0)
    images = make_images()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with torch.inference_mode():
        input_gradients(net, images, torch.tensor([0, 1]))
    assert [module.training for module in net] == [True, False, True, True, True, True]
    assert not net[0].weight.requires_grad
    assert net[5].weight.requires_grad
    assert torch.equal(net[5].weight.grad, torch.full_like(net[5].weight, 7.0))
    assert net[0].bias.grad is None
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert not images.requires_grad


def test_a_score_that_nothing_moves_has_an_empty_map() -> None:
    maps = input_gradients(lambda x: x.flatten(1) * 0, torch.ones(1, 1, 1, 2), torch.tensor([0]))
    assert maps.tolist() == [[[0.0, 0.0]]]


@pytest.mark.parametrize(
    ("call", "images"),
    [
        (lambda x: x.detach().flatten(1), torch.ones(1, 1, 1, 2)),
        (lambda x: torch.ones(1, 2, requires_grad=True), torch.ones(1, 1, 1, 2)),
        (lambda x: x.flatten(1).float(), torch.ones(1, 1, 1, 2, dtype=torch.uint8)),
    ],
)
def test_outputs_without_a_gradient_are_refused(call: object, images: Tensor) -> None:
    with pytest.raises(ModelError, match=r"no gradient|differentiably"):
        input_gradients(call, images, torch.tensor([0]))  # type: ignore[arg-type]
