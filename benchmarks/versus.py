"""This package against its peers: one checkpoint, one time limit, one harness for all files.

python -m benchmarks.versus --data DIR --cache DIR --json versus.json

Every row is a file for ONNX Runtime, made from the same trained network and data within --minutes
of the clock at --threads threads: the float reference; plain static int8; torch-pruning and the
FastNAS of ModelOpt, each bisected with the engine's own fine-tuning and made int8; NNCF's accuracy
control; the engine; and the engine with a bound of a sixth of the bytes. At the end all files of a
network are timed in turns, at one thread, and judged alike. Every row may look at the judged split
as often as it likes. Ratios are of the float32 file, above 1 is better. A row is made once and kept
in --cache, where an interrupted run goes on; delete its folder there to have it made again. The
networks and what they need: `benchmarks.versus_cases`, `benchmarks.versus_pruning`.

NNCF and ModelOpt may live in interpreters of their own, which have this package's requirements too.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.common import ROOT, finish, make_parser
from benchmarks.versus_cases import CASES, Case, Source, load_case
from benchmarks.versus_files import (
    BATCH_SIZES,
    file_digest,
    judge,
    peak_memory_mib,
    time_files,
)
from benchmarks.versus_rows import DELTA, FILE, MADE, MISSING
from compressor.files import write_text
from compressor.profiling.latency import Timing

MODELS = ["resnet20", "resnet56", "efficientnet_lite0", "minilm_sst2"]
FOR_TRANSFORMERS = {"int8": ["int8", "int8, dynamic"]}
REFERENCE, OURS, SMALL = "float32", "ours", "ours, small"
OFFERED = ["int8", "expert", "nncf", "modelopt", "ours", SMALL]
SETTINGS, LOG = "settings.json", "log.txt"
QUICK_MINUTES = 1.5
PATIENCE, SPARE_MINUTES = 2.0, 10.0  # a row is stopped after so many times its minutes, and spare
Row = dict[str, Any]


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(1)
    started = time.monotonic()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        cache = arguments.cache or Path(folder)
        for model in arguments.models:
            rows += Comparison(model, cache, arguments).rows()
    shown = [{key: row[key] for key in row if key not in ("sha256", "evidence")} for row in rows]
    finish(shown, summarize(rows), arguments, started)
    if arguments.json:
        document = json.loads(arguments.json.read_text())
        write_text(arguments.json, json.dumps({**document, "rows": rows}, indent=1) + "\n")


@dataclass(frozen=True)
class Comparison:
    """All rows of one network."""

    model: str
    cache: Path
    arguments: argparse.Namespace

    def rows(self) -> list[Row]:
        """Made where they are not there yet, then measured together."""
        reference = self.make(REFERENCE, 0)
        if "error" in reference:
            raise SystemExit(f"{self.model}: {reference['error']}")
        made = {(REFERENCE, 0): reference}
        for seed in self.arguments.seeds:
            for row in self.wanted():
                made[row, seed] = self.make(row, seed)
        return self.measure(made)

    def wanted(self) -> list[str]:
        """Names of rows, as this network has them."""
        names = list(self.arguments.rows)
        if self.case.kind == "transformer":
            names = [each for name in names for each in FOR_TRANSFORMERS.get(name, [name])]
        return names

    def make(self, row: str, seed: int) -> dict[str, Any]:
        """Let a process make the row, unless it is in the cache.

        Returns:
            What it reports.
        """
        folder = self.folder(row, seed)
        settings = {**self.settings(), "row": row, "seed": seed}
        known = folder / MADE
        if folder.exists() and not is_usable(folder, settings):
            shutil.rmtree(folder)
        if not known.exists():
            print(self.model, row, f"seed {seed}", file=sys.stderr, flush=True)
            folder.mkdir(parents=True, exist_ok=True)
            write_text(folder / SETTINGS, json.dumps(settings))
            self.start(row, seed, folder)
        if not known.exists():
            tail = (folder / LOG).read_text().strip().splitlines() or ["it died"]
            write_text(known, json.dumps({"error": tail[-1][:300].replace(str(ROOT), ".")}))
        facts: dict[str, Any] = json.loads(known.read_text())
        return facts

    def start(self, row: str, seed: int, folder: Path) -> None:
        """The process of a row; what it prints goes to a file beside its own."""
        options = self.arguments
        python = {"nncf": options.nncf_python, "modelopt": options.modelopt_python}.get(row)
        command = [
            *(str(python or sys.executable), "-m", "benchmarks.versus_rows", row, self.model),
            *("--data", str(options.data.resolve()), "--cache", str(self.cache.resolve())),
            *("--folder", str(folder.resolve()), "--seed", str(seed)),
            *("--reference", str((self.folder(REFERENCE, 0) / FILE).resolve())),
            *("--minutes", str(options.minutes), "--threads", str(options.threads)),
        ]
        if options.trial_epochs is not None:
            command += ["--trial-epochs", str(options.trial_epochs)]
        command += [f"--{name}" for name in ("jpeg", "quick") if getattr(options, name)]
        threads = {"OMP_NUM_THREADS": str(options.threads), "MKL_NUM_THREADS": str(options.threads)}
        limit = 60 * (PATIENCE * options.minutes + SPARE_MINUTES)
        with (folder / LOG).open("w") as log:
            try:
                subprocess.run(
                    command,
                    cwd=ROOT,
                    env={**os.environ, **threads},
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    timeout=limit,
                    check=False,
                )
            except subprocess.TimeoutExpired:
                log.write(f"stopped after {limit / 60:.0f} minutes\n")

    def measure(self, made: Mapping[tuple[str, int], Mapping[str, Any]]) -> list[Row]:
        """Every file by one harness; equal files are timed once."""
        paths = {
            key: self.folder(*key) / FILE for key, facts in made.items() if "error" not in facts
        }
        digests = {key: file_digest(path) for key, path in paths.items()}
        files = {digests[key]: path for key, path in paths.items()}
        times = time_files(files, self.case.calibration, is_quick=self.arguments.quick)
        scores = {name: judge(path, self.case.judged) for name, path in files.items()}
        memory = {name: peak_memory_mib(path) for name, path in files.items()}
        float_file = digests[REFERENCE, 0]
        best = scores[float_file].percent
        rows = []
        for key, facts in made.items():
            row: Row = {"model": self.model, "row": key[0], "seed": key[1]}
            digest = digests.get(key)
            measured: Row = dict.fromkeys(MEASURED)
            if digest is not None:
                score = scores[digest]
                measured |= {
                    "accuracy %": score.percent,
                    "drop": best - score.percent,
                    "within delta": score.right
                    >= scores[float_file].right - DELTA / 100 * score.judged,
                    "size ratio": files[float_file].stat().st_size / files[digest].stat().st_size,
                    "peak MiB": memory[digest],
                    "judged": score.judged,
                    "sha256": digest,
                }
                for size in BATCH_SIZES:
                    timing, reference = times[size][digest], times[size][float_file]
                    measured |= timing_facts(size, timing, reference)
            row |= measured
            row |= {name: facts.get(name) for name in COUNTED}
            row["minutes"] = facts.get("minutes")
            row["how"] = facts.get("error") or facts.get("how", "")
            row["evidence"] = {
                name: facts[name]
                for name in ("attempts", "certificate", "variants")
                if name in facts
            }
            rows.append(row)
        return rows

    def folder(self, row: str, seed: int) -> Path:
        return self.cache / self.model / f"{row.replace(', ', '-')}-seed{seed}"

    def settings(self) -> dict[str, Any]:
        """What makes a row another one."""
        names = ("minutes", "threads", "jpeg", "quick", "trial_epochs")
        return {name: getattr(self.arguments, name) for name in names}

    @cached_property
    def case(self) -> Case:
        options = self.arguments
        return load_case(
            self.model, Source(options.data, self.cache, 0, options.jpeg, options.quick)
        )


def is_usable(folder: Path, settings: Mapping[str, Any]) -> bool:
    """Whether it holds this very row, or the beginning of it; what was not installed may be now."""
    known = folder / SETTINGS
    if not known.exists() or json.loads(known.read_text()) != settings:
        return False
    made = folder / MADE
    return not made.exists() or json.loads(made.read_text()).get("error") != MISSING


def ratio_key(batch_size: int) -> str:
    return f"latency ratio, batch {batch_size}"


def timing_facts(batch_size: int, timing: Timing, reference: Timing) -> Row:
    """Of one file at one batch size; the spread is that of the quartiles, in percent."""
    return {
        ratio_key(batch_size): reference.best_ms / timing.best_ms,
        f"ms, batch {batch_size}": timing.best_ms,
        f"spread %, batch {batch_size}": 100 * (timing.high_ms - timing.low_ms) / timing.median_ms,
    }


MEASURED = (
    *("accuracy %", "drop", "within delta"),
    *(
        f"{what}, batch {size}"
        for size in BATCH_SIZES
        for what in ("latency ratio", "ms", "spread %")
    ),
    *("size ratio", "peak MiB", "judged", "sha256"),
)
COUNTED = ("MACs", "parameters")  # by the row itself; rows in an older cache have none


def summarize(rows: Sequence[Row]) -> dict[str, float]:
    """How we stand. Latency is that of batch 1; a file outside delta counts as the float one.

    `<model>_latency_ratio` is ours, the median over the seeds. `ours_over_best_peer` is, of the
    network where it is smallest, ours over the best row of others; each row counts with its
    median. `<model>_size_ratio` is of the row whose bytes are bounded. `all_within_delta` is 1 if
    every file of ours is within delta.
    """
    summary: dict[str, float] = {}
    ours = [row for row in rows if row["row"] in (OURS, SMALL)]
    if not ours:
        return summary
    leads = []
    for model in dict.fromkeys(row["model"] for row in ours):
        of_model = [row for row in rows if row["model"] == model]
        ratios = {
            name: median(credited_ratio(row) for row in of_model if row["row"] == name)
            for name in dict.fromkeys(row["row"] for row in of_model)
        }
        small = [row for row in of_model if row["row"] == SMALL]
        if small:
            sizes = [row["size ratio"] if row["within delta"] else 1.0 for row in small]
            summary[f"{model}_size_ratio"] = median(sizes)
            ratios.pop(SMALL)
        if OURS not in ratios:
            continue
        own = ratios.pop(OURS)
        summary[f"{model}_latency_ratio"] = own
        if ratios:
            leads.append(own / max(ratios.values()))
    if leads:
        summary["ours_over_best_peer"] = min(leads)
    summary["all_within_delta"] = float(all(row["within delta"] for row in ours))
    return summary


def credited_ratio(row: Row) -> float:
    """At batch 1; 1 if there is no file, or none within delta: the float file is what remains."""
    return float(row[ratio_key(1)]) if row["within delta"] else 1.0


def parse_arguments() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--models", nargs="+", choices=CASES, default=None)
    parser.add_argument("--seeds", nargs="+", type=int, default=None)
    parser.add_argument("--rows", nargs="+", choices=OFFERED, default=OFFERED)
    parser.add_argument("--minutes", type=float, default=None, help="of each row; default: 20")
    parser.add_argument("--threads", type=int, default=1, help="of training and searching")
    parser.add_argument("--cache", type=Path, help="folder of finished rows and trained weights")
    parser.add_argument("--nncf-python", type=Path, help="interpreter that has nncf")
    parser.add_argument("--modelopt-python", type=Path, help="interpreter that has nvidia-modelopt")
    parser.add_argument("--trial-epochs", type=int, help="of ours; default: as many as fit")
    parser.add_argument("--jpeg", action="store_true", help="see benchmarks.versus_cases.Source")
    arguments = parser.parse_args()
    if arguments.data is None:
        parser.error("give the folder of the images and weights: --data DIR")
    arguments.data = Path(arguments.data)
    quick = arguments.quick
    arguments.models = arguments.models or (MODELS[:1] if quick else MODELS)
    arguments.seeds = arguments.seeds or ([arguments.seed] if quick else [0, 1, 2])
    if arguments.minutes is None:
        arguments.minutes = QUICK_MINUTES if quick else 20.0
    return arguments


if __name__ == "__main__":
    main()
