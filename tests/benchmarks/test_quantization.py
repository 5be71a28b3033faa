"""What `benchmarks.quantization` feeds its peers, and what it makes of its rows."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from PIL import Image

from benchmarks.quantization import SETTINGS, is_clearly_worse, latency_key, summarize
from benchmarks.quantization_models import make_case, pick, read_jpegs, sentence_batches
from benchmarks.quantization_peers import Reader, open_session, predict, split_batches


def row(method: str, accuracy: float, ratio: float, seconds: float = 1.0) -> dict[str, Any]:
    return {
        "case": "efficientnet_lite0",
        "method": method,
        "accuracy %": accuracy,
        "drop": 90.0 - accuracy,
        "seconds": seconds,
        "right": torch.arange(400) < 4 * accuracy,
        **{latency_key(*setting): ratio for setting in SETTINGS},
    }


def test_a_peer_that_is_faster_or_more_accurate_than_ours_is_seen() -> None:
    own = [row("float32", 90.0, 1.0), row("ours, static", 89.5, 2.2), row("W4, nearest", 90.0, 9.0)]
    assert summarize([*own, row("NNCF", 89.5, 2.25)]) == {
        "efficientnet_int8_drop": 0.5,
        "efficientnet_latency_ratio": 2.2,
        "never_worse_than_peers": 1.0,
        "never_worse_beyond_chance": 1.0,
        "points_behind_peers": 0.0,
    }
    more_accurate = summarize([*own, row("NNCF", 89.75, 1.0)])
    assert more_accurate["never_worse_than_peers"] == 0.0
    assert more_accurate["never_worse_beyond_chance"] == 1.0  # one sample
    assert more_accurate["points_behind_peers"] == 0.25
    faster = summarize([*own, row("NNCF", 80.0, 3.0)])
    assert faster["never_worse_than_peers"] == faster["never_worse_beyond_chance"] == 0.0


def test_five_samples_for_none_are_no_chance_and_four_are() -> None:
    labels = torch.ones(100, dtype=torch.bool)
    for lost, is_clear in ((4, False), (5, True)):
        worse = {"right": torch.arange(100) >= lost}
        assert is_clearly_worse(worse, {"right": labels}) == is_clear
        assert not is_clearly_worse({"right": labels}, worse)


def test_a_row_that_came_to_nothing_counts_for_nobody() -> None:
    failed = row("NNCF", 99.0, 9.0) | {latency_key(*SETTINGS[0]): None}
    summary = summarize([row("ours, static", 89.5, 2.2), failed])
    assert "never_worse_than_peers" not in summary


def test_accuracy_control_has_the_time_of_the_export_too() -> None:
    rows = [
        row("float32", 90.0, 1.0, seconds=3.0),
        row("ours, static", 89.5, 2.2, seconds=4.0),
        row("ours, within delta", 89.5, 2.2, seconds=6.0),
        row("NNCF accuracy control", 89.5, 2.2, seconds=5.0),
    ]
    assert summarize(rows)["seconds_of_accuracy_control"] == pytest.approx(0.5)
    assert summarize(rows)["seconds_within_delta"] == pytest.approx(0.75)


def test_accuracy_is_of_the_samples_in_their_order() -> None:
    samples = torch.eye(5)[torch.tensor([4, 0, 1, 2] * 10)]
    labels = torch.tensor([4, 0, 1, 3] * 10)
    case = make_case("eye", torch.nn.Identity(), samples[:3], samples, labels)
    accuracy, predictions = case.evaluate(lambda batch: batch.call(case.model))
    assert accuracy == 75.0
    assert predictions.tolist() == [4, 0, 1, 2] * 10
    assert len(case.evaluation) == 3
    assert case.example.batch_size == 2


def test_picked_samples_are_of_the_whole_range() -> None:
    assert pick(torch.arange(10), 5).tolist() == [0, 2, 4, 6, 8]
    assert pick(torch.arange(3), 5).tolist() == [0, 1, 2]


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
    images, labels = read_jpegs(tmp_path / "images.npz", "test_")
    assert images.shape == (2, 3, 32, 32)
    assert images.float().mean((1, 2, 3)).tolist() == pytest.approx([10, 200], abs=1)
    assert labels.tolist() == [3, 7]


def test_an_epoch_has_every_sentence_once_without_the_common_padding() -> None:
    lengths = torch.randint(2, 9, (100,), generator=torch.Generator().manual_seed(0))
    tokens = (torch.arange(64) < lengths[:, None]).long() * torch.arange(1, 101)[:, None]
    seen = []
    for batch, labels in sentence_batches(tokens, torch.arange(100), 100, seed=0):
        assert (batch != 0).sum(1).max() == batch.shape[1]
        assert (batch[:, 0] - 1 == labels).all()
        seen += labels.tolist()
    assert sorted(seen) == list(range(100))


def test_single_samples_give_the_answers_of_their_batches(tmp_path: Path) -> None:
    node = helper.make_node("Neg", ["input"], ["output"])
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 4])
        for name in ("input", "output")
    ]
    model = helper.make_model(
        helper.make_graph([node], "g", values[:1], values[1:]),
        ir_version=10,
        opset_imports=[helper.make_opsetid("", 20)],
    )
    onnx.save(model, tmp_path / "neg.onnx")
    numbers = np.random.default_rng(0).standard_normal((7, 4), np.float32)
    feeds = [{"input": numbers[:3]}, {"input": numbers[3:]}]
    samples = list(split_batches(feeds))
    assert len(samples) == 7
    session = open_session(tmp_path / "neg.onnx")
    assert predict(session, samples, batch_size=2).tolist() == numbers.argmin(1).tolist()
    reader = Reader(feeds)
    assert [reader.get_next() for _ in range(3)] == [*feeds, None]
