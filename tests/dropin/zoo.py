"""What the users of these scripts have: loaders, small trained models, losses and metrics.

Real digits of 8×8 pixels, alone for classification, set into scenes for detection and segmentation.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from functools import cache, wraps
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchvision.ops import box_iou

DIGIT = 8  # pixels
SCENE = 2 * DIGIT
KINDS = 3  # of digits in scenes: 0, 1 and 2
GRID = 4  # of priors, in each direction


@cache
def digits() -> tuple[Tensor, Tensor]:
    """Images (1797, 1, 8, 8) from 0 to 1, and labels."""
    bunch = load_digits()
    order = torch.randperm(len(bunch.target), generator=torch.Generator().manual_seed(0))
    images = torch.from_numpy(bunch.images).float().unsqueeze(1) / 16
    return images[order], torch.from_numpy(bunch.target)[order]


def pretrained(
    model: nn.Module, loader: Iterable[Any], loss: Callable[..., Any], epochs: int, lr: float = 0.1
) -> nn.Module:
    """`model`, trained in place."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, nesterov=True)
    for _ in range(epochs):
        for batch in loader:
            optimizer.zero_grad()
            terms = loss(model, batch)
            (sum(terms.values()) if isinstance(terms, dict) else terms.sum()).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
    return model.eval()


def downloaded(make: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """`make`, whose models are made once in a process; each call returns a copy."""
    made = cache(make)

    @wraps(make)
    def load(*args: Any) -> nn.Module:
        return copy.deepcopy(made(*args))

    return load


def conv(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    """A convolution, its norm and its ReLU."""
    layer = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(outputs), nn.ReLU())


# classification -----------------------------------------------------------------------------------


class DigitNet(nn.Module):
    """(N, 1, H, W) to logits (N, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(conv(1, 16), conv(16, 32, stride=2), conv(32, 32))
        self.classifier = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).mean((2, 3)))


def digit_splits(batch_size: int) -> dict[str, Any]:
    images, labels = digits()
    train, test = slice(0, 768), slice(768, 1024)
    return {
        "train": DataLoader(TensorDataset(images[train], labels[train]), batch_size, shuffle=True),
        "test": DataLoader(TensorDataset(images[test], labels[test]), batch_size),
    }


@downloaded
def digit_net() -> nn.Module:
    torch.manual_seed(0)
    splits = digit_splits(batch_size=64)

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])

    return pretrained(DigitNet(), splits["train"], loss, epochs=5)


# detection with priors ----------------------------------------------------------------------------


class SceneDataset(Dataset[Any]):
    """One digit in each scene: image, boxes (1, 4), labels (1,), number of the scene."""

    def __init__(self, first: int, count: int) -> None:
        images, labels = digits()
        chosen = (labels < KINDS).nonzero().flatten()[first : first + count]
        random = torch.Generator().manual_seed(first)
        corners = torch.randint(0, SCENE - DIGIT + 1, (len(chosen), 2), generator=random)
        self.images = torch.zeros(len(chosen), 1, SCENE, SCENE)
        for scene, digit, (x, y) in zip(self.images, images[chosen], corners, strict=True):
            scene[:, y : y + DIGIT, x : x + DIGIT] = digit
        self.boxes = torch.cat([corners, corners + DIGIT], 1).float().unsqueeze(1)
        self.labels = labels[chosen].unsqueeze(1) + 1  # 0 is background

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor, int]:
        return self.images[index], self.boxes[index], self.labels[index], index


def scene_splits(batch_size: int) -> dict[str, Any]:
    return {
        "train": DataLoader(SceneDataset(0, 384), batch_size, shuffle=True),
        "test": DataLoader(SceneDataset(384, 128), batch_size),
    }


def make_priors() -> Tensor:
    """Centres (16, 2) of a grid over the scene."""
    centres = (torch.arange(GRID) + 0.5) * SCENE / GRID
    y, x = torch.meshgrid(centres, centres, indexing="ij")
    return torch.stack([x.flatten(), y.flatten()], 1)


class TinySSD(nn.Module):
    """(N, 1, 16, 16) to confidences (N, 16, 4) and locations (N, 16, 2)."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Sequential(conv(1, 16), conv(16, 32, stride=2), conv(32, 32, stride=2))
        self.classification = nn.Conv2d(32, KINDS + 1, 3, padding=1)
        self.regression = nn.Conv2d(32, 2, 3, padding=1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.base(x)
        heads = (self.classification(x), self.regression(x))
        confidences, locations = (each.permute(0, 2, 3, 1).flatten(1, 2) for each in heads)
        return confidences, locations


# detection on a grid ------------------------------------------------------------------------------


class GridDataset(Dataset[Any]):
    """One to four digits, in the quadrants of a scene."""

    def __init__(self, chosen: slice, count: int) -> None:
        images, labels = digits()
        known = (labels < KINDS).nonzero().flatten()[chosen]
        random = torch.Generator().manual_seed(count)
        self.num_classes = KINDS
        self._img_size = SCENE
        self.scenes = []
        for number in range(count):
            scene, targets = torch.zeros(1, SCENE, SCENE), []
            for place in range(4):
                if place and torch.rand((), generator=random) < 0.4:
                    continue
                digit = int(known[(4 * number + place) % len(known)])
                y, x = divmod(place, 2)
                scene[:, DIGIT * y :, DIGIT * x :][:, :DIGIT, :DIGIT] = images[digit]
                centre = [x / 2 + 0.25, y / 2 + 0.25]
                targets.append(torch.tensor([0.0, float(labels[digit]), *centre, 0.5, 0.5]))
            self.scenes.append((scene, torch.stack(targets), f"{number}.png", (SCENE, SCENE)))

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> Any:
        return self.scenes[index]


def collate(samples: list[Any]) -> tuple[Tensor, Tensor, tuple[str, ...], tuple[Any, ...]]:
    """Targets (objects, 6): number of the image, class, centre, size."""
    images, targets, paths, shapes = zip(*samples, strict=True)
    numbered = []
    for number, rows in enumerate(targets):
        rows = rows.clone()
        rows[:, 0] = number
        numbered.append(rows)
    return torch.stack(images), torch.cat(numbered), paths, shapes


def grid_splits(batch_size: int) -> dict[str, Any]:
    return {
        "train": DataLoader(
            GridDataset(slice(400), 256), batch_size, shuffle=True, collate_fn=collate
        ),
        "test": DataLoader(GridDataset(slice(400, None), 96), batch_size, collate_fn=collate),
    }


class TinyYOLO(nn.Module):
    """In training a list of raw maps (N, 2, 2, 5 + classes), else boxes as well, decoded."""

    def __init__(self, num_classes: int, img_size: int) -> None:
        super().__init__()
        self.stride = DIGIT
        self.img_size = img_size
        self.backbone = nn.Sequential(conv(1, 16, 2), conv(16, 32, 2), conv(32, 32, 2))
        self.head = nn.Conv2d(32, 5 + num_classes, 1)

    def forward(self, x: Tensor) -> Any:
        raw = self.head(self.backbone(x)).permute(0, 2, 3, 1)
        if self.training:
            return [raw]
        rows = torch.arange(raw.shape[1], device=x.device)
        y, x = torch.meshgrid(rows, rows, indexing="ij")
        centres = (raw[..., :2].sigmoid() + torch.stack([x, y], 2)) * self.stride
        sizes = raw[..., 2:4].sigmoid() * self.img_size
        decoded = torch.cat([centres, sizes, raw[..., 4:].sigmoid()], 3).flatten(1, 2)
        return decoded, [raw]


# segmentation -------------------------------------------------------------------------------------


class TinyUNet(nn.Module):
    """(N, 1, 16, 16) to the logits (N, classes, 16, 16) of each pixel."""

    def __init__(self, num_classes: int = KINDS + 1) -> None:
        super().__init__()
        self.down1, self.down2 = conv(1, 16), conv(16, 32, stride=2)
        self.bottom = conv(32, 32, stride=2)
        self.up2, self.up1 = conv(64, 32), conv(48, 16)
        self.out = nn.Conv2d(16, num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        first = self.down1(x)
        second = self.down2(first)
        x = F.interpolate(self.bottom(second), scale_factor=2.0)
        x = F.interpolate(self.up2(torch.cat([x, second], 1)), scale_factor=2.0)
        return self.out(self.up1(torch.cat([x, first], 1)))


def mask_splits(batch_size: int) -> dict[str, Any]:
    """Batches of images and the class of each pixel: 0, or that of the digit it belongs to."""

    def masked(first: int, count: int) -> TensorDataset:
        scenes = SceneDataset(first, count)
        return TensorDataset(
            scenes.images, (scenes.images[:, 0] > 0.2) * scenes.labels.unsqueeze(2)
        )

    return {
        "train": DataLoader(masked(0, 192), batch_size, shuffle=True),
        "test": DataLoader(masked(384, 64), batch_size),
    }


# metrics ------------------------------------------------------------------------------------------


def mean_average_precision(found: list[Any], truth: list[Any], classes: int) -> float:
    """At an overlap of 0.5; a box is found once.

    Args:
        found: (scene, class, score, box (4,)) of each detection.
        truth: (scene, class, box (4,)) of each object.
        classes: how many.
    """
    precisions = []
    for kind in range(classes):
        objects = [(scene, box) for scene, of, box in truth if of == kind]
        ours = sorted((d for d in found if d[1] == kind), key=lambda d: -d[2])
        missing, hits = list(range(len(objects))), []
        for scene, _, _, box in ours:
            near = [
                index
                for index in missing
                if objects[index][0] == scene and box_iou(box[None], objects[index][1][None]) > 0.5
            ]
            hits.append(bool(near))
            if near:
                missing.remove(near[0])
        right = torch.tensor(hits, dtype=torch.float).cumsum(0)
        at = right / torch.arange(1, len(hits) + 1)
        precisions.append(float((at * torch.tensor(hits)).sum()) / max(len(objects), 1))
    return sum(precisions) / classes
