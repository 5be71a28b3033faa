"""What each training method costs and gains: step time, a short training, a recovery.

OMP_NUM_THREADS=1 python -m benchmarks.methods --data DIR --cache DIR --json methods.json

Every method of `compressor.training.algorithms` on ResNet-20 and the exact images of CIFAR-10, and
those for sequences on a small BERT and SST-2 (`benchmarks.methods_table`, `methods_places`):

- time: processor time of a step with the method over one without, in float32 unless bf16 is named,
  whole fits of a few batches in turns, one thread;
- scratch: accuracy after a short training from random weights;
- recovery: accuracy after a short fine-tuning of one network without half of its work, and what is
  gained over the same fine-tuning without the method;
- levels: a longer recovery with combinations, which `finetune_compressed` is chosen from;
- text: as scratch, of sentences.

Images are trained on in bf16 and channels last, which is faster; that changes no comparison.
Of a seed all methods begin with the same weights and see the same batches, so gains are paired. A
number is a mean over seeds, its spread the standard deviation over seeds. Every training is written
to --cache as it ends, and a second start goes on there; --report makes no new ones.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import finish, make_parser
from benchmarks.methods_places import Place, Places, Schedule
from benchmarks.methods_report import level_rows, method_rows, summarize
from benchmarks.methods_table import COMBINATIONS, METHODS, PLAIN, Method, with_rates
from benchmarks.methods_time import step_time
from compressor.files import write_text
from compressor.training import Algorithm
from compressor.training.algorithm import Listener

PARTS = ("levels", "recovery", "time", "text", "scratch")
OF_EVERY_ONE = frozenset({*vars(Algorithm), *vars(Listener)})  # attributes that are no options
SGD = {"name": "SGD", "momentum": 0.9, "weight_decay": 5e-4, "nesterov": True}
SCHEDULES = {
    "scratch": Schedule(3, 2560, 32, {**SGD, "lr": 0.05}),
    "recovery": Schedule(2, None, 64, {**SGD, "lr": 0.02}),
    "levels": Schedule(4, None, 64, {**SGD, "lr": 0.02}),
    "text": Schedule(3, None, 64, {"name": "AdamW", "lr": 5e-4, "weight_decay": 0.01}),
}
STEPS, ROUNDS = 6, 3
LOW_PRECISION = ("group_norms", "text_bf16")  # where methods are tried that are for it


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(1)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(arguments, arguments.cache or Path(folder))
        results = bench.run()
        plan = bench.places.plan_facts()
    rows, levels = method_rows(results), level_rows(results)
    if not rows and not levels:
        raise SystemExit("Nothing was measured. Leave --report out, or name other parts.")
    for each in (rows, levels):
        if each:
            shown = [{k: "" if v is None else v for k, v in row.items()} for row in each]
            finish(shown, {**plan, **summarize(rows, levels)}, arguments, started)
    if arguments.json:
        document = json.loads(arguments.json.read_text())
        document |= {"rows": rows, "levels": levels, "schedules": bench.schedule_facts()}
        document["command"] = document["command"].removesuffix(" --report")  # of the trainings
        document["minutes"] = round(sum(result["seconds"] for _, result in results) / 60, 1)
        write_text(arguments.json, json.dumps(document, indent=1) + "\n")


@dataclass(frozen=True)
class Unit:
    """One training, or one timing.

    Attributes:
        part: of `PARTS`.
        place: attribute of `Places`.
        method: what is tried.
        seed: of network, order and method.
    """

    part: str
    place: str
    method: Method
    seed: int

    @property
    def path(self) -> str:
        """In the cache."""
        name = self.method.name.replace(", ", "-").replace(" ", "_")
        return f"{self.part}/{self.place}/{name}-{self.seed}.json"


class Bench:
    """The units that are wanted, and their results."""

    def __init__(self, arguments: argparse.Namespace, cache: Path) -> None:
        self.arguments, self.cache = arguments, cache
        self.schedules = {name: self.schedule(name) for name in SCHEDULES}
        self.places = Places(arguments.data, self.schedules, arguments.quick)
        self._places: dict[tuple[str, str, float | None], Place] = {}

    def schedule(self, part: str) -> Schedule:
        """As the arguments say."""
        chosen = SCHEDULES[part]
        if self.arguments.quick:
            return replace(chosen, epochs=1, samples=64, batch_size=32)
        epochs = self.arguments.epochs
        return chosen if epochs is None else replace(chosen, epochs=epochs)

    def schedule_facts(self) -> dict[str, Any]:
        """Schedules of the parts, for the record."""
        return {name: asdict(schedule) for name, schedule in self.schedules.items()}

    def run(self) -> list[tuple[Unit, dict[str, Any]]]:
        """Do what is not in the cache; the results of all, those that failed with "error"."""
        results = []
        for unit in self.units():
            path = self.cache / unit.path
            settings = self.settings(unit)
            known = json.loads(path.read_text()) if path.exists() else {}
            if known.get("settings") != settings:
                if self.arguments.report:
                    continue
                known = {"settings": settings, **self.do(unit)}
                path.parent.mkdir(parents=True, exist_ok=True)
                write_text(path, json.dumps(known) + "\n")
            results.append((unit, known))
        return results

    def units(self) -> Iterator[Unit]:
        """In the order in which they are done: all methods with one seed, then with the next."""
        wanted, first = self.arguments.methods, self.arguments.seed
        for part in self.arguments.parts:
            last = first + 1 if part == "time" else self.arguments.seeds
            for seed in range(first, last):
                for place, method in candidates(part):
                    if not wanted or method.name in wanted or method.name == PLAIN:
                        yield Unit(part, place, method, seed)

    def settings(self, unit: Unit) -> dict[str, Any]:
        """All that a result depends on, but for the code."""
        if unit.part == "time":
            own: dict[str, Any] = {"steps": self.steps, "rounds": self.rounds}
        else:
            own = asdict(self.place(unit).schedule)
        algorithms = [describe(each) for each in unit.method.make(self.place(unit))]
        return json.loads(json.dumps({**own, "algorithms": algorithms}))  # type: ignore[no-any-return]

    @property
    def steps(self) -> int:
        """Batches of a fit that is timed."""
        return 2 if self.arguments.quick else STEPS

    @property
    def rounds(self) -> int:
        """Of the timing."""
        return 2 if self.arguments.quick else ROUNDS

    def place(self, unit: Unit) -> Place:
        """With the schedule of the unit; the same object again, which knows its channel groups."""
        key = (unit.part, unit.place, unit.method.lr)
        if key not in self._places:
            found: Place = getattr(self.places, unit.place)
            schedule = found.schedule if unit.part == "time" else self.schedules[unit.part]
            if key[2] is not None:
                schedule = replace(schedule, optimizer={**schedule.optimizer, "lr": key[2]})
            found = replace(found, schedule=schedule)
            if unit.part == "time":  # of images as people have them: float32, channels first
                is_low = unit.place in LOW_PRECISION
                found = replace(found, is_fast=False, precision="bf16" if is_low else "fp32")
            self._places[key] = found
        return self._places[key]

    def do(self, unit: Unit) -> dict[str, Any]:
        """Train and judge, or time; "seconds" are those of the processor."""
        started, place = time.process_time(), self.place(unit)
        if unit.part == "time":
            plain = Method(PLAIN, lambda _: [])
            found = step_time(place, unit.method, plain, self.steps, self.rounds, unit.seed)
        else:
            found = {"accuracy": train(place, unit.method, unit.seed)}
        seconds = round(time.process_time() - started, 2)
        print(unit.path, found, f"{seconds} s", file=sys.stderr, flush=True)
        return {**found, "seconds": seconds}


def candidates(part: str) -> Iterator[tuple[str, Method]]:
    """Place and method of all that a part tries; "plain" comes first."""
    if part == "levels":
        yield from (("recovery", method) for method in COMBINATIONS)
        return
    for method in METHODS:
        if part == "recovery":
            if method.is_for_recovery and "scratch" in method.places:
                yield "recovery", method
            continue
        is_text = part == "text"
        for place in method.places:
            if part == "time":
                if method.name != PLAIN:
                    yield place, method
            elif place.startswith("text") == is_text and not method.is_only_timed:
                yield place, method
    if part == "recovery":
        yield from (("recovery", method) for method in with_rates())


def train(place: Place, method: Method, seed: int) -> float:
    """Accuracy after the place's schedule, in percent."""
    net = place.net(seed) if method.net is None else method.net(place, seed)
    task = place.task(net)
    trainer = place.trainer(task, method.make(place), place.epochs(), seed)
    trainer.fit()
    return place.judge(trainer.model)


def describe(algorithm: Algorithm) -> str:
    """Class and options, for a record."""
    options = {
        name: value
        for name, value in vars(algorithm).items()
        if not name.startswith("_")
        and name not in OF_EVERY_ONE
        and isinstance(value, (bool, int, float, str, tuple, dict))
    }
    plain = {k: v for k, v in options.items() if "0x" not in repr(v) and "tensor" not in repr(v)}
    return f"{type(algorithm).__name__}({', '.join(f'{k}={v!r}' for k, v in plain.items())})"


def parse_arguments() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--cache", type=Path, help="keep results here, and go on from them")
    parser.add_argument("--methods", nargs="+", help="names of rows; default: all")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--seeds", type=int, default=3, help="of every training")
    parser.add_argument("--report", action="store_true", help="show what is in the cache")
    parser.add_argument("--epochs", type=int, help="of every training, in place of its own")
    arguments = parser.parse_args()
    if arguments.data is None:
        parser.error("the data folder is not given: write --data DIR, or set COMPRESSOR_DATA")
    if arguments.methods:
        known = {method.name for part in PARTS for _, method in candidates(part)}
        unknown = sorted(set(arguments.methods) - known)
        if unknown:
            parser.error(f"unknown methods {unknown}; known are {sorted(known)}")
    if arguments.quick:
        arguments.seeds = 1
    return arguments


if __name__ == "__main__":
    main()
