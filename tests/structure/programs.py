"""Models whose code fixes widths, or does what a program must not lose, with inputs for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compressor.interfaces.inputs import ModelInputs
from compressor.testing.models import CifarBlock, CifarResNet, DictModel


class LeNet(nn.Module):
    """A flattened map whose width is a number in the code, and dropout as a function."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 6, 5)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.norm = nn.BatchNorm2d(16)
        self.drop = nn.Dropout(0.3)
        self.fc1 = nn.Linear(16 * 5 * 5, 20)
        self.fc2 = nn.Linear(20, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.norm(self.conv2(x))), 2)
        x = F.relu(self.fc1(self.drop(x.view(-1, 16 * 5 * 5))))
        out: Tensor = self.fc2(F.dropout(x, 0.2, self.training))
        return out


class Gated(nn.Module):
    """GLU halves by `split` with a number, and a scale that no module holds."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 24)
        self.down = nn.Linear(12, 8)
        self.scale = nn.Parameter(torch.rand(12) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.up(x).split(12, dim=-1)
        out: Tensor = self.down(value * torch.sigmoid(gate) * self.scale)
        return out


class Skipped(nn.Module):
    """Drops its whole sample while training: no operation at all in eval mode."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        return x * (torch.rand(len(x), 1, 1, device=x.device, dtype=x.dtype) > 0.5)


class Heads(nn.Module):
    """Self-attention with two heads of 4 in its code; one norm is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.qkv = nn.Linear(8, 24)
        self.out = nn.Linear(8, 8)
        self.skip = Skipped()
        self.register_buffer("calls", torch.zeros(()))
        self.offset = torch.tensor([0.5, 1.0] * 4)

    def forward(self, x: Tensor, causal: bool = False) -> Tensor:
        self.calls += 1
        qkv = self.qkv(self.norm(x)).reshape(x.shape[0], -1, 3, 2, 4).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(
            *qkv.unbind(0), dropout_p=0.25 if self.training else 0.0, is_causal=causal
        )
        x = x + self.skip(self.out(mixed.transpose(1, 2).reshape(x.shape[0], -1, 8)))
        x = x + torch.zeros(8, dtype=x.dtype, device=x.device) + torch.tensor([1.0, 2.0]).sum()
        out: Tensor = self.norm(x) + self.offset
        return out


class InPlace(nn.Module):
    """Children and code that write into what they are given."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.fc(x)
        before = y[:, :3]
        self.relu(y)
        y = y * 2
        y[:, 3:] += before
        return {"all": y, "first": before.clone()}


class Windows(nn.Module):
    """Cuts (L, N, C) into windows: the batch is dimension 1, and half of a batch inside."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        length, batch, channels = x.shape
        windows = x.permute(1, 0, 2).reshape(batch * 2, length // 2, channels)
        mixed = self.fc(windows.transpose(1, 2).reshape(-1, 2, 3 * (length // 2)).mean(1))
        out: Tensor = mixed.view(batch, 2, 6).sum(1)
        return out


class Nested(nn.Module):
    """Takes a dict and a number, gives a tuple; its child takes two tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = DictModel()
        self.bilinear = nn.Bilinear(10, 8, 4)

    def forward(
        self, batch: Mapping[str, Tensor], times: int = 2
    ) -> tuple[Tensor, dict[str, Tensor]]:
        out = self.inner(batch)
        return self.bilinear(out["logits"], out["features"]).view(-1, 4) * times, out


def _images(size: int, channels: int = 1, side: int = 32) -> ModelInputs:
    generator = torch.Generator().manual_seed(size)
    return ModelInputs((torch.randn(size, channels, side, side, generator=generator),))


def _rows(size: int, *shape: int) -> ModelInputs:
    generator = torch.Generator().manual_seed(size)
    return ModelInputs((torch.randn(size, *shape, generator=generator),))


def _dicts(size: int) -> ModelInputs:
    image = _images(size, side=4).args[0]
    return ModelInputs(({"image": image, "scale": image[:, 0, 0, 0].abs()},), {"times": 3})


Case = tuple[Callable[[], nn.Module], Callable[[int], ModelInputs]]
CASES: dict[str, Case] = {
    "lenet": (LeNet, _images),
    "gated": (Gated, lambda size: _rows(size, 5, 8)),
    "heads": (Heads, lambda size: _rows(size, 5, 8)),
    "in_place": (InPlace, lambda size: _rows(size, 6)),
    "windows": (Windows, lambda size: _rows(size, 4, 6).map(lambda x: x.transpose(0, 1))),
    "nested": (Nested, _dicts),
    "cifar_block": (lambda: CifarBlock(8, 16, 2), lambda size: _images(size, 8, 8)),
    "cifar_shortcut": (lambda: CifarBlock(8, 16, 2).shortcut, lambda size: _images(size, 8, 8)),
    "cifar_resnet": (lambda: CifarResNet(8), lambda size: _images(size, 3)),
}


def inputs_of(case: str, size: int) -> ModelInputs:
    """Inputs of `size` samples."""
    return CASES[case][1](size)


def make(case: str, seed: int = 0) -> nn.Module:
    """The model; equal seeds give equal weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return CASES[case][0]()
