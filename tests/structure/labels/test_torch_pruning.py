"""The groups are torch-pruning's where torch-pruning is right; where it is not, ours still are."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import torchvision.models as tv
from torch import Tensor, nn
from torch.nn import functional as F

from compressor.interfaces.inputs import ModelInputs
from compressor.structure.channels import find_groups
from compressor.structure.check import IS_OUTPUT, Check
from compressor.structure.dependency import candidate_groups
from compressor.structure.groups import ChannelGroup
from compressor.structure.trace import FORWARD_FAILURES
from compressor.testing.models import CifarResNet, TiedModel, TinyMLP, TinyResNet
from tests.structure.labels.nets import Net, assert_prunes_exactly, rows, tokens

Channel = frozenset[tuple[str, str, frozenset[int]]]


class UNet(nn.Module):
    """Down, up, and what was before joined to what comes back."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU())
        self.down = nn.Conv2d(6, 10, 3, 2, padding=1)
        self.middle = nn.Conv2d(10, 10, 3, padding=1)
        self.up = nn.ConvTranspose2d(10, 6, 2, 2)
        self.last = nn.Sequential(nn.Conv2d(12, 5, 3, padding=1), nn.ReLU(), nn.Conv2d(5, 2, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        low = F.relu(self.middle(F.relu(self.down(x))))
        out: Tensor = self.last(torch.cat([x, self.up(low)], 1))
        return out


class Inverted(nn.Module):
    """A block of MobileNetV2: expand, depthwise, project, add."""

    def __init__(self, width: int, expanded: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(width, expanded, 1, bias=False),
            nn.BatchNorm2d(expanded),
            nn.ReLU6(),
            nn.Conv2d(expanded, expanded, 3, padding=1, groups=expanded, bias=False),
            nn.BatchNorm2d(expanded),
            nn.ReLU6(),
            nn.Conv2d(expanded, width, 1, bias=False),
            nn.BatchNorm2d(width),
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.layers(x)
        return out


def mobilenet() -> nn.Module:
    pool = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3))
    return nn.Sequential(nn.Conv2d(3, 6, 3, 2), Inverted(6, 12), Inverted(6, 9), *pool)


def vgg() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(4, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(6 * 4, 8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 3)),
    )


def densenet() -> nn.Module:
    return tv.DenseNet(4, (2, 2), num_init_features=8, bn_size=2, num_classes=3)


def channels_of(groups: Iterable[ChannelGroup]) -> set[Channel]:
    """Each channel as what is cut: the layers, the sides and the entries."""
    return {
        frozenset((m.module, m.side, frozenset(m.index[channel])) for m in group.members)
        for group in groups
        for channel in range(group.size)
    }


def theirs(model: nn.Module, inputs: ModelInputs) -> tuple[list[ChannelGroup], dict[str, str]]:
    """The groups of torch-pruning that do not reach an output, and the faults of the others."""
    check = Check(model, inputs)
    found = candidate_groups(check.probe, check.inputs)
    check.probe.requires_grad_(False)
    groups = [candidate.group for candidate in found if candidate.group is not None]
    faults = check.faults(groups)
    refused = {c.name: c.reason for c in found if c.group is None}
    inner = [group for group in groups if faults.get(group.name) != IS_OUTPUT]
    return inner, refused | {n: why for n, why in faults.items() if why != IS_OUTPUT}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (TinyMLP, (2, 64)),
        (TinyResNet, (2, 1, 8, 8)),
        (vgg, (2, 3, 8, 8)),
        (mobilenet, (2, 3, 8, 8)),
        (UNet, (2, 3, 8, 8)),
        (densenet, (2, 3, 32, 32)),
        (lambda: Net(_twice, **convs(16)), (2, 3, 4, 4)),
    ],
)
def test_both_find_the_same_channels(make: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model, inputs = make(), rows(*shape)
    ours = find_groups(model, inputs)
    groups, faults = theirs(model, inputs)
    assert faults == {}
    assert ours.quarantined == ()
    assert channels_of(ours.groups) == channels_of(groups)


def _shuffle(m: Any, x: Tensor) -> Tensor:
    x = m.a(x)
    n, c, h, w = x.shape
    out: Tensor = m.b(x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w))
    return out


def _twice(m: Any, x: Tensor) -> Tensor:
    x = m.a(x)
    out: Tensor = m.b(torch.cat([x, x], 1))
    return out


def convs(width: int) -> dict[str, nn.Module]:
    return {"a": nn.Conv2d(3, 8, 1), "b": nn.Conv2d(width, 2, 1)}


DIFFERENCES: dict[str, tuple[Callable[[], nn.Module], ModelInputs, int]] = {
    "zeros for channels": (lambda: CifarResNet(8), rows(2, 3, 32, 32), 6),
    "a shuffle": (lambda: Net(_shuffle, **convs(8)), rows(2, 3, 4, 4), 1),
    "a tied weight": (TiedModel, tokens(), 1),
    "a bare parameter": (
        lambda: Net(
            lambda m, x: m.b(m.a(x) * m.s), s=nn.Parameter(torch.rand(8, 1, 1)), **convs(8)
        ),
        rows(2, 3, 4, 4),
        1,
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("trait", DIFFERENCES)
def test_what_torch_pruning_breaks_is_pruned_exactly(trait: str) -> None:
    """Its groups there fail the check, or it gives none; read with torch-pruning 1.6."""
    make, inputs, count = DIFFERENCES[trait]
    torch.manual_seed(0)
    model = make()
    try:
        groups, faults = theirs(model, inputs)
    except FORWARD_FAILURES:  # it divides by zero, or finds no layer where it looks for one
        groups, faults = [], {"": "raises"}
    ours = find_groups(model, inputs)
    assert faults
    assert len(ours.groups) == count > len([g for g in groups if g.name not in faults])
    assert ours.quarantined == ()
    assert_prunes_exactly(model, inputs, ours)
