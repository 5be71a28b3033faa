"""Tiny models for tests: each has one trait that breaks naive tools, and runs in milliseconds."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class TinyMLP(nn.Module):
    """Flatten, then three linear layers: (N, …) of `in_features` entries -> (N, num_classes)."""

    def __init__(self, in_features: int = 64, hidden: int = 32, num_classes: int = 10) -> None:
        super().__init__()
        self.fc1 = nn.Linear(in_features, hidden)
        self.fc2 = nn.Linear(hidden, hidden)
        self.fc3 = nn.Linear(hidden, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores (N, num_classes)."""
        x = F.relu(self.fc1(x.flatten(1)))
        scores: Tensor = self.fc3(F.relu(self.fc2(x)))
        return scores


class ResidualBlock(nn.Module):
    """Two 3×3 convolutions beside a shortcut: a 1×1 convolution where the shape changes."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU()
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False),
                nn.BatchNorm2d(out_channels),
            )

    def forward(self, x: Tensor) -> Tensor:
        """(N, in, H, W) -> (N, out, H / stride, W / stride)."""
        branch = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out: Tensor = self.relu(branch + self.shortcut(x))
        return out


class TinyResNet(nn.Module):
    """A residual CNN for images of 8×8 and up; `layer1.0` and `layer2.1` are identity blocks."""

    def __init__(self, num_classes: int = 10, width: int = 16, in_channels: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        self.layer1 = nn.Sequential(ResidualBlock(width, width))
        self.layer2 = nn.Sequential(
            ResidualBlock(width, 2 * width, stride=2), ResidualBlock(2 * width, 2 * width)
        )
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(2 * width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores (N, num_classes)."""
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer2(self.layer1(x))
        scores: Tensor = self.linear(self.pool(x).flatten(1))
        return scores


class Lambda(nn.Module):
    """A function as a module. It deep-copies, but it cannot be pickled."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        """The function's value."""
        return self.function(x)


class CifarBlock(nn.Module):
    """Basic block with the parameter-free shortcut: every second pixel, zero channels added."""

    def __init__(self, in_planes: int, planes: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_planes, planes, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.shortcut: nn.Module = nn.Sequential()
        if stride != 1 or in_planes != planes:
            added = planes // 4
            self.shortcut = Lambda(
                lambda x: F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, added, added), "constant", 0)
            )

    def forward(self, x: Tensor) -> Tensor:
        """(N, in, H, W) -> (N, planes, H / stride, W / stride)."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        return F.relu(out)


class CifarResNet(nn.Module):
    """The ResNet of He et al. (2015), section 4.2, for 32×32 images, with shortcuts "A"."""

    def __init__(self, depth: int = 20, num_classes: int = 10) -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(f"depth={depth} is not 6n + 2. Write 8, 14, 20, 32, 44, 56 or 110.")
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = cifar_stage(16, 16, blocks, stride=1)
        self.layer2 = cifar_stage(16, 32, blocks, stride=2)
        self.layer3 = cifar_stage(32, 64, blocks, stride=2)
        self.linear = nn.Linear(64, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores (N, num_classes)."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.layer3(self.layer2(self.layer1(out)))
        out = F.avg_pool2d(out, int(out.size(3)))
        scores: Tensor = self.linear(out.view(out.size(0), -1))
        return scores


def cifar_stage(in_planes: int, planes: int, blocks: int, stride: int) -> nn.Sequential:
    """`blocks` blocks, of which the first changes the shape."""
    first = CifarBlock(in_planes, planes, stride)
    return nn.Sequential(first, *(CifarBlock(planes, planes, 1) for _ in range(blocks - 1)))


class TransformerBlock(nn.Module):
    """Pre-norm self-attention and MLP, each added to its input."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(N, L, dim) -> (N, L, dim)."""
        x = x + self.attend(self.norm1(x))
        mlp: Tensor = self.fc2(F.gelu(self.fc1(self.norm2(x))))
        return x + mlp

    def attend(self, x: Tensor) -> Tensor:
        """Multi-head self-attention of (N, L, dim)."""
        qkv = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2])
        projected: Tensor = self.proj(mixed.transpose(1, 2).flatten(2))
        return projected


class TinyTransformer(nn.Module):
    """A text classifier: token numbers (N, L) int64 below `vocabulary`, L up to `length`."""

    def __init__(
        self,
        vocabulary: int = 32,
        dim: int = 16,
        heads: int = 2,
        depth: int = 2,
        length: int = 16,
        num_classes: int = 2,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, dim)
        self.position = nn.Parameter(torch.randn(1, length, dim) * 0.02)
        self.blocks = nn.Sequential(*(TransformerBlock(dim, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, num_classes)

    def forward(self, tokens: Tensor) -> Tensor:
        """Class scores (N, num_classes)."""
        x = self.embedding(tokens) + self.position[:, : tokens.shape[1]]
        scores: Tensor = self.head(self.norm(self.blocks(x)).mean(1))
        return scores


class DictModel(nn.Module):
    """Takes a dict, {"image": (N, C, H, W), "scale": (N,)}; returns {"logits", "features"}."""

    def __init__(self, in_channels: int = 1, width: int = 8, num_classes: int = 10) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, width, 3, padding=1)
        self.bn = nn.BatchNorm2d(width)
        self.head = nn.Linear(width, num_classes)

    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Class scores (N, num_classes), and the features (N, width) that they are read from."""
        features = F.relu(self.bn(self.conv(batch["image"]))).mean((2, 3))
        features = features * batch["scale"].unsqueeze(1)
        return {"logits": self.head(features), "features": features}


class TiedModel(nn.Module):
    """A next-token model whose output layer is its embedding: one parameter, two names."""

    def __init__(self, vocabulary: int = 32, dim: int = 16) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, dim)
        self.hidden = nn.Linear(dim, dim)
        self.head = nn.Linear(dim, vocabulary, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """(N, L) int64 below `vocabulary` -> scores (N, L, vocabulary)."""
        scores: Tensor = self.head(F.relu(self.hidden(self.embedding(tokens))))
        return scores
