"""How long it takes to measure the damage of choices, against their number.

One block or one width of each channel group is a choice. A choice costs a pass over the model from
its site on, with the repair in it, so seconds are given in passes of the reference over the same
samples as well: their exponent, the slope of log(passes) over log(choices), is 1 if sensing is
linear. Times are of the processor, which other work on the machine changes less.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.chart import log_log_chart
from benchmarks.common import finish, make_parser
from benchmarks.group_time import make_vit
from compressor.frameworks.sensing import Sensing
from compressor.frameworks.subset import Subset, outputs_on
from compressor.interfaces.inputs import ModelInputs
from compressor.result import Choice, Plan
from compressor.structure.prefix import MOST_BYTES
from compressor.techniques import BlockRemoval, ChannelPruning, Technique, TechniqueContext
from compressor.testing.models import CifarResNet

CIFAR_DEPTHS = (14, 20, 32, 56)
VIT_DEPTHS = (3, 6, 12)
SAMPLES = 128


def main() -> None:
    arguments = parse_arguments()
    started = time.monotonic()
    torch.manual_seed(arguments.seed)
    torch.set_num_threads(1)
    rows = []
    for depth in (8, 14) if arguments.quick else CIFAR_DEPTHS:
        rows.append(measure("CIFAR ResNet", f"ResNet-{depth}", CifarResNet(depth)))
    for depth in (2, 4) if arguments.quick else VIT_DEPTHS:
        rows.append(measure("ViT", f"ViT, depth {depth}", make_vit(depth)))
    summary = {}
    for family in dict.fromkeys(row["family"] for row in rows):
        own = [row for row in rows if row["family"] == family]
        summary[f"{family}_exponent"] = exponent(own, "passes")
        summary[f"{family}_exponent_without_reuse"] = exponent(own, "passes without reuse")
    if arguments.chart:
        arguments.chart.write_text(chart(rows))
    finish(rows, summary, arguments, started)


def measure(family: str, name: str, model: nn.Module) -> dict[str, Any]:
    """The row of a model."""
    inputs = (ModelInputs((torch.randn(SAMPLES, 3, 32, 32),)),)
    subset = Subset(inputs, inputs)
    model.eval()
    context = TechniqueContext(
        inputs[0].with_batch(2), width_multiple=1, min_width=1, importance="l2"
    )
    techniques: dict[str, Technique] = {
        each.name: each for each in (ChannelPruning(), BlockRemoval())
    }
    choices = list_choices(model, techniques, context)

    def sense(prefix_bytes: int) -> float:
        sensing = Sensing(
            model,
            subset,
            techniques,
            lambda: context,
            is_classifier=True,
            prefix_bytes=prefix_bytes,
        )
        ordered = sorted(choices, key=lambda choice: sensing.time_of(choice.site))
        return cpu_seconds(lambda: [sensing.damage_of(Plan((choice,))) for choice in ordered])

    one_pass = min(
        cpu_seconds(lambda: list(outputs_on(model, inputs, torch.device("cpu")))) for _ in range(3)
    )
    reused, full = sense(MOST_BYTES), sense(0)
    return {
        "family": family,
        "model": name,
        "choices": len(choices),
        "s of a pass": one_pass,
        "s": reused,
        "s without reuse": full,
        "passes": reused / one_pass,
        "passes without reuse": full / one_pass,
    }


def list_choices(
    model: nn.Module, techniques: Mapping[str, Technique], context: TechniqueContext
) -> list[Choice]:
    """The first of each technique at each site."""
    found: dict[tuple[str, str], Choice] = {}
    for technique in techniques.values():
        for choice in technique.choices(model, context):
            found.setdefault((choice.technique, choice.site), choice)
    return list(found.values())


def cpu_seconds(call: Callable[[], object]) -> float:
    began = time.process_time()
    call()
    return time.process_time() - began


def exponent(rows: Sequence[dict[str, Any]], key: str) -> float:
    """Slope of the straight line through the logarithms."""
    choices = [math.log(row["choices"]) for row in rows]
    return float(np.polyfit(choices, np.log([row[key] for row in rows]), 1)[0])


def chart(rows: Sequence[dict[str, Any]]) -> str:
    """SVG: a dot a model, with and without reuse."""
    series = {}
    for family in dict.fromkeys(row["family"] for row in rows):
        own = [row for row in rows if row["family"] == family]
        for key in ("passes", "passes without reuse"):
            label = f"{family}{key.removeprefix('passes')}"
            series[label] = [(float(row["choices"]), row[key]) for row in own]
    return log_log_chart(series, "choices", "passes of the reference")


def parse_arguments() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--chart", type=Path, help="write an SVG chart here")
    return parser.parse_args()


if __name__ == "__main__":
    main()
