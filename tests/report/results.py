"""Results made by hand: one that has everything a page can show, and one with hostile names."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from compressor.evidence import Frozen, LayerBill, LayerRow, Sensed
from compressor.result import (
    Agreement,
    Certificate,
    Choice,
    Cost,
    Interval,
    Parity,
    Plan,
    Result,
    VariantRecord,
)

CERTIFICATE = Certificate(
    metric_name="accuracy",
    metric=90.9,
    reference_metric=91.64,
    delta=1.0,
    within_delta=True,
    latency_ratio=3.125,
    size_ratio=6.8,
    macs_ratio=4.0,
    params_ratio=3.0,
    latency_ms=0.32,
    reference_latency_ms=1.0,
    size_bytes=150_000,
    reference_size_bytes=1_020_000,
    macs=10_000_000,
    reference_macs=40_000_000,
    params=100_000,
    reference_params=300_000,
    parity=Parity(1e-6, 1e-7, 32),
    interval=Interval(0.34, 0.98, 0.95, 64, 11),
    agreement=Agreement(0.01, 0.02, 200),
    target={"runtime": "onnxruntime", "device": "cpu", "threads": 1, "batch_size": 1},
    looks=12,
    split="test",
    notes=("A note on the file.",),
)
NAMES = ("conv1", "layer1.0.conv1", "layer1.0.conv2", "2", "fc")  # one looks like a number
HOSTILE = "<img src=x onerror=window.hacked=1>"
ENDING = "</script><script>window.hacked=1</script>"


def narrowed(name: str, kept: int) -> Choice:
    return Choice("channel_pruning", name, {"kept": kept}, f"{kept} of 32 channels", (name,))


def in_int8(name: str) -> Choice:
    return Choice("quantization", name, {"format": "static_int8"}, "static int8", (name,))


def record(
    name: str, accuracy: float, latency_ms: float, size_bytes: int, *choices: Choice, **changes: Any
) -> VariantRecord:
    return VariantRecord(
        name,
        Plan(choices),
        "done",
        {"accuracy": accuracy, "loss": 0.3},
        Cost(size_bytes // 4, size_bytes * 60, size_bytes, latency_ms, 40_000),
        {"latency_ms": latency_ms * 0.9, "damage": 0.01, "cost": latency_ms},
        **{"seconds": 12.5, "looks": 4, **changes},
    )


def curve(*metrics: float) -> tuple[dict[str, float], ...]:
    return tuple(
        {"epoch": float(epoch), "metric": metric, **({"loss": 1 / epoch} if epoch else {})}
        for epoch, metric in enumerate(metrics)
    )


def full_result(name: str = "layer1.0.conv1", note: str = "A decision.") -> Result:
    """Everything that a page can show; `name` is a module's, `note` is said wherever texts are."""
    int8 = [in_int8(each) for each in NAMES]
    deep = (narrowed(name, 16), *int8)
    final = record("aaaa04", 90.95, 0.31, 148_000, *deep, epochs=5, is_final=True, start="aaaa02")
    variants = [
        record("aaaa01", 91.6, 0.5, 260_000, *int8),
        record("aaaa02", 88.0, 0.33, 150_000, *deep, epochs=2, curve=curve(70.0, 85.0, 88.0)),
        VariantRecord("aaaa03", Plan((narrowed(name, 8),)), "failed", reason=note),
        replace(final, curve=curve(88.0, 90.0, 90.5, 90.95), tuning={"lr_factor": 0.5}),
        record("aaaa05", 60.0, 0.2, 90_000, narrowed(name, 8), base="aaaa01", reason=note),
    ]
    damages = [
        Sensed("channel_pruning", each, f"{kept} of 32 channels", 0.5 / kept, {"latency_ms": 0.01})
        for each in dict.fromkeys((*NAMES, name))
        for kept in (24, 16, 8)
    ]
    damages += [
        Sensed("quantization", each, "static int8", 1e-4, {"latency_ms": 0.05}) for each in NAMES
    ]
    damages.append(Sensed("block_removal", name, "removed; so much", 0.3, {"latency_ms": -0.01}))
    before, after, gone = LayerBill(9216, 10**7, 0.2), LayerBill(2304, 10**6, 0.05), LayerBill(0, 0)
    return Result(
        model=None,
        certificate=CERTIFICATE,
        variants=variants,
        frontier=[variants[3], variants[0]],
        artifacts={"onnx": Path("run/exports/model.onnx"), "report": Path("run/report.html")},
        plan=final.plan,
        lost=(note, f"sparsity: {name}: {note}"),
        info={
            "seconds": 125.0,
            "phases": {"check": 5.0, "sense": 40.0, "search": 70.0, "certify": 10.0},
            "eta_seconds": 130.0,
            "seed": 7,
            "config": {"delta": 1.0, "metric_mode": "max", "optimization": "latency", "run": note},
            "machine": {"cpu": "A processor", "cores": 2, "int8_instructions": [], "gpu": None},
            "versions": {"python": "3.11", "compressor": "0.1", "torch": "2.15"},
        },
        decisions=(note, "Variant aaaa04 is taken: it has the least latency_ms."),
        damages=tuple(damages),
        layers=(
            *(
                LayerRow(each, "Conv2d", before, after, "static_int8")
                for each in NAMES
                if each != name
            ),
            LayerRow(name, "Conv2d", before, gone),
            LayerRow("bn", note, LayerBill(64, 0), LayerBill(16, 0)),
        ),
        frozen=(
            Frozen("sparsity", name, note),
            *(Frozen("channel_pruning", f"block{i}", "Its width is fixed.") for i in range(12)),
        ),
        chosen="aaaa04",
    )


def hostile_result() -> Result:
    """Names that would be elements, scripts or links, if they were taken as such."""
    result = full_result(HOSTILE, ENDING)
    named = replace(result.certificate, metric_name=HOSTILE, notes=(ENDING,), split=HOSTILE)
    variants = [
        replace(each, metrics={HOSTILE: each.metrics["accuracy"]} if each.metrics else {})
        for each in result.variants
    ]
    return replace(result, certificate=named, variants=variants, artifacts={HOSTILE: Path("x")})
