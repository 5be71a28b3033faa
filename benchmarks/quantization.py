"""Int8 files of real networks: this package against ONNX Runtime's tools and NNCF.

All get the same float32 file or model and the same calibration data; each works in a process of its
own, whose time and memory above what it began with are measured. Accuracies are of the files in
ONNX Runtime, on other samples than those that calibrate. Latencies are measured in turns; ratios
are of the float32 file, above 1 is better.

The cases are those of `benchmarks.quantization_models`, the peers of
`benchmarks.quantization_peers`; what they need is said there. Weights trained on the way are kept
in --cache, or beside --json.
"""

from __future__ import annotations

import argparse
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import cycle
from pathlib import Path
from statistics import geometric_mean
from typing import Any

import torch
from scipy.stats import binom
from torch import Tensor

from benchmarks.common import finish, make_parser
from benchmarks.limits import Report, run_limited
from benchmarks.quantization_models import CASES, Case, Size, predict_all
from benchmarks.quantization_peers import (
    FOR_TRANSFORMERS,
    MAX_DROP,
    PEERS,
    Job,
    open_session,
    run_peer,
)
from compressor.export.onnx import export_onnx
from compressor.export.quantize import quantize
from compressor.interfaces.inputs import ModelInputs
from compressor.profiling.counts import count
from compressor.profiling.latency import interleave
from compressor.quantization.observers import Method
from compressor.quantization.plan import LayerFormat
from compressor.quantization.scheme import Scheme

SETTINGS = [(threads, batch) for threads in (1, 2) for batch in (1, 8)]
AS_FAST = 0.95  # of the peer's latency ratio: what two runs of one file differ by
MAIN = ("ours, static", "ours, dynamic")  # the rows that are held against the peers
WITHIN = "ours, within delta"
COMPARED_BATCHES = 10  # of the evaluation: a file with its simulation, which is slow
ROUNDING_SECONDS = 300.0
LIMIT_SECONDS, LIMIT_GIB = 3600.0, 16.0  # of one method
Row = dict[str, Any]


@dataclass(frozen=True)
class Ours:
    """A call of `quantize`.

    Attributes:
        format: of every layer that can have it.
        method: how ranges are found.
        corrections: by name.
        for_transformers: offered to transformers only.
        is_held: within `MAX_DROP`, judged by the samples of the evaluation like NNCF's accuracy
            control.
    """

    format: str | LayerFormat
    method: Method = "minmax"
    corrections: tuple[str, ...] = ()
    for_transformers: bool = False
    is_held: bool = False


W4A8 = LayerFormat(Scheme(4, signed=True, symmetric=True, axis=0), "static")
OURS: dict[str, Ours] = {
    "ours, static": Ours("static_int8"),
    "ours, static, percentile": Ours("static_int8", "percentile"),
    "ours, static, entropy": Ours("static_int8", "entropy"),
    "ours, static, mse": Ours("static_int8", "mse"),
    "ours, static, equalization": Ours("static_int8", corrections=("equalization",)),
    "ours, static, bias": Ours("static_int8", corrections=("bias",)),
    "ours, static, smoothing": Ours(
        "static_int8", corrections=("smoothing",), for_transformers=True
    ),
    "ours, dynamic": Ours("dynamic_int8", for_transformers=True),
    "ours, dynamic, smoothing": Ours(
        "dynamic_int8", corrections=("smoothing",), for_transformers=True
    ),
    WITHIN: Ours("static_int8", is_held=True),
    "W8, nearest": Ours("weight_int8"),
    "W4, nearest": Ours("weight_int4"),
    "W4, GPTQ": Ours("weight_int4", corrections=("gptq",)),
    "W4, GPTQ + bias": Ours("weight_int4", corrections=("gptq", "bias")),
    "W4, AdaRound": Ours("weight_int4", corrections=("adaround",)),
    "W4A8, nearest": Ours(W4A8),
    "W4A8, GPTQ": Ours(W4A8, corrections=("gptq",)),
    "W4A8, GPTQ + bias": Ours(W4A8, corrections=("gptq", "bias")),
    "W4A8, AdaRound": Ours(W4A8, corrections=("adaround",)),
}
METHODS = ["float32", *PEERS, *OURS]


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(1)
    started = time.monotonic()
    rows: list[Row] = []
    for name in arguments.only:
        with tempfile.TemporaryDirectory() as folder:
            cache = arguments.cache or Path(folder)
            case = build(name, arguments.data, cache, size_of(arguments), arguments.seed)
            if arguments.calibration_samples is not None:
                case = replace(case, calibration=repeated(case, arguments.calibration_samples))
            rows += Bench(case, Path(folder), arguments).rows()
    summary = summarize(rows)
    shown = [{key: value for key, value in row.items() if key != "right"} for row in rows]
    finish(shown, summary, arguments, started)


@dataclass
class Bench:
    """One case, its float file, and what is made of it."""

    case: Case
    folder: Path
    arguments: argparse.Namespace
    files: dict[str, Path] = field(default_factory=dict)

    def __post_init__(self) -> None:
        case, began = self.case, time.perf_counter()
        self.files["float32"] = export_onnx(case.model, case.example, self.folder / "float32.onnx")
        self.export_seconds = time.perf_counter() - began
        self.counts = count(case.model, case.example.with_batch(1))  # bits change neither
        session = open_session(self.files["float32"])
        self.names = [item.name for item in session.get_inputs()]
        self.accuracy, self.answers = self.judge(self.files["float32"])

    def rows(self) -> list[Row]:
        """Of every method that was asked for and fits the network."""
        facts = {"predictions": self.answers.tolist(), "seconds": self.export_seconds}
        rows = [self.row("float32", facts)]
        for number, method in enumerate(self.arguments.methods):
            if self.is_offered(method):
                print(self.case.name, method, file=sys.stderr, flush=True)
                row = self.run(method, self.folder / f"{number}.onnx")
                rows.append(row)
        times = self.measure_latencies()
        for row in rows:
            for (threads, batch), milliseconds in times.items():
                ratio = None
                if row["method"] in milliseconds:
                    ratio = milliseconds["float32"] / milliseconds[row["method"]]
                row[latency_key(threads, batch)] = ratio
            row["ms"] = times[SETTINGS[0]].get(row["method"])
        return rows

    def is_offered(self, method: str) -> bool:
        """Whether it is for networks of this kind."""
        if method == "float32":
            return False  # it is there already
        special = method in FOR_TRANSFORMERS or (method in OURS and OURS[method].for_transformers)
        return self.case.is_transformer or not special

    def run(self, method: str, path: Path) -> Row:
        """Let the method work in a process of its own and judge what it wrote."""
        job = self.job(path)
        outcome = run_limited(
            lambda report: self.work(method, job, report),
            seconds=LIMIT_SECONDS,
            memory_gib=LIMIT_GIB,
        )
        facts = dict(outcome.facts)
        if outcome.stopped:
            return self.row(method, {**facts, "predictions": None}, outcome.stopped)
        if path.exists():
            self.files[method] = path
            simulated = facts.get("predictions")
            _, answers = self.judge(path)
            facts["predictions"] = answers.tolist()
            if simulated is not None:
                facts["differ"] = 100 * share(torch.tensor(simulated) != answers[: len(simulated)])
        return self.row(method, facts)

    def work(self, method: str, job: Job, report: Report) -> None:
        """In the child: the method, its seconds and memory; of ours also the simulation."""
        with suppress(ImportError):
            import nncf  # noqa: F401  # seconds that are not of the method
        before, began = resident_mib(), time.perf_counter()
        report(stage="quantizing")
        module = None
        if method in PEERS:
            run_peer(method, job)
        else:
            seconds = 5.0 if self.arguments.quick else ROUNDING_SECONDS
            module = ours(self.case, OURS[method], job.path, seconds)
        report(seconds=time.perf_counter() - began, peak_mib=peak_mib() - before)
        if module is not None:
            report(stage="simulating")
            batches = self.case.evaluation[:COMPARED_BATCHES]
            predictions = predict_all(lambda batch: batch.call(module), batches)
            report(predictions=predictions.tolist())

    def job(self, path: Path) -> Job:
        case = self.case
        return Job(
            self.files["float32"],
            path,
            calibration=[self.feed(batch) for batch in case.calibration],
            evaluation=[self.feed(batch) for batch in case.evaluation],
            labels=case.labels.numpy(),
            is_transformer=case.is_transformer,
        )

    def feed(self, batch: ModelInputs) -> dict[str, Any]:
        """The arguments of a run of a file."""
        arrays = [tensor.numpy() for tensor in batch.tensors()]
        return dict(zip(self.names, arrays, strict=True))

    def judge(self, path: Path) -> tuple[float, Tensor]:
        """Accuracy in percent of a file, and its answers."""
        session = open_session(path)
        return self.case.evaluate(lambda batch: session.run(None, self.feed(batch))[0])

    def measure_latencies(self) -> dict[tuple[int, int], dict[str, float]]:
        """(threads, batch) -> method -> milliseconds, of all files in turns."""
        total_ms = 90.0 if self.arguments.quick else 1600.0
        times = {}
        for threads, batch in SETTINGS:
            feed = self.feed(self.case.example.with_batch(batch))
            calls = {
                name: partial(open_session(path, threads).run, None, feed)
                for name, path in self.files.items()
            }
            timings = interleave(calls, total_ms=total_ms, block_ms=10.0, warmup_ms=100.0)
            times[threads, batch] = {name: timing.best_ms for name, timing in timings.items()}
        return times

    def row(self, method: str, facts: Mapping[str, Any], note: str = "") -> Row:
        accuracy = agreement = right = None
        if facts.get("predictions") is not None:
            answers = torch.tensor(facts["predictions"])
            right = answers == self.case.labels
            accuracy = 100 * share(right)
            agreement = 100 * share(answers == self.answers)
        file = self.files.get(method)
        return {
            "case": self.case.name,
            "method": method,
            "accuracy %": accuracy,
            "drop": None if accuracy is None else self.accuracy - accuracy,
            "as float %": agreement,
            "simulation differs %": facts.get("differ"),
            "ms": None,
            **{latency_key(threads, batch): None for threads, batch in SETTINGS},
            "MB": file.stat().st_size / 1e6 if file else None,
            "MACs": self.counts.macs if file else None,
            "parameters": self.counts.params if file else None,
            "seconds": facts.get("seconds"),
            "peak MiB": facts.get("peak_mib"),
            "note": note,
            "right": right,
        }


def ours(case: Case, how: Ours, path: Path, rounding_seconds: float) -> Callable[..., Any]:
    """Quantize the case's model; write the file.

    Args:
        case: its model is not changed.
        how: the options.
        path: of the file.
        rounding_seconds: that AdaRound and GPTQ may take.

    Returns:
        The simulation in torch, called like the model.
    """
    held: dict[str, Any] = {}
    if how.is_held:
        held = {
            "evaluate": lambda module: case.evaluate(lambda batch: batch.call(module))[0],
            "delta": 100 * MAX_DROP,
        }
    quantized = quantize(
        case.model,
        case.calibration,
        format=how.format,
        method=how.method,
        corrections=how.corrections,
        seconds=rounding_seconds,
        **held,
    )
    quantized.save_onnx(path)
    return quantized.module


def build(name: str, data: Path, cache: Path, size: Size, seed: int) -> Case:
    try:
        return CASES[name](data, cache, size, seed)
    except ImportError as error:
        raise SystemExit(
            f"{name} needs {error.name}. See the first lines of benchmarks/quantization_models.py."
        ) from error


def summarize(rows: Sequence[Row]) -> dict[str, float]:
    """The drop and the speed of EfficientNet-Lite0, and how we stand against the peers.

    `never_worse_than_peers` is 1 if for every file of a peer one of ours is as fast and at least as
    accurate; `never_worse_beyond_chance`, if none is less accurate than chance explains;
    `points_behind_peers` is by how much the worst of ours falls short, 0 if none does. The latency
    ratio is the least of all threads and batches. `seconds_of_accuracy_control` is the largest
    share that our static row, which begins with the torch model, takes of the time of the float
    export and NNCF's accuracy control; `seconds_within_delta` is that of our row within delta.
    """
    summary: dict[str, float] = {}
    static = {row["case"]: row for row in rows if row["method"] == MAIN[0] and is_done(row)}
    if "efficientnet_lite0" in static:
        row = static["efficientnet_lite0"]
        summary["efficientnet_int8_drop"] = row["drop"]
        summary["efficientnet_latency_ratio"] = min(row[latency_key(*s)] for s in SETTINGS)
    peers = [row for row in rows if row["method"] in PEERS and is_done(row)]
    if peers and any(row["method"] in MAIN for row in rows):
        pairs = [(peer, best_rival(peer, rows)) for peer in peers]
        behind = [
            peer["accuracy %"] - (rival["accuracy %"] if rival else 0.0) for peer, rival in pairs
        ]
        clear = [rival is None or is_clearly_worse(rival, peer) for peer, rival in pairs]
        summary["never_worse_than_peers"] = float(max(behind) <= 0)
        summary["never_worse_beyond_chance"] = float(not any(clear))
        summary["points_behind_peers"] = max(0.0, *behind)
    shares = seconds_of_accuracy_control(MAIN[0], rows)
    if shares:
        summary["seconds_of_accuracy_control"] = max(shares)
    held = seconds_of_accuracy_control(WITHIN, rows)
    if held:
        summary["seconds_within_delta"] = max(held)
    return summary


def seconds_of_accuracy_control(method: str, rows: Sequence[Row]) -> list[float]:
    """The method's share of the seconds of the float export and NNCF, for each case."""
    exports = {row["case"]: row["seconds"] for row in rows if row["method"] == "float32"}
    ours = {row["case"]: row["seconds"] for row in rows if row["method"] == method and is_done(row)}
    return [
        ours[row["case"]] / (exports[row["case"]] + row["seconds"])
        for row in rows
        if row["method"] == "NNCF accuracy control" and is_done(row) and row["case"] in ours
    ]


def best_rival(peer: Row, rows: Sequence[Row]) -> Row | None:
    """The most accurate of ours that is as fast as the peer's file."""
    rivals = [
        row
        for row in rows
        if row["case"] == peer["case"]
        and row["method"] in MAIN
        and is_done(row)
        and speed(row) >= AS_FAST * speed(peer)
    ]
    return max(rivals, key=lambda row: row["accuracy %"], default=None)


def speed(row: Row) -> float:
    """The geometric mean of the latency ratios."""
    return geometric_mean(row[latency_key(*setting)] for setting in SETTINGS)


def is_clearly_worse(row: Row, other: Row) -> bool:
    """Whether it is right so much less often that chance does so in one of 20 cases (McNemar)."""
    lost = int((other["right"] & ~row["right"]).sum())
    won = int((row["right"] & ~other["right"]).sum())
    return float(binom.cdf(won, won + lost, 0.5)) < 0.05


def is_done(row: Row) -> bool:
    """Whether it came to a file."""
    return row[latency_key(*SETTINGS[0])] is not None


def latency_key(threads: int, batch: int) -> str:
    return f"ratio, {threads} thread{'s' * (threads > 1)}, batch {batch}"


def share(claims: Tensor) -> float:
    """Fraction of the claims that hold."""
    return claims.double().mean().item()


def resident_mib() -> float:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 2**20


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def repeated(case: Case, samples: int) -> list[ModelInputs]:
    """The calibration again and again, until it has so many samples: it shows memory and time."""
    missing, found = samples, []
    for batch in cycle(case.calibration):
        found.append(batch.with_batch(min(missing, batch.batch_size)))
        missing -= found[-1].batch_size
        if not missing:
            return found
    return found


def size_of(arguments: argparse.Namespace) -> Size:
    if arguments.quick:
        return Size(calibration=32, evaluation=64, training=640)
    return Size(training=arguments.training_samples)


def parse_arguments() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--only", nargs="+", choices=CASES, metavar="CASE", default=None)
    parser.add_argument("--methods", nargs="+", choices=METHODS, metavar="METHOD", default=METHODS)
    parser.add_argument(
        "--training-samples", type=int, default=Size.training, help="of what is trained here"
    )
    parser.add_argument(
        "--calibration-samples", type=int, help="repeat the calibration until it has so many"
    )
    parser.add_argument("--cache", type=Path, help="folder of the weights that are trained here")
    arguments = parser.parse_args()
    if arguments.data is None:
        parser.error("give the folder of the images and weights: --data DIR")
    arguments.data = Path(arguments.data)
    if arguments.cache is None and arguments.json is not None:
        arguments.cache = arguments.json.parent
    if arguments.only is None:
        arguments.only = list(CASES)[:2] if arguments.quick else list(CASES)
    return arguments


if __name__ == "__main__":
    main()
