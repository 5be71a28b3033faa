"""How long it takes to find the channel groups, against the number of operations of the model.

The exponent is the slope of log(time) over log(operations): 1 is linear. It is fitted to processor
time, which other work on the machine changes less.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.chart import log_log_chart
from benchmarks.common import finish, make_parser
from benchmarks.coverage_checks import settle
from compressor.interfaces.inputs import ModelInputs
from compressor.structure.channels import find_groups
from compressor.structure.trace import export_graph
from compressor.testing.models import CifarResNet

Build = Callable[[], nn.Module]
CIFAR_DEPTHS = (20, 32, 56, 110)
VIT_DEPTHS = (2, 4, 8, 16, 24)
TORCHVISION = (
    "alexnet",
    "vgg11_bn",
    "resnet18",
    "resnet50",
    "resnet152",
    "mobilenet_v3_small",
    "shufflenet_v2_x1_0",
    "regnet_y_400mf",
    "efficientnet_b0",
    "densenet121",
    "convnext_tiny",
    "swin_t",
    "googlenet",
)
FULL_SIZE = ("resnet50", "vit_b_16")  # at 224 pixels, for the summary


def main() -> None:
    arguments = parse_arguments()
    started = time.monotonic()
    torch.manual_seed(arguments.seed)
    rows = [measure(*entry) for entry in list_models(arguments.quick)]
    summary = {
        f"exponent_{family}": exponent([row for row in rows if row["family"] == family])
        for family in dict.fromkeys(row["family"] for row in rows if row["family"] != "224 px")
    }
    summary |= {f"{row['model']}_seconds": row["s"] for row in rows if row["family"] == "224 px"}
    if arguments.chart:
        arguments.chart.write_text(chart(rows))
    finish(rows, summary, arguments, started)


def list_models(quick: bool) -> list[tuple[str, str, Build, int]]:
    """Family, name, how to make it, pixels."""
    cifar, vits, others = CIFAR_DEPTHS, VIT_DEPTHS, TORCHVISION
    if quick:
        cifar, vits, others = (8, 14), (2, 4), ("alexnet", "squeezenet1_1")
    models: list[tuple[str, str, Build, int]] = []
    models += [("cifar_resnet", f"ResNet-{n}", partial(CifarResNet, n), 32) for n in cifar]
    models += [("vit", f"ViT, depth {n}", partial(make_vit, n), 32) for n in vits]
    models += [("torchvision", name, partial(make_torchvision, name), 64) for name in others]
    if not quick:
        models += [("224 px", name, partial(make_torchvision, name), 224) for name in FULL_SIZE]
    return models


def measure(family: str, name: str, build: Build, size: int) -> dict[str, Any]:
    """The row of a model; of the times the lower of two, but for the large ones."""
    model, inputs = build().eval(), ModelInputs((torch.randn(2, 3, size, size),))
    settle(model, inputs)
    operations = count_operations(model, inputs)
    # growth is told by one thread's time; how long a user waits, by all
    threads = (os.cpu_count() or 1) if family == "224 px" else 1
    torch.set_num_threads(threads)
    seconds, cpu_seconds = math.inf, math.inf
    for _ in range(1 if family == "224 px" else 2):
        began, began_cpu = time.perf_counter(), time.process_time()
        found = find_groups(model, inputs)
        seconds = min(seconds, time.perf_counter() - began)
        cpu_seconds = min(cpu_seconds, time.process_time() - began_cpu)
    return {
        "family": family,
        "model": name,
        "pixels": size,
        "threads": threads,
        "operations": operations,
        "groups": len(found.groups),
        "s": seconds,
        "s of processor time": cpu_seconds,
        "ms an operation": 1000 * cpu_seconds / operations,
    }


def count_operations(model: nn.Module, inputs: ModelInputs) -> int:
    """Calls in the exported graph, in which attention, norms and linear layers are one each."""
    program = export_graph(model, inputs).run_decompositions({})
    return sum(node.op == "call_function" for node in program.graph.nodes)


def exponent(rows: Sequence[dict[str, Any]]) -> float:
    """Slope of the straight line through the logarithms."""
    operations = np.log([row["operations"] for row in rows])
    return float(np.polyfit(operations, np.log([row["s of processor time"] for row in rows]), 1)[0])


def chart(rows: Sequence[dict[str, Any]]) -> str:
    """SVG: a dot a model."""
    series = {
        family: [
            (float(row["operations"]), row["s of processor time"])
            for row in rows
            if row["family"] == family
        ]
        for family in dict.fromkeys(row["family"] for row in rows)
    }
    return log_log_chart(series, "operations", "seconds to find groups")


def make_vit(depth: int) -> nn.Module:
    from torchvision.models.vision_transformer import VisionTransformer

    return VisionTransformer(32, 8, num_layers=depth, num_heads=4, hidden_dim=64, mlp_dim=128)


def make_torchvision(name: str) -> nn.Module:
    from torchvision.models import get_model

    options = {"init_weights": False} if name == "googlenet" else {}
    return get_model(name, weights=None, **options)


def parse_arguments() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--chart", type=Path, help="write an SVG chart here")
    return parser.parse_args()


if __name__ == "__main__":
    main()
