"""What `benchmarks.structured_pruning` makes of its rows."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.structured_pruning import decode, summarize


def row(network: str, accuracy: float, latency: float) -> dict[str, object]:
    return {
        "network": network,
        "accuracy %, trained": accuracy,
        "latency ratio, batch 1": latency,
        "latency ratio, batch 32": 2 * latency,
    }


def test_each_side_is_judged_by_its_best_criterion() -> None:
    rows = [
        row("unpruned", 93.0, 1.0),
        row("ours, 2x", 91.0, 1.5),
        row("ours, 2x", 92.0, 1.4),
        row("torch-pruning, 2x", 90.5, 1.3),
    ]
    assert summarize(rows, [2.0]) == {
        "reference_accuracy": 93.0,
        "ours_2x_drop": pytest.approx(1.0),
        "ours_2x_latency_ratio": 1.4,
        "ours_2x_latency_ratio_batch_32": 2.8,
        "peer_2x_drop": pytest.approx(2.5),
        "peer_2x_latency_ratio": 1.3,
        "peer_2x_latency_ratio_batch_32": 2.6,
    }


def test_images_come_out_of_their_files_in_order(tmp_path: Path) -> None:
    files = []
    for shade in (10, 200):
        file = io.BytesIO()
        Image.fromarray(np.full((32, 32, 3), shade, np.uint8)).save(file, "JPEG")
        files.append(file.getvalue())
    np.savez(
        tmp_path / "images.npz",
        test_jpeg=np.frombuffer(b"".join(files), np.uint8),
        test_offsets=np.cumsum([0, *map(len, files)]),
        test_labels=np.array([3, 7]),
    )
    images, labels = decode(tmp_path / "images.npz", "test")
    assert images.shape == (2, 3, 32, 32)
    assert images.float().mean((1, 2, 3)).tolist() == pytest.approx([10, 200], abs=1)
    assert labels.tolist() == [3, 7]
