"""Does the damage that the search allocates tell which plan will be better once it is recovered?

python -m benchmarks.prediction --data DIR --json prediction.json

Random plans on a trained CIFAR ResNet: of a random half of the choices, the fewest
multiply-accumulates for a random damage. Each is recovered by a short fine-tune, and what was known
before is ranked against the drop in accuracy that is left: the allocated damage (of each choice
alone, added up) and the damage of the joint plan; after the engine's cheap repair and without it;
as the divergence of the outputs from the reference's and as the drop in accuracy, on the same few
training images. A rank correlation of 1 would put the plans in the order of their accuracies. That
of the saving alone is beside it: where it is as high, the plans differ in little else.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

from benchmarks.cifar_bench import open_cifar_bench
from benchmarks.common import ROOT, finish, make_parser
from compressor.frameworks.subset import outputs_on
from compressor.interfaces.divergence import divergence
from compressor.profiling.counts import count
from compressor.result import Choice, Plan
from compressor.search.allocate import least_cost
from compressor.search.space import Space
from compressor.search.tuning import Tuning
from compressor.seeding import isolated_rng
from compressor.structure.trace import copy_model, in_eval
from compressor.techniques import apply_plan

sys.path.insert(0, str(ROOT / "examples"))

from cifar_resnet import CifarAccuracy
from cifar_resnet_model import DEPTHS

DAMAGES = (0.02, 0.5)  # nats, of the plans that are drawn; above, no delta worth asking for holds
OFFERED = 0.5  # of the choices, to each plan
HOPELESS = 1e6  # in place of a damage that is not finite
QUICK_IMAGES = 512
WAYS = ("repaired divergence", "repaired drop", "raw divergence", "raw drop")


def main() -> None:
    arguments = parse_arguments()
    started = time.monotonic()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, isolated_rng(arguments.seed):
        rows = Measurement(arguments, Path(folder)).rows()
    finish(rows, summarize(rows), arguments, started)


class Measurement:
    """One reference, opened as the engine opens it, and what is measured of every plan."""

    def __init__(self, arguments: argparse.Namespace, folder: Path) -> None:
        self.arguments, self.folder = arguments, folder
        self.bench = open_cifar_bench(
            arguments,
            folder,
            model=arguments.model,
            precision=arguments.precision,
            techniques=arguments.techniques,
            quick_images=QUICK_IMAGES,
        )
        self.macs = self.count_macs(self.bench.reference)
        inputs, device = self.bench.subset.inputs, self.bench.device
        self.wanted = list(outputs_on(self.bench.reference, inputs, device))
        self.labels = torch.cat([labels for _, labels in self.bench.subset.batches])
        self.right = self.accuracy_of(self.wanted)

    def rows(self) -> list[dict[str, Any]]:
        """A row a plan."""
        choices = self.bench.propose()
        alone = {choice.key: self.damages(Plan((choice,))) for choice in choices}
        rows = []
        for number, plan in enumerate(self.plans(choices, alone)):
            rows.append(
                {"plan": plan.describe(), **self.row(plan, alone, self.folder / f"{number}")}
            )
            print(rows[-1], file=sys.stderr, flush=True)
        return rows

    def row(
        self, plan: Plan, alone: Mapping[str, Mapping[str, float]], folder: Path
    ) -> dict[str, Any]:
        """What was known of `plan`, and its accuracy on the test images after recovery."""
        joint = self.damages(plan)
        model = self.bench.build(plan)
        ratio = self.macs / self.count_macs(model)
        epochs, tuning = self.arguments.epochs, Tuning()
        self.bench.recover(model, plan, epochs, folder, is_final=False, tuning=tuning)
        return {
            "MACs ratio": ratio,
            **{f"allocated, {way}": sum(alone[c.key][way] for c in plan) for way in WAYS},
            **{f"joint, {way}": joint[way] for way in WAYS},
            "accuracy %": CifarAccuracy().apply(model, self.bench.data["test"])["accuracy"],
        }

    def plans(
        self, choices: Sequence[Choice], alone: Mapping[str, Mapping[str, float]]
    ) -> Iterator[Plan]:
        """As many different ones as are asked for."""
        random = np.random.default_rng(self.arguments.seed)
        damage = {key: ways["repaired divergence"] for key, ways in alone.items()}
        cost, layers = self.bench.layer_cost("macs"), self.bench.layers()
        effects = self.bench.effects(choices)
        seen = {Plan().digest}
        while len(seen) <= self.arguments.plans:
            offered = [choice for choice in choices if random.random() < OFFERED]
            space = Space(offered, effects, layers)
            limit = math.exp(random.uniform(math.log(DAMAGES[0]), math.log(DAMAGES[1])))
            options = least_cost(space.problem(damage, cost), limit)
            plan = Plan() if options is None else space.plan(options)
            if plan.digest not in seen:
                seen.add(plan.digest)
                yield plan

    def damages(self, plan: Plan) -> dict[str, float]:
        """In each of `WAYS`: divergence in nats, drop in points of accuracy."""
        repaired, raw = self.bench.build(plan), self.unrepaired(plan)
        inputs, device = self.bench.subset.inputs, self.bench.device
        outputs = [list(outputs_on(model, inputs, device)) for model in (repaired, raw)]
        values = (
            self.bench.damage_of(plan),
            self.right - self.accuracy_of(outputs[0]),
            divergence(outputs[1], self.wanted, is_classifier=True),
            self.right - self.accuracy_of(outputs[1]),
        )
        finite = (value if math.isfinite(value) else HOPELESS for value in values)
        return dict(zip(WAYS, finite, strict=True))

    def unrepaired(self, plan: Plan) -> nn.Module:
        """A copy of the reference with the plan made, and nothing else."""
        model = copy_model(self.bench.reference)
        apply_plan(model, plan, self.bench.techniques, self.bench.context)
        return in_eval(model)

    def accuracy_of(self, outputs: Sequence[Sequence[Tensor]]) -> float:
        """Percent of the few training images."""
        guesses = torch.cat([logits.argmax(1) for (logits,) in outputs])
        return 100 * float((guesses == self.labels).float().mean())

    def count_macs(self, model: nn.Module) -> int:
        return count(model, self.bench.example.with_batch(1)).macs


def summarize(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The rank correlation of each way of measuring with the drop after recovery."""
    drops = [-row["accuracy %"] for row in rows]
    ratios = [row["MACs ratio"] for row in rows]
    summary = {"plans": len(rows), "spearman MACs ratio alone": rank_correlation(ratios, drops)}
    for kind in ("allocated", "joint"):
        for way in WAYS:
            damages = [row[f"{kind}, {way}"] for row in rows]
            summary[f"spearman {kind}, {way}"] = rank_correlation(damages, drops)
    return summary


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Spearman's, equal values sharing their rank; nan if all values of one are equal."""
    if len(set(first)) < 2 or len(set(second)) < 2:
        return math.nan
    return float(spearmanr(first, second).statistic)


def parse_arguments() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--model", choices=DEPTHS, default="resnet20")
    parser.add_argument("--plans", type=int, default=24)
    parser.add_argument("--epochs", type=int, default=2, help="of each recovery")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="bf16")
    parser.add_argument(
        "--techniques",
        nargs="+",
        default=["channel_pruning", "block_removal", "low_rank"],
        help="that change the structure: numbers of few bits are neither repaired nor recovered",
    )
    arguments = parser.parse_args()
    if arguments.data is None:
        parser.error("give the folder of the images and weights: --data DIR")
    arguments.data = Path(arguments.data)
    if arguments.quick:
        arguments.plans, arguments.epochs, arguments.techniques = 3, 1, ["block_removal"]
    return arguments


if __name__ == "__main__":
    main()
