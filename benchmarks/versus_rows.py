"""One row of `benchmarks.versus`, made in a process of its own.

`python -m benchmarks.versus_rows ROW MODEL --folder DIR ...` leaves `model.onnx` in the folder, and
what is to be told of it in `made.json`.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import compressor
from benchmarks.common import ROOT
from benchmarks.limits import one_line
from benchmarks.quantization_peers import Job, run_peer
from benchmarks.versus_cases import CASES, Case, Source, load_case
from benchmarks.versus_files import judge
from benchmarks.versus_pruning import Prune, fastnas, prune_and_bisect, torch_pruning
from compressor.export.onnx import export_onnx
from compressor.files import write_text
from compressor.interfaces.inputs import ModelInputs
from compressor.profiling.counts import count

DELTA = 1.0  # points
SIZE_RATIO = 6.0  # of the small row of ours
FLOAT_BYTES = 4
FILE, MADE = "model.onnx", "made.json"
PEER_BATCH = 16  # of calibration and evaluation, in ONNX Runtime's tools and NNCF
STATIC, DYNAMIC = "ORT static, u8/s8 per channel", "ORT dynamic"
MISSING = "not installed"
Facts = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """What a row is asked for.

    Attributes:
        case: network and data.
        reference: its float32 file; that of the row "float32" is the one to write.
        folder: of this row.
        minutes: that it may take.
        seed: of everything that is drawn.
        threads: of training and searching.
        trial_epochs: of each of the engine's short fine-tunes; None: as many as fit.
    """

    case: Case
    reference: Path
    folder: Path
    minutes: float
    seed: int
    threads: int
    trial_epochs: int | None = None

    @property
    def path(self) -> Path:
        """Of the file that is to be made."""
        return self.folder / FILE

    def reference_percent(self) -> float:
        return judge(self.reference, self.case.judged).percent


def make_float(task: Task) -> Facts:
    """The reference."""
    export_onnx(task.case.model, ModelInputs((task.case.example,)), task.path)
    return counted(task.case.model, task.case)


def make_peer(task: Task, name: str) -> Facts:
    """What a tool makes of the reference's file."""
    run_peer(name, job(task, task.reference, task.path))
    return {"how": name, **counted(task.case.model, task.case)}


def make_expert(task: Task) -> Facts:
    """torch-pruning, the common fine-tune, ONNX Runtime's int8."""
    return bisect(task, partial(torch_pruning, task.case))


def make_modelopt(task: Task) -> Facts:
    """FastNAS, the common fine-tune, ONNX Runtime's int8."""
    return bisect(task, fastnas(task.case, task.folder))


def bisect(task: Task, prune: Prune) -> Facts:
    """The largest ratio that holds; plain int8 if none does."""
    deadline = time.monotonic() + 60 * task.minutes
    method = DYNAMIC if task.case.kind == "transformer" else STATIC
    counts: dict[Path, Facts] = {}

    def write(model: nn.Module, path: Path) -> float:
        counts[path] = counted(model, task.case)
        return write_int8(task, method, model, path)

    best, facts = prune_and_bisect(
        prune,
        task.case,
        write,
        task.folder,
        least_percent=task.reference_percent() - DELTA,
        deadline=deadline,
        seed=task.seed,
    )
    if best is None:
        run_peer(method, job(task, task.reference, task.path))
        plain = counted(task.case.model, task.case)
        return {**facts, **plain, "how": "no ratio holds: plain int8"}
    shutil.copyfile(best, task.path)
    held = next(a for a in facts["attempts"] if best.name == f"ratio-{a['ratio']:.4f}.onnx")
    how = f"ratio {held['ratio']:g}, {held['epochs']} epochs"
    return {**facts, **counts[best], "how": how}


def write_int8(task: Task, method: str, model: nn.Module, path: Path) -> float:
    """Write a quantized file of `model`; its accuracy in percent."""
    float_path = export_onnx(
        model, ModelInputs((task.case.example,)), path.with_suffix(".float.onnx")
    )
    run_peer(method, job(task, float_path, path))
    return judge(path, task.case.judged).percent


def make_ours(task: Task, *, size_ratio: float | None = None) -> Facts:
    """The engine, with nothing but the budget and the recipe told.

    Args:
        task: the row.
        size_ratio: how many times fewer bytes its file must have than the reference's weights;
            None: no matter.
    """
    case, recipe = task.case, task.case.recipe
    final = {} if recipe.epochs else {"epochs": 0}
    trial = final if task.trial_epochs is None else {"epochs": task.trial_epochs}
    budget: dict[str, float] = {"minutes": task.minutes}
    if size_ratio is not None:
        count = sum(parameter.numel() for parameter in case.model.parameters())
        budget["size_bytes"] = FLOAT_BYTES * count / size_ratio
    training = {"optimizer": dict(recipe.optimizer), "distillation": recipe.distillation}
    engine = compressor.Engine(
        framework=compressor.TorchFramework(),
        data={"train": case.train, "test": case.judged},
        model=case.model,
        config={
            "delta": DELTA,
            "optimization": "latency",
            "device": "CPU",
            "precision": recipe.precision,
            "target": {"runtime": "onnxruntime", "device": "cpu", "threads": 1, "batch_size": 1},
            "budget": budget,
            "full_trainer": {**training, **final},
            "fine_tuner": {**training, **trial},
            "export": {"formats": ["onnx"]},
            "run_dir": str(task.folder / "run"),
            "seed": task.seed,
            "progress": False,
        },
    )
    small = engine.run()
    result = engine.result
    assert result is not None
    shutil.copyfile(result.artifacts["onnx"], task.path)
    certificate = result.certificate
    return {
        "how": result.reason or result.plan.describe(),
        "variants": len(result.variants),
        **counted(small, case),
        "certificate": {
            "accuracy %": certificate.metric,
            "interval of the drop": (
                [certificate.interval.low, certificate.interval.high]
                if certificate.interval
                else None
            ),
            "within delta": certificate.within_delta,
            "latency ratio": certificate.latency_ratio,
            "looks": certificate.looks,
        },
    }


ROWS: dict[str, Callable[[Task], Facts]] = {
    "float32": make_float,
    "int8": partial(make_peer, name=STATIC),
    "int8, dynamic": partial(make_peer, name=DYNAMIC),
    "expert": make_expert,
    "nncf": partial(make_peer, name="NNCF accuracy control"),
    "modelopt": make_modelopt,
    "ours": make_ours,
    "ours, small": partial(make_ours, size_ratio=SIZE_RATIO),
}
REQUIREMENTS = {"nncf": "nncf", "modelopt": "modelopt", "expert": "torch_pruning"}


def counted(model: nn.Module, case: Case) -> Facts:
    """MACs of one sample, and parameters; eight bits change neither."""
    counts = count(model, ModelInputs((case.example[:1],)))
    return {"MACs": counts.macs, "parameters": counts.params}


def job(task: Task, float_path: Path, path: Path) -> Job:
    """As `benchmarks.quantization_peers` takes it: same calibration for all."""
    name = "input"
    batches = [{name: batch.numpy()} for batch in torch.split(task.case.calibration, PEER_BATCH)]
    inputs, labels = zip(*task.case.judged, strict=True)
    evaluation = [{name: batch.numpy()} for batch in torch.split(torch.cat(inputs), PEER_BATCH)]
    return Job(
        float_path,
        path,
        calibration=batches,
        evaluation=evaluation,
        labels=torch.cat(labels).numpy(),
        is_transformer=task.case.kind == "transformer",
    )


def work(arguments: argparse.Namespace) -> None:
    """Make the row; a failure is its reason."""
    torch.set_num_threads(arguments.threads)
    source = Source(
        arguments.data, arguments.cache, arguments.seed, arguments.jpeg, arguments.quick
    )
    torch.manual_seed(arguments.seed)
    np.random.seed(arguments.seed)  # ModelOpt draws from it
    random.seed(arguments.seed)
    task = Task(
        load_case(arguments.model, source),
        arguments.reference,
        arguments.folder,
        arguments.minutes,
        arguments.seed,
        arguments.threads,
        arguments.trial_epochs,
    )
    began = time.monotonic()
    try:
        facts = ROWS[arguments.row](task)
    except Exception as error:  # the row says so and the others go on
        traceback.print_exc()
        facts = {"error": failure(arguments.row, error)}
    facts["minutes"] = (time.monotonic() - began) / 60
    write_text(arguments.folder / MADE, json.dumps(facts, indent=1))


def failure(row: str, error: Exception) -> str:
    """Why there is no file, without the paths of this machine."""
    needed = REQUIREMENTS.get(row)
    if isinstance(error, ImportError) and needed and (error.name or "").startswith(needed):
        return MISSING
    return one_line(error).replace(str(ROOT), ".")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("row", choices=ROWS)
    parser.add_argument("model", choices=CASES)
    for name in ("data", "cache", "folder", "reference"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--minutes", type=float, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--trial-epochs", type=int)
    parser.add_argument("--jpeg", action="store_true")
    parser.add_argument("--quick", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    work(parse_arguments())
