"""The card says what was measured, and is read by Hugging Face's own reader."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard

from compressor.report.card import About, make_card, write_card
from compressor.result import Agreement, Certificate, Choice, Interval, Parity, Plan

CERTIFICATE = Certificate(
    metric_name="accuracy",
    metric=90.9,
    reference_metric=91.64,
    delta=1.0,
    within_delta=True,
    latency_ratio=3.1,
    size_ratio=6.8,
    macs_ratio=2.0,
    params_ratio=2.5,
    latency_ms=0.25,
    reference_latency_ms=0.775,
    size_bytes=100_000,
    reference_size_bytes=680_000,
    macs=20_000_000,
    reference_macs=40_000_000,
    params=100_000,
    reference_params=250_000,
    parity=Parity(1e-6, 2.5e-7, 32),
    interval=Interval(0.34, 1.14, 0.95, 64, 3),
    agreement=Agreement(0.004, 0.05, 500),
    target={"runtime": "onnxruntime", "device": "cpu", "threads": 1, "batch_size": 1},
    looks=7,
    split="test",
    notes=("The budget of <b>bytes</b> was not kept.",),
)
PLAN = Plan(
    (
        Choice("channel_pruning", "layer1", {"kept": [0]}, "24 of 32 channels"),
        Choice("channel_pruning", "layer2", {"kept": [1]}, "24 of 32 channels"),
        Choice("quantization", "conv", {"format": "static_int8"}, "static_int8"),
    )
)


def values(certificate: Certificate = CERTIFICATE, **more: Any) -> dict[str, Any]:
    """What a result.json holds, through JSON."""
    written = {
        "schema_version": 1,
        "certificate": certificate.to_json(),
        "plan": PLAN.to_json(),
        "lost": ["TorchScript was not written."],
        "info": {
            "config": {"task_type": "classification", "seed": 3},
            "versions": {"torch": "2.15.0", "torchao": "not installed"},
        },
        "reason": "",
        **more,
    }
    return dict(json.loads(json.dumps(written)))


def test_hugging_face_reads_the_metric_from_the_front_matter() -> None:
    card = ModelCard(make_card(values(), About(name="small-resnet", dataset="cifar10")))
    (result,) = card.data.eval_results
    assert (result.metric_type, result.metric_value) == ("accuracy", 90.9)
    assert (result.dataset_name, result.dataset_split) == ("cifar10", "test")
    assert card.data.model_name == "small-resnet"
    assert card.data.tags == ["model-compression", "channel_pruning", "quantization"]


def test_every_figure_is_that_of_the_certificate() -> None:
    text = make_card(values())
    assert "accuracy 91.64 → 90.90, within 1 of the uncompressed model; 3.1x faster, 6.8x" in text
    for row in (
        "| accuracy | 91.64 | 90.90 |  |",
        "| latency, ms | 0.775 | 0.25 | 3.1 |",
        "| size, bytes | 680,000 | 100,000 | 6.8 |",
        "| MACs | 40,000,000 | 20,000,000 | 2 |",
        "| parameters | 250,000 | 100,000 | 2.5 |",
        "- Runtime: onnxruntime on cpu, 1 thread, batch size 1.",
        "- Metric, latency and size were measured on the exported file, in ONNX Runtime. "
        "The split 'test' was evaluated 7 times in all.",
        "between 0.34 and 1.14, not all of it within delta (64 parts",
        "(2.5e-07 of the largest output), on 32 samples",
        "Of 500 samples the quantized file names 0.4 % otherwise",
        "- channel_pruning: 2 places, most often 24 of 32 channels (2).",
        "- quantization: 1 place, most often static_int8 (1).",
        "- Versions: torch 2.15.0.",
        "- Seed: 3.",
        "- TorchScript was not written.",
    ):
        assert row in text, row


def test_what_was_not_measured_is_not_there() -> None:
    bare = replace(CERTIFICATE, parity=None, interval=None, agreement=None, target={}, notes=())
    text = make_card(values(bare, lost=[], info={}))
    for word in ("needed", "None", "N/A", "Runtime:", "confidence", "in torch:", "Seed", "licen"):
        assert word not in text, word
    assert "## What to know" not in text
    front = yaml.safe_load(text.split("---\n")[1])
    assert set(front) == {"library_name", "tags", "metrics", "model-index"}


def test_what_was_given_is_in_the_front_matter() -> None:
    about = About(license="apache-2.0", base_model="me/big", onnx_file="model.onnx")
    front = yaml.safe_load(make_card(values(), about).split("---\n")[1])
    assert (front["license"], front["base_model"]) == ("apache-2.0", "me/big")
    assert "onnx" in front["tags"]


def test_a_model_outside_delta_is_not_praised() -> None:
    text = make_card(values(replace(CERTIFICATE, within_delta=False)))
    assert "NOT within 1 of the uncompressed model" in text


def test_nothing_changed_says_why() -> None:
    text = make_card(values(plan=[], reason="no variant held"))
    assert "- Nothing: no variant held." in text


def test_text_of_the_user_is_shown_and_not_acted_on() -> None:
    nasty = replace(CERTIFICATE, metric_name="acc|<img src=x onerror=alert(1)>")
    text = make_card(values(nasty), About(name="a\n# b <script>"))
    body = text.split("---\n", 2)[2]
    assert "<img" not in body.replace("\\<", "")
    assert "# a # b \\<script\\>" in body
    assert "| acc\\|\\<img" in body
    assert "\\<b\\>bytes" in body


def test_the_card_is_written_from_the_file_of_a_run(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    path.write_text(json.dumps(values()))
    written = write_card(json.loads(path.read_text()), tmp_path / "README.md")
    assert written.read_text() == make_card(values())
