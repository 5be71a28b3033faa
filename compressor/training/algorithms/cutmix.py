"""Patches of other images (Yun et al., 2019, https://arxiv.org/abs/1905.04899)."""

from __future__ import annotations

import math
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor

from compressor.errors import ConfigError, DataError
from compressor.training.algorithm import Algorithm
from compressor.training.algorithms.mixing import (
    MixedTargets,
    check_mixable,
    check_share,
    draw_mixing,
    draw_permutation,
)
from compressor.training.algorithms.soft_targets import IGNORED, soft_targets
from compressor.training.card import Card
from compressor.training.events import Event
from compressor.training.state import State

Box: TypeAlias = tuple[int, int, int, int]


def cutmix_batch(
    inputs: Tensor,
    targets: Tensor,
    alpha: float = 1.0,
    mixing: float | None = None,
    box: Box | None = None,
    indices: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor, float, Box]:
    """Put a rectangle of another image into each, the same one for the whole batch.

    The loss is `(1 - mixing) * loss(outputs, targets) + mixing * loss(outputs, permuted)`. Maps of
    the images' size get the rectangle themselves; for them `mixing` is 1, so the loss is that of
    the new maps.

    Args:
        inputs: (N, ..., H, W); not changed.
        targets: (N,) or (N, K), or maps (N, ..., H, W); of any dtype.
        alpha: of Beta(alpha, alpha), from which the share is drawn; 0 mixes nothing.
        mixing: wanted share of the area, 0 to 1; None draws one. What the border cuts off is not
            made up for.
        box: (left, top, right, bottom) in pixels, right and bottom outside; None draws the centre.
        indices: (N,), the other image of each; None draws a permutation.
        generator: for the draws, on the CPU; None is torch's global one.

    Returns:
        Mixed inputs, permuted targets (N, ...), the share of the area that the box really has, and
        the box; for maps the mixed maps, and 1 for the share.

    Raises:
        ConfigError: `alpha`, `mixing` or `box` out of range.
        DataError: if inputs and targets cannot be mixed, as maps of another size.

    >>> inputs, targets = torch.stack([torch.zeros(2, 2), torch.ones(2, 2)]), torch.tensor([0, 1])
    >>> order = torch.tensor([1, 0])
    >>> mixed, permuted, mixing, _ = cutmix_batch(inputs, targets, box=(0, 0, 1, 1), indices=order)
    >>> mixed[0], permuted, mixing
    (tensor([[1., 0.],
            [0., 0.]]), tensor([1, 0]), 0.25)
    """
    check_mixable(inputs, targets)
    if inputs.dim() < 3:
        raise DataError(f"Inputs of shape {tuple(inputs.shape)} are no images. Give (N, C, H, W).")
    height, width = inputs.shape[-2:]
    if box is None:
        share = draw_mixing(alpha, generator) if mixing is None else mixing
        check_share(share)
        box = draw_box(height, width, share, generator)
    left, top, right, bottom = box
    if not (0 <= left <= right <= width and 0 <= top <= bottom <= height):
        raise ConfigError(
            f"box={box} is not within images of {height}×{width} pixels. "
            "Write (left, top, right, bottom)."
        )
    if indices is None:
        indices = draw_permutation(len(inputs), generator)
    mixed = paste_box(inputs, indices, box)
    if are_maps(inputs, targets):
        return mixed, paste_box(targets, indices, box), 1.0, box
    area = (right - left) * (bottom - top) / (height * width)
    return mixed, targets[indices.to(targets.device)], area, box


def paste_box(images: Tensor, indices: Tensor, box: Box) -> Tensor:
    """`images` (N, ..., H, W), a copy, with what is in `box` taken from those at `indices`."""
    left, top, right, bottom = box
    mixed = images.clone()
    other = images[..., top:bottom, left:right]
    mixed[..., top:bottom, left:right] = other[indices.to(images.device)]
    return mixed


def are_maps(inputs: Tensor, targets: Tensor) -> bool:
    """Whether `targets` belong to the pixels of `inputs`.

    Raises:
        DataError: if they are of another size, so that nobody knows where the box is in them.
    """
    if targets.dim() < 3:
        return False
    if targets.shape[-2:] == inputs.shape[-2:]:
        return True
    raise DataError(
        f"Targets of shape {tuple(targets.shape)} are no classes, nor maps for images of shape "
        f"{tuple(inputs.shape)}. Give maps of the images' size, or leave CutMix out."
    )


def draw_box(
    height: int, width: int, share: float, generator: torch.Generator | None = None
) -> Box:
    """A rectangle of an image's own proportions around a random pixel, cut at the border.

    Args:
        height: pixels.
        width: pixels.
        share: of the area, 0 to 1.
        generator: None is torch's global one.

    Returns:
        (left, top, right, bottom), as in torchvision's `v2.CutMix`.
    """
    x = int(torch.randint(width, (), generator=generator))
    y = int(torch.randint(height, (), generator=generator))
    half = 0.5 * math.sqrt(share)
    half_width, half_height = int(half * width), int(half * height)
    return (
        max(x - half_width, 0),
        max(y - half_height, 0),
        min(x + half_width, width),
        min(y + half_height, height),
    )


def cutmix(
    inputs: Tensor,
    targets: Tensor,
    alpha: float = 1.0,
    num_classes: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The mixed inputs of `cutmix_batch` alone, for a loop that keeps its targets as they are.

    At most half of an image is replaced, so that `targets` names what most of it shows; but the
    pasted part is then taught with a wrong label. The method of the paper mixes the targets too:
    use `cutmix_batch`, and its line for the loss, wherever you can change the loop.

    Args:
        inputs: (N, ..., H, W); not changed.
        targets: (N,), class indices, or weights (N, num_classes); not changed.
        alpha: of Beta(alpha, alpha), from which the share is drawn.
        num_classes: checked against `targets`; None checks nothing.
        generator: for the draws, on the CPU; None is torch's global one.

    Returns:
        Of the shape of `inputs`.

    Raises:
        ConfigError: if `alpha` is below 0.
        DataError: if inputs and targets cannot be mixed, a target is no class, or targets are maps.

    >>> images, labels = torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 2, 2])
    >>> cutmix(images, labels, alpha=1.0, num_classes=3).shape
    torch.Size([4, 3, 8, 8])
    """
    if num_classes is not None:
        soft_targets(torch.empty(len(targets), num_classes, device="meta"), targets)
    mixing = draw_mixing(alpha, generator)
    mixing = min(mixing, 1 - mixing)
    check_mixable(inputs, targets)
    if targets.dim() > 2:
        raise DataError(
            f"Targets of shape {tuple(targets.shape)} are maps, which must get the same patch. "
            "Use cutmix_batch, which gives the mixed maps too."
        )
    mixed, _, _, _ = cutmix_batch(inputs, targets, mixing=mixing, generator=generator)
    return mixed


class CutMix(Algorithm):
    """Trains on images with a patch of another: inputs at BEFORE_FORWARD, targets after it.

    Images of one micro-batch are mixed. Targets become weights of the classes, (N, K, ...), which
    the loss must take, as cross entropy does; one that takes class indices only fails at the first
    batch, and needs `interpolate_loss`. Class weights in a loss are divided by the number of
    targets, where torch divides by their sum for indices. Maps of the images' size, (N, H, W) or
    (N, K, H, W), get the same rectangle, and stay class indices if they are. With other mixing
    algorithms they act in turn.

    Args:
        alpha: of Beta(alpha, alpha): 1 draws every share alike.
        interpolate_loss: leave the targets as they are and mix the losses of both, for a loss that
            takes class indices only; it is then computed twice. Not beside another that mixes.
        input_key: place of the inputs in a batch.
        target_key: place of the targets.
        ignore_index: a target that does not count.
        class_dim: where the classes are in the outputs; None: where the task says, or 1. Write -1
            for tokens (N, T, K).

    Raises:
        ConfigError: if `alpha` is below 0.
    """

    events = frozenset({Event.BEFORE_FORWARD, Event.AFTER_FORWARD, Event.AFTER_LOSS})
    before = ("LabelSmoothing",)  # of maps it is known then how many pixels count
    card = Card(
        summary="Replaces a rectangle of each image by that of another, and mixes their targets.",
        source="Yun et al. (2019), CutMix: Regularization Strategy to Train Strong Classifiers "
        "with Localizable Features",
        functional="cutmix_batch",
        settings="`alpha`: 1 makes all shares of the other image as likely; below, it is "
        "little or nearly all.",
        use_when="An image classifier overfits, and training is long.",
        avoid_when="The fit is short or the model underfits; what is to be seen is small, so that "
        "a patch hides all of it.",
        cost="One copy of the inputs. With interpolate_loss a second evaluation of the loss.",
    )

    def __init__(
        self,
        alpha: float = 1.0,
        *,
        interpolate_loss: bool = False,
        input_key: int | str = 0,
        target_key: int | str = 1,
        ignore_index: int = IGNORED,
        class_dim: int | None = None,
    ) -> None:
        if not alpha >= 0:
            raise ConfigError(f"alpha={alpha} is no Beta distribution. Write 0 or more.")
        self.alpha = alpha
        self.mixed_targets = MixedTargets(
            input_key, target_key, interpolate_loss, ignore_index, class_dim
        )
        self.conflicts = self.mixed_targets.conflicts

    def on(self, event: Event, state: State) -> None:
        """Mix inputs, then their targets or losses."""
        if event is not Event.BEFORE_FORWARD:
            self.mixed_targets.follow(event, state)
            return
        inputs, targets = self.mixed_targets.items(state)
        indices = draw_permutation(len(inputs))
        mixed, _, mixing, box = cutmix_batch(inputs, targets, self.alpha, indices=indices)
        if are_maps(inputs, targets):
            paste = partial(paste_box, indices=indices, box=box)
            self.mixed_targets.begin_maps(state, mixed, paste)
        else:
            self.mixed_targets.begin(state, mixed, indices, mixing)
