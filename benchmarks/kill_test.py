"""Kill -9 at random moments of a run, go on, and compare with the run that nobody disturbed.

python -m benchmarks.kill_test --kills 20 --seed 0

A small real job: a residual CNN on scikit-learn's digits, pruned, thinned of blocks and quantized
for the smallest file, so that nothing depends on a clock. Each start is a process of its own. It is
killed at a moment drawn uniformly from the undisturbed run: as long after its start where that was
before the first variant, else after a memoryless wait, so that however long a step takes, some
start gets through it. A run that ends before all kills are spent is compared, and another begun.

Equal bit for bit must be: plan, decisions, every variant's record, structure and weights, the
metrics of the exported file, and its bytes. Left out is what a clock says (seconds, latencies).
"""

from __future__ import annotations

import argparse
import random
import signal
import statistics
import tempfile
import time
from collections.abc import Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from benchmarks.common import finish, make_parser
from benchmarks.killed_job import JOB, differences, files, outcome, start, train_reference, wait

DURABLE = ("study.db", "damage.json", "**/*.ckpt", "**/*.jsonl", "result.json")


def main() -> None:
    arguments = parse_arguments()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        reference = train_reference(folder / "reference.safetensors", arguments.seed)
        job = {**JOB, "seed": arguments.seed, **changes(arguments)}
        rows, different, seconds = kill(folder, reference, job, arguments)
    summary = {
        "kills": len(rows),
        "runs": rows[-1]["run"],
        "different_values": len(different),
        "undisturbed_seconds": seconds,
        "median_seconds_lost": statistics.median(row["s lost"] for row in rows),
        "most_seconds_lost": max(row["s lost"] for row in rows),
    }
    finish(rows, summary, arguments, started)
    if different:
        raise SystemExit("NOT the undisturbed result:\n" + "\n".join(different[:20]))


def kill(
    folder: Path, reference: Path, job: Mapping[str, Any], arguments: argparse.Namespace
) -> tuple[list[dict[str, Any]], list[str], float]:
    """A row for each kill, what differs in any killed run, seconds of the undisturbed one."""
    process, began = start(folder / "whole", reference, job), time.monotonic()
    wait(process, lambda: any((folder / "whole").glob("variants/*")))
    ready = time.monotonic() - began
    process.join()
    whole = time.monotonic() - began
    expected = outcome(folder / "whole")
    draw = random.Random(arguments.seed)
    mean = (whole - ready) * arguments.runs / arguments.kills
    rows: list[dict[str, Any]] = []
    different: list[str] = []
    run = 0
    while len(rows) < arguments.kills:
        run += 1
        run_dir = folder / f"run{run}"
        while not (run_dir / "result.json").exists():
            log = logged(run_dir)
            process, began = start(run_dir, reference, job), time.time()
            if len(rows) < arguments.kills:
                moment = draw.uniform(0, whole)
                delay = moment if moment < ready else ready + draw.expovariate(1 / mean)
                process.join(delay)
            else:
                process.join()
            if process.exitcode is None:
                row = killed(process, run_dir, began, log)
                rows.append({"run": run, "kill": len(rows) + 1, **row})
            if process.exitcode not in (0, -signal.SIGKILL):
                raise SystemExit(f"A start ended by itself with {process.exitcode}: {run_dir}")
        different += [f"run {run}: {line}" for line in differences(expected, outcome(run_dir))]
    return rows, different, whole


def killed(process: BaseProcess, run_dir: Path, began: float, log: str) -> dict[str, Any]:
    """Kill `process`, and tell from what it wrote where that hit it; `log` is from before it."""
    process.kill()
    process.join()
    now = time.time()
    kept = max((path.stat().st_mtime for path in files(run_dir, DURABLE)), default=began)
    return {
        "s after start": now - began,
        "hit": phase(run_dir, began, logged(run_dir).removeprefix(log)),
        "s lost": now - max(kept, began),
    }


def phase(run_dir: Path, began: float, said: str) -> str:
    """What a process that began then, and logged that, was at when it died."""
    if (run_dir / "result.json").exists():
        return "after the result"
    if half := [path for path in run_dir.rglob(".*.part") if path.stat().st_mtime > began]:
        return f"writing {half[0].name.split('.')[1]}"
    if any(path.stat().st_mtime > began for path in files(run_dir, ["exports/**/*"])):
        return "export"
    changed = any(path.stat().st_mtime > began for path in run_dir.glob("variants/*"))
    if not changed and "variant" not in said:
        return "start"
    for variant in run_dir.glob("variants/*"):
        if not (variant / "metrics.json").exists():
            return phase_of_variant(variant)
    return "between variants"


def phase_of_variant(folder: Path) -> str:
    if (folder / "model.safetensors").exists():
        return "saving a variant"
    if (folder / "deployed").exists():
        return "judging"
    if (folder / "fit").exists():
        return "fine-tune, with a checkpoint" if any(folder.glob("fit/*.ckpt")) else "fine-tune"
    return "building"


def logged(run_dir: Path) -> str:
    log = run_dir / "engine.log"
    return log.read_text() if log.exists() else ""


def changes(arguments: argparse.Namespace) -> dict[str, Any]:
    """Of the job's configuration."""
    deepsearch = {"deepsearch": True} if arguments.deepsearch else {}
    trials = {"budget": {"trials": arguments.trials}}
    return {"level": arguments.level, **deepsearch, **trials}


def parse_arguments() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--runs", type=float, default=3, help="over which the kills are spread")
    parser.add_argument("--level", type=int, choices=[1, 2], default=1)
    parser.add_argument("--deepsearch", action="store_true")
    parser.add_argument("--trials", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="an empty folder, in which all is kept")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.kills, arguments.runs = 3, 1
    return arguments


if __name__ == "__main__":
    main()
