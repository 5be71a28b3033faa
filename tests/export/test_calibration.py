from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from compressor.errors import DataError, ModelError
from compressor.export.calibration import check_model, read_calibration
from compressor.export.onnxruntime_model import OnnxRuntimeModel
from compressor.export.quantize import quantize

IMAGES = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.zeros(16, dtype=torch.int64)


class Detector(nn.Module):
    """Takes a list of images, as torchvision's detectors do."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Conv2d(3, 4, 3)

    def forward(self, images: list[Tensor]) -> Tensor:
        return self.body(torch.stack(images)).mean((2, 3))


class Masked(nn.Module):
    """A product of rows and a mask, between two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.second(self.first(x) * mask)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 2))


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        (IMAGES.numpy(), r"is a numpy array.*torch\.from_numpy"),
        ([IMAGES.numpy()], r"numpy array.*torch\.from_numpy"),
        ([(IMAGES.numpy(),)], r"numpy array.*torch\.from_numpy"),
        ([{"input": np.zeros(3)}], r"numpy array.*torch\.from_numpy"),
        (IMAGES, "in brackets"),
        (["images"], "of type str, has no tensor"),
        ("images", "of type str, not batches"),
        (None, r"No calibration was given.*quantize\(model, \[inputs\]\)"),
        (lambda: [IMAGES], "of type function, not batches"),
        ([(IMAGES, LABELS)], r"without labels.*\[x for x, _ in loader\]"),
        (DataLoader(TensorDataset(IMAGES, LABELS), 8), r"\[x for x, _ in loader\]"),
        ([{"input": IMAGES, "labels": LABELS}], "unexpected keyword argument 'labels'"),
        (TensorDataset(IMAGES), r"single samples: write DataLoader"),
        ([IMAGES[0]], "samples along dimension 0"),
        ([IMAGES.double()], r"\(16, 3, 8, 8\) torch\.float64"),
    ],
)
def test_what_is_no_calibration_is_an_error_that_says_what_to_write(
    calibration: Any, message: str
) -> None:
    with pytest.raises(DataError, match=f"(?s){message}"):
        quantize(net(), calibration)


def test_arguments_of_different_lengths_are_an_error_with_their_shapes() -> None:
    rows = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))
    with pytest.raises(DataError, match=r"\(16, 8\) torch.float32, \(15, 8\) torch.float32"):
        quantize(Masked(), [(rows, rows[:15])])
    with pytest.raises(DataError, match=r"batch 2, of shapes \(16, 8\), \(15, 8\)"):
        quantize(Masked(), [(rows, rows), (rows, rows[:15])])


def test_a_later_batch_of_another_shape_is_an_error_with_its_number() -> None:
    with pytest.raises(DataError, match=r"batch 3, of shapes \(16, 3, 6, 8\).*samples alone"):
        quantize(net(), [IMAGES, IMAGES[:5], IMAGES[:, :, :6]])


@pytest.mark.parametrize(
    ("convert", "name"),
    [
        (nn.Module.half, "torch.float16"),
        (nn.Module.bfloat16, "torch.bfloat16"),
        (nn.Module.double, "torch.float64"),
    ],
)
def test_a_model_of_another_type_is_an_error_with_that_type(
    convert: Callable[[nn.Module], nn.Module], name: str
) -> None:
    with pytest.raises(ModelError, match=rf"are {name}.*\.float\(\)"):
        quantize(convert(net()), [IMAGES])


def test_a_model_with_one_part_of_another_type_is_not_refused() -> None:
    check_model(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).double()))
    check_model(nn.ReLU())


def test_the_first_batch_of_an_iterator_is_given_again() -> None:
    model = net().train()
    some, batches = read_calibration(iter(IMAGES.split(8)), model)
    assert some.batch_size == 2
    assert torch.cat([inputs.args[0] for inputs in batches]).equal(IMAGES)
    assert model.training, "as it was"


@pytest.mark.parametrize("count", [1, 3])  # 3: as many as an image has channels
def test_a_list_of_images_is_as_long_as_the_first_batch(count: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Detector()
    batches = [list(IMAGES[i : i + count]) for i in (0, count)]
    quantized = quantize(model, [(batch,) for batch in batches], corrections=["bias"], samples=1)
    highest = torch.cat([torch.stack(batch) for batch in batches]).max()
    scheme = quantized.plan.activations[next(iter(quantized.plan.activations))]
    top = (scheme.scheme.qmax - scheme.zero_point) * scheme.scale
    torch.testing.assert_close(top, highest, rtol=0.01, atol=0)  # both batches were observed
    file = OnnxRuntimeModel(quantized.save_onnx(tmp_path / "detector.onnx"))
    with torch.no_grad():
        torch.testing.assert_close(file(batches[1]), quantized.module(batches[1]))


def test_lists_of_images_of_two_lengths_are_an_error() -> None:
    with pytest.raises(DataError, match="batch 2 is a list of 3 images, and the first has 1"):
        quantize(Detector(), [(list(IMAGES[:1]),), (list(IMAGES[:3]),)])
