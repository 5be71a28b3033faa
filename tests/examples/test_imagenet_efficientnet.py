"""The flow of the example on a small network and photographs that come with scikit-learn."""

from __future__ import annotations

import io
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from compressor.testing.models import TinyResNet
from tests.examples import scripts

pytestmark = pytest.mark.slow

COUNT = 48


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return scripts.load("imagenet_efficientnet", monkeypatch)


def photographs() -> list[bytes]:
    """Parts of two photographs, 256×256, as JPEG files."""
    whole = load_sample_images().images
    found = []
    for index in range(COUNT):
        top, left = 7 * index % 171, 16 * index % 384
        buffer = io.BytesIO()
        part = whole[index % 2][top : top + 256, left : left + 256]
        Image.fromarray(part).save(buffer, "JPEG")
        found.append(buffer.getvalue())
    return found


def write_images(path: Path, images: list[bytes], labels: torch.Tensor) -> None:
    np.savez(
        path,
        jpeg=np.frombuffer(b"".join(images), np.uint8),
        offsets=np.cumsum([0, *map(len, images)]),
        labels=labels.numpy(),
    )


def test_the_published_weights_see_a_flower(example: ModuleType) -> None:
    model = example.load_pretrained()
    flower = torch.from_numpy(load_sample_images().images[1][100:324, 200:424].copy())
    (scaled, _), *_ = example.Images(flower.permute(2, 0, 1)[None], torch.zeros(1))
    with torch.no_grad():
        classes = model(scaled)
    assert classes.shape == (1, 1000)
    assert 985 in classes.topk(2).indices, "the daisy, of all 1,000 classes next to a dahlia"


def test_a_network_is_quantized_without_training_and_its_file_is_judged(
    example: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files, path = photographs(), tmp_path / "imagenet_samples.npz"
    write_images(path, files, torch.zeros(COUNT, dtype=torch.long))
    images, _ = example.read_images(path, size=64, count=None)
    first = np.asarray(Image.open(io.BytesIO(files[0])))[96:160, 96:160]
    assert np.array_equal(images[0].permute(1, 2, 0).numpy(), first), "the middle"
    scaled = (images.float() - 127) / 128

    torch.manual_seed(0)
    model = TinyResNet(in_channels=3, num_classes=20).eval()
    with torch.no_grad():  # what the reference says is right
        labels = model(scaled).argmax(1)
    write_images(path, files, labels)
    monkeypatch.setattr(example, "load_pretrained", lambda: model)
    options = ("--delta", 90, "--optimization", "compression", "--run-dir", tmp_path / "run")
    result = scripts.run(example, "--data", tmp_path, *options)

    certificate = result.certificate
    logits = scripts.outputs_of_file(result.artifacts["onnx"], {"input": scaled[1::2]})
    right = (logits.argmax(1) == labels[1::2]).float().mean().item()
    assert certificate.reference_metric == pytest.approx(100)
    assert certificate.metric == pytest.approx(100 * right)
    assert certificate.size_ratio > 2
    assert all(record.epochs == 0 for record in result.variants)
