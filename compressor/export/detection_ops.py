"""Steps of torchvision's detectors whose sizes or branches depend on what was found, rewritten.

A tracer must take every branch and know which sizes are equal; torchvision's own code branches on
the number of boxes and loops over them. Each function here computes the same as the one that it
stands for, by tensors alone.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

# of how torchvision 0.29 describes `nms` to the tracer
DESCRIPTION_WARNING = r".*`create_unbacked_symint` is deprecated"
PACKAGE = "torchvision.models.detection."
CUBIC = -0.75  # of torch's bicubic interpolation


@contextmanager
def traceable_detectors(model: nn.Module) -> Iterator[None]:
    """Inside the `with`, the detectors of torchvision in `model` can be traced.

    It replaces functions of torchvision, for everyone, by equal ones; does nothing if `model` has
    no module of `torchvision.models.detection`.
    """
    replaced = _replacements() if _has_detector(model) else []
    originals = [(module, name, getattr(module, name)) for module, name, _ in replaced]
    try:
        for module, name, function in replaced:
            setattr(module, name, function)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", DESCRIPTION_WARNING, FutureWarning)
            yield
    finally:
        for module, name, function in originals:
            setattr(module, name, function)


def _has_detector(model: nn.Module) -> bool:
    """Subclasses and parts count; what is not imported cannot be in the model."""
    return any(
        cls.__module__.startswith(PACKAGE)
        for module in model.modules()
        for cls in type(module).mro()
    )


def _replacements() -> list[tuple[Any, str, Callable[..., Any]]]:
    modules = sys.modules
    return [
        (modules["torchvision.ops.boxes"], "batched_nms", batched_nms),
        (modules["torchvision.ops.poolers"], "_multiscale_roi_align", multiscale_roi_align),
        (modules[f"{PACKAGE}transform"], "paste_masks_in_image", paste_masks),
        (modules[f"{PACKAGE}roi_heads"], "heatmaps_to_keypoints", find_keypoints),
    ]


def batched_nms(boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float) -> Tensor:
    """`torchvision.ops.batched_nms`: of boxes of one class that overlap the best stays.

    Classes are set apart by more than any coordinate, as torchvision does for few boxes or on a
    GPU; for many on a CPU it takes one class after the other, which differs by the rounding of
    coordinates only.

    Args:
        boxes: (boxes, 4): left, top, right, bottom; from 0.
        scores: (boxes,).
        idxs: (boxes,), the classes.
        iou_threshold: from 0 to 1.

    Returns:
        The positions of those that stay, the best first.
    """
    from torchvision.ops import nms

    largest = torch.cat([boxes.flatten(), boxes.new_zeros(1)]).max()  # there may be no box
    kept: Tensor = nms(boxes + (idxs.to(boxes) * (largest + 1))[:, None], scores, iou_threshold)
    return kept


def multiscale_roi_align(
    x_filtered: list[Tensor],
    boxes: list[Tensor],
    output_size: Sequence[int],
    sampling_ratio: int,
    scales: list[float],
    mapper: Callable[[list[Tensor]], Tensor],
) -> Tensor:
    """`torchvision.ops.poolers._multiscale_roi_align`: every box on every level, then one of them.

    Args:
        x_filtered: of each level (images, channels, height, width).
        boxes: of each image (boxes, 4).
        output_size: height and width.
        sampling_ratio: of `roi_align`.
        scales: of each level, pixels of its map for one of the image.
        mapper: the level (boxes,) of each box.

    Returns:
        (boxes of all images, channels, *output_size).
    """
    from torchvision.ops import roi_align

    images = [torch.full_like(each[:, :1], i) for i, each in enumerate(boxes)]
    rois = torch.cat([torch.cat(images), torch.cat(boxes)], dim=1)
    aligned: list[Tensor] = [
        roi_align(features, rois, output_size, scale, sampling_ratio)
        for features, scale in zip(x_filtered, scales, strict=True)
    ]
    if len(aligned) == 1:
        return aligned[0]
    level = mapper(boxes)[:, None, None, None]
    result = torch.zeros_like(aligned[0])
    for i, values in enumerate(aligned):
        result = torch.where(level == i, values.to(result.dtype), result)
    return result


def paste_masks(
    masks: Tensor, boxes: Tensor, img_shape: tuple[int, int], padding: int = 1
) -> Tensor:
    """`paste_masks_in_image`: each mask stretched over its box, and zero around it.

    Bilinear interpolation is a matrix for the rows times the mask times one for the columns.

    Args:
        masks: (boxes, 1, size, size).
        boxes: (boxes, 4).
        img_shape: height and width of the image.
        padding: of the masks, in their entries.

    Returns:
        (boxes, 1, *img_shape).
    """
    from torchvision.models.detection.roi_heads import expand_boxes, expand_masks

    masks, scale = expand_masks(masks, padding=padding)
    whole = expand_boxes(boxes, scale).to(torch.int64)
    height, width = img_shape
    rows = _bilinear(whole[:, 1], whole[:, 3], height, masks)
    columns = _bilinear(whole[:, 0], whole[:, 2], width, masks)
    return (rows @ masks[:, 0] @ columns.transpose(1, 2))[:, None]


def _bilinear(first: Tensor, last: Tensor, size: int, masks: Tensor) -> Tensor:
    """(boxes, size, entries): what each entry of a mask adds to each pixel from `first` to `last`.

    As `interpolate(align_corners=False)` to `last - first + 1` pixels.
    """
    entries = masks.shape[-1]
    pixel = torch.arange(size, device=masks.device)
    length = (last - first + 1).clamp(min=1)[:, None]
    within = pixel - first[:, None]
    position = (within + 0.5) * (entries / length) - 0.5
    position = position.clamp(0, entries - 1)[:, :, None]
    entry = torch.arange(entries, device=masks.device)
    weights = (1 - (position - entry).abs()).clamp(min=0)
    is_inside = (within >= 0) & (within < length)
    return torch.where(is_inside[:, :, None], weights, torch.zeros_like(weights)).to(masks.dtype)


def find_keypoints(maps: Tensor, rois: Tensor) -> tuple[Tensor, Tensor]:
    """`heatmaps_to_keypoints`: where each heat map, stretched over its box, is highest.

    Bicubic interpolation is a matrix for the rows times the map times one for the columns; all
    boxes take the size of the largest, and what is outside of a box does not count.

    Args:
        maps: (boxes, keypoints, size, size).
        rois: (boxes, 4).

    Returns:
        x, y and 1 of each keypoint (boxes, keypoints, 3), and its height (boxes, keypoints).
    """
    sizes = (rois[:, 2:] - rois[:, :2]).clamp(min=1)
    whole = sizes.ceil()
    largest = torch.cat([whole, whole.new_ones(1, 2)]).amax(0).to(torch.int64)  # or no box
    width: Any = largest[0].item()  # `int` would ask the tracer for a number
    height: Any = largest[1].item()
    torch._check(width >= 1)
    torch._check(height >= 1)
    columns, is_column = _bicubic(whole[:, 0], width, maps)
    rows, is_row = _bicubic(whole[:, 1], height, maps)
    is_inside = is_row[:, :, None] & is_column[:, None, :]
    lowest = torch.finfo(maps.dtype).min
    places, scores = [], []
    for i in range(maps.shape[1]):  # one at a time: the stretched maps are large
        stretched = rows @ maps[:, i] @ columns.transpose(1, 2)
        stretched = stretched.masked_fill(~is_inside, lowest)
        score, best = stretched.flatten(1).max(dim=1)
        # by the tensor: ONNX has no remainder by a number that is computed
        places.append(torch.stack([best % largest[0], best // largest[0]], dim=1))
        scores.append(score)
    place = torch.stack(places, dim=1).to(torch.float32)
    point = (place + 0.5) * (sizes / whole)[:, None] + rois[:, None, :2]
    return torch.cat([point, torch.ones_like(point[:, :, :1])], dim=2), torch.stack(scores, dim=1)


def _bicubic(length: Tensor, size: int, maps: Tensor) -> tuple[Tensor, Tensor]:
    """(boxes, size, entries): what each entry adds to each pixel; and which pixels there are.

    As `interpolate(mode="bicubic", align_corners=False)` to `length` pixels: beyond the ends the
    first and the last entry are repeated.
    """
    entries = maps.shape[-1]
    pixel = torch.arange(size, device=maps.device)
    position = (pixel + 0.5) * (entries / length)[:, None] - 0.5
    base = position.floor()
    weights = torch.zeros_like(position)[:, :, None] * torch.zeros(entries, device=maps.device)
    entry = torch.arange(entries, device=maps.device)
    for offset in (-1, 0, 1, 2):
        source = (base + offset).clamp(0, entries - 1)
        weight = _cubic((position - base - offset).abs())
        weights = weights + torch.where(source[:, :, None] == entry, weight[:, :, None], 0.0)
    return weights.to(maps.dtype), pixel < length[:, None]


def _cubic(distance: Tensor) -> Tensor:
    """Keys, 1981: the weight of an entry at this distance, up to 2."""
    near = ((CUBIC + 2) * distance - (CUBIC + 3)) * distance * distance + 1
    far = ((CUBIC * distance - 5 * CUBIC) * distance + 8 * CUBIC) * distance - 4 * CUBIC
    return torch.where(distance <= 1, near, far)
