"""What more processes are worth: variants an hour with Ray, one model's steps under DDP, and more.

python -m benchmarks.scaling --data DIR --json scaling.json

Measured, one thread a process: variants of a CIFAR ResNet-20 on the exact images, made in rounds by
one and by two workers of Ray, with their costs measured in between as in a run; the step of two
processes under DDP (and Horovod, where it is installed) against one process with the same batch
each; what an edit of the model takes them; and, in one process, the calls to the model's replica,
which a trainer makes only where there are several.

Reckoned from these: steps of up to 64 processes (a ring of all-reduces over networks of several
speeds, with nothing hidden behind the backward pass and with all that fits there), and a search of
256 variants by up to 256 workers, whose times are drawn from those that were measured. A wider
round knows less of earlier variants; what that costs the search is not in these numbers.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.cifar_bench import open_cifar_bench
from benchmarks.common import ROOT, finish, make_parser
from compressor.config import ExecutorConfig
from compressor.frameworks.torch_bench import TorchBench
from compressor.result import Plan, VariantRecord
from compressor.search.making import InlineMaker, Work
from compressor.seeding import isolated_rng

CHANGED_SITES = 0.4  # of those that a technique offers, in each plan
QUICK_IMAGES = 256
PROCESSES = (2, 4, 8, 16, 32, 64)
WORKERS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
TRIALS = 256
DRAWS = 200  # of searches, whose makespans are averaged
BACKWARD = 2 / 3  # of a step's time, behind which messages can hide
NETWORKS = {"10 Gbit/s": 1.25e9, "100 Gbit/s": 12.5e9}  # bytes a second
NETWORK_LATENCY = 20e-6  # seconds, of a message in a data centre over TCP


def main() -> None:
    arguments = parse_arguments()
    started = time.monotonic()
    rows: list[dict[str, Any]] = []
    summary: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder, isolated_rng(arguments.seed):
        if "ray" in arguments.parts:
            made = time_workers(arguments, Path(folder))
            rows += made.rows()
            rows += search_rows(made, arguments.seed)
            summary["ray_speedup_2"] = made.speedup
        if "ranks" in arguments.parts:
            ranks = time_ranks(arguments, Path(folder))
            rows += rank_rows(ranks)
            summary |= summarize_ranks(ranks)
    finish(rows, summary, arguments, started)


def row(what: str, processes: int, value: float, unit: str) -> dict[str, Any]:
    return {"what": what, "processes": processes, "value": value, "unit": unit}


# variants by workers of Ray ---------------------------------------------------------------------


@dataclass(frozen=True)
class Rounds:
    """What making the same variants took.

    Attributes:
        hours: in all, by the number of workers; 0 is this process itself.
        opening: seconds until the workers were there.
        making: seconds of each variant in a worker.
        measuring: seconds of each variant in the engine's process, one after the other.
    """

    hours: Mapping[int, float]
    opening: Mapping[int, float]
    making: Sequence[float]
    measuring: Sequence[float]

    @property
    def speedup(self) -> float:
        return self.hours[1] / self.hours[2]

    def rows(self) -> list[dict[str, Any]]:
        count = len(self.making)
        names = {number: "Ray" if number else "inline" for number in self.hours}
        rate = [row(names[n], n, count / hours, "variants/h") for n, hours in self.hours.items()]
        up = [row("Ray is there", n, seconds, "s") for n, seconds in self.opening.items()]
        return [
            *rate,
            row("Ray, speed-up", 2, self.speedup, "x"),
            *up,
            row("a variant in a worker", 1, sum(self.making) / count, "s"),
            row("its cost, measured alone", 1, sum(self.measuring) / count, "s"),
        ]


def time_workers(arguments: argparse.Namespace, folder: Path) -> Rounds:
    """Make the same variants by nobody else, by one worker and by two."""
    torch.set_num_threads(1)
    bench = open_cifar_bench(
        arguments,
        folder,
        model="resnet20",
        precision="fp32",
        techniques=["channel_pruning"],
        quick_images=QUICK_IMAGES,
    )
    plans = draw_plans(bench, arguments)
    hours, opening = {}, {}
    making: list[float] = []
    measuring: list[float] = []
    for count in (0, 1, 2):
        variants = folder / f"run{count}" / "variants"
        executor = ExecutorConfig("ray", max(count, 1)) if count else ExecutorConfig()
        began = time.monotonic()
        with bench.workers(executor, variants) as workers:
            opening[count] = time.monotonic() - began
            maker = workers or InlineMaker(bench, variants)
            began = time.monotonic()
            for first in range(0, len(plans), maker.width):
                works = [
                    Work(VariantRecord(f"plan{number}", plan, "failed"), arguments.epochs)
                    for number, plan in list(enumerate(plans))[first : first + maker.width]
                ]
                come = time.monotonic()
                for work, one in zip(works, maker.make(works), strict=True):
                    if one.judged is None:
                        raise SystemExit(f"A variant failed: {one.reason}")
                    arrived = variants / work.record.id / "deployed" / "arrived.json"
                    if count == 1:
                        alone = json.loads(arrived.read_text())["seconds"]
                        making.append(alone)
                        measuring.append(one.seconds - alone)
                print(f"{count} workers: round of {time.monotonic() - come:.1f} s", file=sys.stderr)
            hours[count] = (time.monotonic() - began) / 3600
    del opening[0]
    return Rounds(hours, opening, making, measuring)


def draw_plans(bench: TorchBench, arguments: argparse.Namespace) -> list[Plan]:
    """Random ones: at some of the sites, one of the choices that there are."""
    draw = random.Random(arguments.seed)
    sites: dict[str, list[Any]] = {}
    for choice in bench.propose():
        sites.setdefault(choice.site, []).append(choice)
    count = max(round(CHANGED_SITES * len(sites)), 1)
    return [
        Plan(tuple(draw.choice(sites[site]) for site in draw.sample(sorted(sites), count)))
        for _ in range(arguments.variants)
    ]


# a search with more workers ---------------------------------------------------------------------


def search_rows(made: Rounds, seed: int) -> list[dict[str, Any]]:
    """Hours of a whole search, and how far they are from so many workers' share of it."""
    hours = {
        workers: makespan(made.making, made.measuring, workers, seed) / 3600 for workers in WORKERS
    }
    rows = [row(f"search of {TRIALS} variants", n, value, "h") for n, value in hours.items()]
    shares = [row("its efficiency", n, hours[1] / value / n, "") for n, value in hours.items()]
    return rows + shares


def makespan(
    making: Sequence[float],
    measuring: Sequence[float],
    workers: int,
    seed: int,
    trials: int = TRIALS,
) -> float:
    """Mean seconds of a search in rounds: the slowest of each, then the measurements in turn."""
    draw = random.Random(seed)
    total = 0.0
    for _ in range(DRAWS):
        for first in range(0, trials, workers):
            width = min(workers, trials - first)
            total += max(draw.choices(making, k=width)) + sum(draw.choices(measuring, k=width))
    return total / DRAWS


# one model in several processes -----------------------------------------------------------------


def time_ranks(arguments: argparse.Namespace, folder: Path) -> dict[str, dict[str, Any]]:
    """What `benchmarks.scaling_ranks` measured, by how it was started."""
    python = [sys.executable, "-m"]
    torchrun = [*python, "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"]
    starts = {"one": python, "DDP": torchrun}
    if importlib.util.find_spec("horovod") is not None:
        horovodrun = str(Path(sys.executable).with_name("horovodrun"))
        starts["Horovod"] = [horovodrun, "-np", "2", "--gloo", *python]
    found = {}
    for name, start in starts.items():
        out = folder / f"{name}.json"
        options = ["--out", str(out), *(["--horovod"] if name == "Horovod" else [])]
        if arguments.quick:
            options += ["--steps", "8", "--edits", "2", "--batch", "8", "--rounds", "3"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        subprocess.run(
            [*start, "benchmarks.scaling_ranks", *options], cwd=ROOT, env=environment, check=True
        )
        found[name] = json.loads(out.read_text())
        print(name, found[name], file=sys.stderr, flush=True)
    return found


def rank_rows(ranks: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What was measured, and what follows for more processes."""
    one, ddp = ranks["one"], ranks["DDP"]
    rows = [row("replica of one process", 1, one["replica_us"], "us")]
    for name, own in ranks.items():
        rows += [
            row(f"{name}: step", own["processes"], own["step_ms"], "ms"),
            row(f"{name}: taken by an edit", own["processes"], own["edit_ms"], "ms"),
        ]
        if own["processes"] > 1:
            share = one["step_ms"] / own["step_ms"]
            rows.append(row(f"{name}: efficiency, measured", own["processes"], share, ""))
    loopback = fit_network(ddp["message_ms"])
    rows.append(row("gloo on this machine", 2, loopback.bytes_per_second / 1e9, "GB/s"))
    networks = {name: Network(rate, NETWORK_LATENCY) for name, rate in NETWORKS.items()}
    seconds, size = one["step_ms"] / 1000, one["mebibytes"] * 2**20
    for name, network in {"this machine": loopback, **networks}.items():
        for processes in PROCESSES if network is not loopback else (2,):
            for hidden, how in ((0.0, "nothing hidden"), (BACKWARD, "hidden behind backward")):
                value = efficiency(seconds, size, network, processes, hidden)
                rows.append(row(f"DDP, reckoned, {name}, {how}", processes, value, ""))
    return rows


def summarize_ranks(ranks: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    one = ranks["one"]
    several = {name: own for name, own in ranks.items() if own["processes"] > 1}
    return {
        "replica_of_one_us": one["replica_us"],
        **{
            f"{name.lower()}_efficiency_2": one["step_ms"] / v["step_ms"]
            for name, v in several.items()
        },
        **{f"{name.lower()}_rebind_ms": own["edit_ms"] for name, own in several.items()},
    }


@dataclass(frozen=True)
class Network:
    """Between processes in a ring."""

    bytes_per_second: float
    latency: float


def fit_network(message_ms: Mapping[str, float]) -> Network:
    """From sums over two processes of several sizes in MiB: 2 latencies, and the bytes once."""
    sizes = sorted(message_ms, key=float)
    small, large = sizes[0], sizes[-1]
    seconds = (message_ms[large] - message_ms[small]) / 1000
    rate = (float(large) - float(small)) * 2**20 / seconds
    latency = message_ms[small] / 1000 - float(small) * 2**20 / rate
    return Network(rate, max(latency, 0.0) / 2)


def efficiency(
    step: float, size: float, network: Network, processes: int, hidden: float = 0.0
) -> float:
    """Step of one process over that of several, each with as many samples.

    Args:
        step: seconds of one process.
        size: bytes of the gradients.
        network: between neighbours in the ring (Patarasuk and Yuan, 2009).
        processes: 2 or more.
        hidden: part of `step` behind which messages can hide.
    """
    turns = 2 * (processes - 1)
    messages = turns * (size / processes / network.bytes_per_second + network.latency)
    return step / (step + max(messages - hidden * step, 0.0))


def parse_arguments() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--parts", nargs="+", choices=["ray", "ranks"], default=["ray", "ranks"])
    parser.add_argument("--variants", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=2, help="of each variant")
    arguments = parser.parse_args()
    if "ray" in arguments.parts and arguments.data is None:
        parser.error("give the folder of the images and weights: --data DIR")
    arguments.data = Path(arguments.data) if arguments.data else None
    if arguments.quick:
        arguments.variants, arguments.epochs = 2, 1
    return arguments


if __name__ == "__main__":
    main()
