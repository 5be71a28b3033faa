"""What stands in for torchvision's code in a trace computes the same; detectors run as files."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision import ops
from torchvision.models import detection

from compressor.errors import ExportError
from compressor.export.detection_ops import (
    batched_nms,
    find_keypoints,
    multiscale_roi_align,
    paste_masks,
    traceable_detectors,
)
from compressor.export.onnx import export_onnx
from compressor.export.onnxruntime_model import OnnxRuntimeModel
from compressor.export.verify import parity
from compressor.interfaces.inputs import ModelInputs


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw_boxes(count: int, size: float, seed: int = 0) -> Tensor:
    """(count, 4), at least a pixel wide, within `size`."""
    corners = torch.rand(count, 2, 2, generator=generator(seed)) * size
    first, last = corners.amin(1), corners.amax(1)
    return torch.cat([first.clamp(max=size - 1), torch.maximum(last, first + 1)], dim=1)


@pytest.mark.parametrize("count", [0, 1, 40, 1200])  # beyond 1000, torchvision goes by class
def test_boxes_suppress_those_of_their_class(count: int) -> None:
    boxes, scores = draw_boxes(count, 100), torch.rand(count, generator=generator(1))
    classes = torch.randint(5, (count,), generator=generator(2))
    kept = batched_nms(boxes, scores, classes, 0.4)
    assert torch.equal(kept, ops.batched_nms(boxes, scores, classes, 0.4))
    assert count < 40 or len(kept) < count


@pytest.mark.parametrize("counts", [(0, 0), (7, 0), (5, 9)])
@pytest.mark.parametrize("levels", [1, 3])
def test_boxes_read_the_level_of_their_size(counts: tuple[int, ...], levels: int) -> None:
    sizes = [32, 16, 8][:levels]
    maps = [torch.randn(2, 4, size, size, generator=generator(size)) for size in sizes]
    pool = ops.MultiScaleRoIAlign([str(size) for size in sizes], 5, 2, canonical_scale=32)
    boxes = [draw_boxes(count, 64, seed) for seed, count in enumerate(counts)]
    named = {str(size): each for size, each in zip(sizes, maps, strict=True)}
    expected = pool(named, boxes, [(64, 64), (64, 64)])
    actual = multiscale_roi_align(maps, boxes, (5, 5), 2, pool.scales, pool.map_levels)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    if levels == 3 and min(counts):
        assert len(pool.map_levels(boxes).unique()) == 3


@pytest.mark.parametrize("count", [0, 25])
def test_masks_are_stretched_over_their_boxes(count: int) -> None:
    masks = torch.rand(count, 1, 28, 28, generator=generator(0))
    boxes = draw_boxes(count, 60) - 5  # some begin outside of the image, some end there
    expected = detection.roi_heads.paste_masks_in_image(masks, boxes, (50, 40))
    actual = paste_masks(masks, boxes, (50, 40))
    torch.testing.assert_close(actual, expected)
    assert not count or float(actual.max()) > 0.5


@pytest.mark.parametrize("count", [0, 20])
def test_keypoints_are_where_the_stretched_map_is_highest(count: int) -> None:
    maps = torch.randn(count, 3, 14, 14, generator=generator(0))
    boxes = draw_boxes(count, 80)
    if count:
        boxes[0, 2:] = boxes[0, :2] + 0.3  # less than a pixel
    expected = detection.roi_heads.heatmaps_to_keypoints(maps, boxes)
    torch.testing.assert_close(find_keypoints(maps, boxes), expected)


def functions() -> list[Any]:
    return [
        ops.boxes.batched_nms,
        ops.poolers._multiscale_roi_align,
        detection.transform.paste_masks_in_image,
        detection.roi_heads.heatmaps_to_keypoints,
    ]


def interrupted(model: nn.Module) -> None:
    before = functions()
    with traceable_detectors(model):
        assert not set(functions()) & set(before)
        raise RuntimeError("in the trace")


def test_torchvision_has_its_functions_back_even_after_an_error() -> None:
    before = functions()
    part = detection.transform.GeneralizedRCNNTransform(8, 8, [0.0], [1.0])
    with pytest.raises(RuntimeError, match="in the trace"):
        interrupted(nn.Sequential(part))
    assert functions() == before


def test_a_model_without_detectors_leaves_torchvision_alone() -> None:
    before = functions()
    with traceable_detectors(nn.Linear(2, 2)):
        assert functions() == before


class Pyramid(nn.Module):
    """Two levels of features of images (3, height, width)."""

    out_channels = 32

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 32, 3, stride=8, padding=1)
        self.second = nn.Conv2d(32, 32, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        first = self.first(x).relu()
        return {"0": first, "1": self.second(first)}


SIZES: dict[str, Any] = {"min_size": 32, "max_size": 48}
ANCHORS = detection.anchor_utils.AnchorGenerator(((8,), (16,)), ((0.5, 1.0, 2.0),) * 2)
RCNN: dict[str, Any] = {
    **SIZES,
    "rpn_anchor_generator": ANCHORS,
    "rpn_pre_nms_top_n_test": 20,
    "rpn_post_nms_top_n_test": 20,
    "box_score_thresh": 0.0,
    "box_detections_per_img": 5,
}


def make_fcos() -> nn.Module:
    anchors = detection.anchor_utils.AnchorGenerator(((8,), (16,)), ((1.0,),) * 2)
    return detection.FCOS(
        Pyramid(), 3, **SIZES, anchor_generator=anchors, score_thresh=0.0, detections_per_img=9
    )


def make_rcnn(kind: str) -> nn.Module:
    """With heads of few channels; torchvision's own have 20 million weights."""
    pool = ops.MultiScaleRoIAlign(["0", "1"], 14, 2)
    options: dict[str, Any] = {
        **RCNN,
        "box_roi_pool": ops.MultiScaleRoIAlign(["0", "1"], 7, 2),
        "box_head": detection.faster_rcnn.TwoMLPHead(32 * 7 * 7, 16),
        "box_predictor": detection.faster_rcnn.FastRCNNPredictor(16, 3),
    }
    if kind == "MaskRCNN":
        return detection.MaskRCNN(
            Pyramid(),
            **options,
            mask_roi_pool=pool,
            mask_head=detection.mask_rcnn.MaskRCNNHeads(32, (8, 8), 1),
            mask_predictor=detection.mask_rcnn.MaskRCNNPredictor(8, 8, 3),
        )
    return detection.KeypointRCNN(
        Pyramid(),
        **options,
        keypoint_roi_pool=pool,
        keypoint_head=detection.keypoint_rcnn.KeypointRCNNHeads(32, (8, 8)),
        keypoint_predictor=detection.keypoint_rcnn.KeypointRCNNPredictor(8, 2),
    )


def make(kind: str) -> nn.Module:
    torch.manual_seed(0)
    return (make_fcos() if kind == "FCOS" else make_rcnn(kind)).eval()


def draw_images(*sizes: tuple[int, int]) -> list[Tensor]:
    return [torch.rand(3, *size, generator=generator(sum(size))) for size in sizes]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["FCOS", "MaskRCNN", "KeypointRCNN"])
def test_a_detector_finds_the_same_as_a_file(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    model = make(kind)
    images = draw_images((32, 40), (40, 32))
    inputs = ModelInputs((images,))
    module = OnnxRuntimeModel(export_onnx(model, inputs, tmp_path / "detector.onnx"))
    assert not caplog.records
    for scale in (1.0, 0.5):  # other images find another number of objects
        seen = [image * scale for image in images]
        with torch.no_grad():
            expected = model(seen)
        actual = module(seen)
        assert [len(found["boxes"]) for found in actual] == [len(f["boxes"]) for f in expected]
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)
    assert parity(model, module, inputs).max_abs_error < 1e-2
    with pytest.raises(ExportError, match="arguments that it was exported with"):
        module(images[:1])


class Suppress(nn.Module):
    """Of the boxes with a score above a half those that do not overlap a better one."""

    def forward(self, boxes: Tensor, scores: Tensor, classes: Tensor) -> Tensor:
        sure = scores > 0.5
        boxes, scores, classes = boxes[sure], scores[sure], classes[sure]
        return boxes[batched_nms(boxes, scores, classes, 0.4)]


@pytest.mark.slow
def test_a_file_may_find_nothing(tmp_path: Path) -> None:
    boxes, classes = draw_boxes(30, 20), torch.randint(2, (30,), generator=generator(0))
    scores = torch.rand(30, generator=generator(1))
    inputs = ModelInputs((boxes, scores, classes))
    module = OnnxRuntimeModel(export_onnx(Suppress(), inputs, tmp_path / "m.onnx"))
    for each in (scores, scores / 2):
        torch.testing.assert_close(module(boxes, each, classes), Suppress()(boxes, each, classes))
    assert len(module(boxes, scores / 2, classes)) == 0
