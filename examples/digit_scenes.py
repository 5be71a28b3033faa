"""Scenes composed of scikit-learn's real digits: images with masks and boxes, no download.

One to three digits, twice as large as they were scanned, lie on a dark, noisy canvas. Those of the
test scenes are in no training scene.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor

CLASSES = 11  # 0 is the background, digit d is d + 1
SIZE = 48  # of the canvas
MOST_DIGITS = 3
NOISE = 0.1
INK = 0.25  # what counts as the digit
TRAIN_DIGITS = 1200


@dataclass(frozen=True)
class Scenes:
    """Images (N, 1, SIZE, SIZE), masks (N, SIZE, SIZE), and of each image boxes and labels."""

    images: Tensor
    masks: Tensor
    boxes: list[Tensor]
    labels: list[Tensor]

    def __len__(self) -> int:
        return len(self.images)


def make_scenes(count: int, split: str, seed: int = 0) -> Scenes:
    """`count` scenes of the digits of one split, "train" or "test"."""
    digits = load_digits()
    part = slice(TRAIN_DIGITS) if split == "train" else slice(TRAIN_DIGITS, None)
    stamps, kinds = digits.images[part] / 16, digits.target[part] + 1
    rng = np.random.default_rng([seed, split == "test"])
    scenes = [make_scene(rng, stamps, kinds) for _ in range(count)]
    images, masks, boxes, labels = zip(*scenes, strict=True)
    return Scenes(torch.stack(images), torch.stack(masks), list(boxes), list(labels))


def make_scene(
    rng: np.random.Generator, stamps: np.ndarray, kinds: np.ndarray
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Image, mask, boxes (digits, 4) as x1, y1, x2, y2, and labels (digits,)."""
    image = NOISE * rng.standard_normal((SIZE, SIZE))
    mask = np.zeros((SIZE, SIZE), dtype=np.int64)
    boxes, labels = [], []
    for digit in rng.integers(len(stamps), size=rng.integers(1, MOST_DIGITS + 1)):
        stamp = stamps[digit].repeat(2, axis=0).repeat(2, axis=1)
        row, column = rng.integers(SIZE - len(stamp) + 1, size=2)
        window = slice(row, row + len(stamp)), slice(column, column + len(stamp))
        if mask[window].any():
            continue  # digits do not overlap
        inked = stamp > INK
        image[window] += stamp
        mask[window] = np.where(inked, kinds[digit], 0)
        rows, columns = np.nonzero(inked)
        left, right = column + columns.min(), column + columns.max() + 1
        top, bottom = row + rows.min(), row + rows.max() + 1
        boxes.append([left, top, right, bottom])
        labels.append(kinds[digit])
    return (
        torch.from_numpy(image).float().unsqueeze(0),
        torch.from_numpy(mask),
        torch.tensor(np.array(boxes), dtype=torch.float32),
        torch.tensor(np.array(labels), dtype=torch.int64),
    )
