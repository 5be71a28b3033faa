"""Latency predicted from the table of single layers beside latency measured, for whole variants.

python -m benchmarks.latency_table --json latency_table.json

Random weights: what a network computes does not change how long it takes.
"""

from __future__ import annotations

import random
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.common import finish, make_parser
from compressor.config import TargetConfig
from compressor.frameworks.deployment import Deployment
from compressor.frameworks.latency_model import LatencyModel, in_int8
from compressor.frameworks.layer_costs import (
    costly_layers,
    latency_cost,
    layer_state,
    macs_cost,
    structural_changes,
)
from compressor.interfaces.inputs import ModelInputs
from compressor.profiling.counts import count
from compressor.quantization.plan import STATIC_INT8
from compressor.result import Choice, Plan
from compressor.search.space import LayerState
from compressor.structure.attention import replace_attention
from compressor.structure.factored import Factored
from compressor.structure.trace import copy_model, copy_skeleton, input_shapes
from compressor.targets.layer_latencies import LayerLatencies
from compressor.techniques import TECHNIQUES, TechniqueContext, apply_plan
from compressor.testing.models import CifarResNet, TinyResNet

CALIBRATION_SAMPLES = 8
WIDTH_MULTIPLE = 16
TAKEN = 0.6  # of the sites of a technique, at random
NARROW, SHORT, FACTORED = "channel_pruning", "block_removal", "low_rank"


@dataclass(frozen=True)
class Kind:
    """What is done to a model: techniques at random sites, and the part that is int8."""

    name: str
    techniques: tuple[str, ...] = ()
    int8_fraction: float = 0.0
    everywhere: bool = False  # at all sites instead


KINDS = (
    Kind("int8", int8_fraction=1.0),
    Kind("pruned", (NARROW,)),
    Kind("pruned, int8", (NARROW,), 1.0),
    Kind("pruned everywhere", (NARROW,), everywhere=True),
    Kind("pruned everywhere, int8", (NARROW,), 1.0, everywhere=True),
    Kind("removed", (SHORT,)),
    Kind("removed and pruned", (SHORT, NARROW)),
    Kind("removed and pruned, int8", (SHORT, NARROW), 1.0),
    Kind("low rank", (FACTORED,)),
    Kind("low rank, int8", (FACTORED,), 1.0),
    Kind("half of the layers int8", int8_fraction=0.5),
    Kind("nine tenths of the layers int8", int8_fraction=0.9),
)


@dataclass
class Bench:
    """One model on the target, with its table."""

    model: nn.Module
    inputs: ModelInputs
    folder: Path
    deployment: Deployment = field(init=False)

    def __post_init__(self) -> None:
        """Deploy the reference in float and in int8, and calibrate."""
        self.deployment = Deployment(TargetConfig(), self.folder)
        self.reference = self.deployment.reference(self.model, self.inputs)
        shape = self.inputs.tensors()[0].shape[1:]
        self.calibration = [ModelInputs((torch.randn(CALIBRATION_SAMPLES, *shape),))]
        self.quantizer = self.deployment.quantizer(self.model, self.inputs, self.calibration)
        self.int8_layers = self.quantizer.layers
        self.prunable = copy_skeleton(self.model)
        replace_attention(self.prunable)
        layers = costly_layers(self.prunable)
        self.before = {name: layer_state(layer) for name, layer in layers.items()}
        self.context = TechniqueContext(
            self.inputs, width_multiple=WIDTH_MULTIPLE, min_width=WIDTH_MULTIPLE, importance="l2"
        )
        self.techniques = {name: TECHNIQUES.get(name)() for name in (NARROW, SHORT, FACTORED)}
        self.sites = {name: self.choices_by_site(name) for name in self.techniques}
        self.reference_ms = self.deployment.time(self.reference.module, self.inputs).best_ms
        counted = count(self.prunable, self.inputs.with_batch(1)).layers
        shapes = {layer.name: layer.input_shape for layer in counted}
        macs = macs_cost(layers, {layer.name: layer.macs for layer in counted}, shapes)
        alone = latency_cost(
            layers,
            input_shapes(self.prunable, self.inputs.with_batch(1)),
            self.deployment.layer_latency_ms,
        )
        # A run without int8 is calibrated in float alone.
        self.float_latency = LatencyModel(self.before, alone, macs, LayerLatencies(None))
        self.float_latency.calibrate(self.reference_ms)
        self.latency = LatencyModel(self.before, alone, macs, LayerLatencies(None))
        self.latency.calibrate(self.reference_ms)
        mixed = self.int8_layers[1::3]
        self.latency.calibrate_int8(
            self.int8_layers,
            self.in_int8(self.int8_layers),
            mixed,
            self.in_int8([name for name in self.int8_layers if name not in mixed]),
        )
        self.sum_alone_ms = sum(alone(name, state) for name, state in self.before.items())

    def beside(self, module: nn.Module) -> float:
        """Milliseconds, measured in turn with the reference."""
        return self.deployment.time_beside(
            self.reference.module, module, self.inputs, self.reference_ms
        )

    def in_int8(self, layers: Sequence[str]) -> float:
        """Milliseconds of the reference with `layers` in int8."""
        formats = dict.fromkeys(layers, STATIC_INT8)
        return self.beside(self.deployment.quantized_file(self.quantizer, formats))

    def choices_by_site(self, technique: str) -> Mapping[str, Sequence[Choice]]:
        """The choices of a technique."""
        found: dict[str, list[Choice]] = defaultdict(list)
        for choice in self.techniques[technique].choices(self.model, self.context):
            found[choice.site].append(choice)
        return found

    def compare(self, plan: Plan, int8_layers: Collection[str]) -> tuple[float, float]:
        """Predicted and measured milliseconds of a plan with these layers in int8."""
        edited = copy_skeleton(self.prunable)
        apply_plan(edited, plan, self.techniques, self.context)
        changes = structural_changes(self.before, edited)
        states: dict[str, LayerState] = {}
        for name, state in self.before.items():
            state = changes[name].applied_to(state) if name in changes else state
            states[name] = in_int8(state) if name in int8_layers else state
        latency = self.latency if int8_layers else self.float_latency
        predicted_ms = sum(latency.cost(name, state) for name, state in states.items())
        variant = copy_model(self.model)
        apply_plan(variant, plan, self.techniques, self.context)
        # Blocks are removed, and layers of an attention that was replaced have other names.
        chains = {name for name, m in variant.named_modules() if isinstance(m, Factored)}
        left = chains | costly_layers(variant).keys()
        numbers = [
            Choice("quantization", n, {"format": "static_int8"}) for n in int8_layers if n in left
        ]
        with tempfile.TemporaryDirectory() as folder:
            deployed = self.deployment.deploy(
                variant,
                self.inputs,
                Path(folder),
                Plan((*plan, *numbers)),
                self.calibration,
            )
            return predicted_ms, self.beside(deployed.module)


def models(quick: bool) -> Iterator[tuple[str, Callable[[], nn.Module], tuple[int, ...]]]:
    """Name, maker and shape of an input."""
    yield "TinyResNet, width 32", lambda: TinyResNet(width=32), (1, 16, 16)
    if quick:
        return
    yield "CIFAR ResNet-20", lambda: CifarResNet(20), (3, 32, 32)
    from torchvision.models import VisionTransformer, mobilenet_v2

    yield "MobileNetV2 at 64", lambda: mobilenet_v2(num_classes=10), (3, 64, 64)
    yield (
        "ViT, 4 layers of 128",
        lambda: VisionTransformer(32, 8, 4, 4, 128, 512, num_classes=10),
        (3, 32, 32),
    )


def draw(bench: Bench, kind: Kind, generator: random.Random) -> tuple[Plan, list[str]]:
    """A plan of that kind, and its int8 layers."""
    choices = []
    for technique in kind.techniques:
        for options in bench.sites[technique].values():
            if kind.everywhere or generator.random() < TAKEN:
                choices.append(generator.choice(list(options)))
    int8 = [name for name in bench.int8_layers if generator.random() < kind.int8_fraction]
    return Plan(tuple(choices)), int8


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--variants", type=int, default=1, help="of each kind and model")
    arguments = parser.parse_args()
    started = time.monotonic()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for name, make, shape in models(arguments.quick):
        torch.manual_seed(arguments.seed)
        generator = random.Random(arguments.seed)
        inputs = ModelInputs((torch.randn(2, *shape),))
        with tempfile.TemporaryDirectory() as folder:
            bench = Bench(make().eval(), inputs, Path(folder))
            for kind in KINDS * (1 if arguments.quick else arguments.variants):
                plan, int8 = draw(bench, kind, generator)
                if not plan.choices and not int8:
                    continue
                predicted_ms, measured_ms = bench.compare(plan, int8)
                error = predicted_ms / measured_ms - 1
                print(f"{name}, {kind.name}: {error:+.1%}", file=sys.stderr, flush=True)
                rows.append(
                    {
                        "model": name,
                        "variant": kind.name,
                        "reference ms": bench.reference_ms,
                        "layers alone ms": bench.sum_alone_ms,
                        "predicted ratio": predicted_ms / bench.reference_ms,
                        "measured ratio": measured_ms / bench.reference_ms,
                        "error": error,
                    }
                )
    finish(rows, summarize(rows), arguments, started)


def summarize(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Medians of the error without its sign: of all, of each model, and of the mixed variants."""
    by_model: dict[str, list[float]] = defaultdict(list)
    by_kind: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        by_model[row["model"]].append(abs(row["error"]))
        by_kind[row["variant"]].append(abs(row["error"]))
    return {
        "median_error_fraction": statistics.median(abs(row["error"]) for row in rows),
        **{f"median_error_fraction {name}": statistics.median(e) for name, e in by_model.items()},
        **{f"median_error_fraction {name}": statistics.median(e) for name, e in by_kind.items()},
    }


if __name__ == "__main__":
    main()
