"""Which models can be pruned: torchvision, timm and Hugging Face, one line a model.

Random weights, small inputs. A model is fine when something was pruned, the pruned model equals the
masked one, ONNX Runtime gives its outputs, and it comes back from disk; see `coverage_checks` for
what that means. torch-pruning alone gets the same model in the same run.

Each model runs in processes of its own with limits. With --json FILE what is in the file already is
not measured again, unless --again says so: an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch

from benchmarks.common import finish, make_parser
from benchmarks.coverage_checks import check_ours
from benchmarks.coverage_models import Case, list_cases
from benchmarks.coverage_peer import check_peer
from benchmarks.limits import run_limited

Row = dict[str, Any]
NEEDED = ("runs", "equal", "onnx", "reloads")
QUICK = (
    "torchvision/(resnet18|shufflenet_v2_x0_5|mobilenet_v3_small|squeezenet1_1|convnext_tiny|swin_t"
    "|lraspp_mobilenet_v3_large|ssdlite320_mobilenet_v3_large)"
    "|timm/(vit_tiny_patch16_224|regnety_002)"
    "|transformers/(BertForSequenceClassification|GPT2LMHeadModel)"
)


def main() -> None:
    arguments = parse_arguments()
    started = time.monotonic()
    torch.set_num_threads(1)
    load_libraries()
    cases = [case for case in list_cases() if re.search(arguments.only, case.name)]
    rows = read_rows(arguments)
    waiting = [case for case in cases if is_missing(rows.get(case.name), arguments)]

    def measure_one(case: Case) -> Row:
        row = measure(case, rows.get(case.name, {}), arguments)
        print(f"{case.name}: {row['why not'] or 'ok'}", file=sys.stderr, flush=True)
        return row

    with ThreadPoolExecutor(arguments.jobs) as pool:
        for case, row in zip(waiting, pool.map(measure_one, waiting), strict=True):
            rows[case.name] = row
            write_rows(rows, arguments)
    chosen = [rows[case.name] for case in cases]
    if not chosen:
        sys.exit(f"No model is called like {arguments.only!r}.")
    finish([table_row(row) for row in chosen], summarize(chosen), arguments, started)
    write_rows(rows, arguments)


def load_libraries() -> None:
    """Before the processes fork, so that not each of them does."""
    for name in ("timm", "transformers", "torchvision", "onnxscript", "torch.onnx", "torch.export"):
        importlib.import_module(name)


def is_missing(row: Row | None, arguments: argparse.Namespace) -> bool:
    """Whether something of a model has to be measured."""
    return row is None or "stopped" not in row or not (arguments.no_peer or "peer_stopped" in row)


def measure(case: Case, known: Row, arguments: argparse.Namespace) -> Row:
    """All facts of one model, and the reason of the first "no".

    Args:
        case: the model.
        known: what an earlier run measured of it.
        arguments: with the limits.
    """
    began = time.monotonic()
    row: Row = {"model": case.name, "kind": case.kind, "note": case.note, **known}
    if "stopped" not in row:
        work = partial(check_ours, case, arguments.seed)
        ours = run_limited(work, seconds=arguments.seconds, memory_gib=arguments.memory)
        row |= {**ours.facts, "stopped": ours.stopped}
    if "peer_stopped" not in row and not arguments.no_peer:
        work = partial(check_peer, case, arguments.seed)
        peer = run_limited(work, seconds=arguments.peer_seconds, memory_gib=arguments.memory)
        row |= {**peer.facts, "peer_stopped": peer.stopped}
    row["ok"] = is_fine(row)
    row["why not"] = "" if row["ok"] else reason(row)
    row["minutes"] = round(row.get("minutes", 0) + (time.monotonic() - began) / 60, 2)
    return row


def is_fine(row: Row) -> bool:
    return row.get("removed", 0) > 0 and all(row.get(fact) is True for fact in NEEDED)


def reason(row: Row) -> str:
    """Why a model is not fine, in a sentence."""
    if row.get("stopped") and row.get("removed", 1):
        return str(row["stopped"])
    if not row.get("removed"):
        seen = [why for _, why in row.get("quarantined", ())]
        seen += [f"{why} ({count} layers)" for why, count, _ in row.get("frozen", ())]
        why = seen[0] if seen else "no group was found"
        return f"Nothing was pruned: {why}"
    failed = next(fact for fact in NEEDED if row.get(fact) is not True)
    if failed == "onnx" and row.get("dense_onnx") is False:
        return f"onnx, and the unpruned model neither: {row['dense_onnx_reason']}"
    return f"{failed}: {row.get(f'{failed}_reason', 'not reached')}"


def table_row(row: Row) -> Row:
    """The line of a model."""
    note = f" ({row['note']})" if row["note"] else ""
    return {
        "model": row["model"] + note,
        "traced": sign(row.get("traced")),
        "prunable %": f"{100 * row.get('prunable_fraction', 0.0):.0f}",
        "equals masked": sign(row.get("equal")),
        "ONNX Runtime": sign(row.get("onnx")),
        "reloaded": sign(row.get("reloads")),
        "trains": sign(row.get("trains")),
        "s to find groups": row.get("seconds", ""),
        "torch-pruning": peer_sign(row),
        "why not": row["why not"].replace("|", "/"),
    }


def sign(answer: bool | None) -> str:
    return {True: "yes", False: "no", None: "–"}[answer]


def peer_sign(row: Row) -> str:
    """What torch-pruning made of the model, in a word or two."""
    if "peer_stopped" not in row:
        return "–"
    if row["peer_stopped"]:
        return "too slow" if "over the limit" in row["peer_stopped"] else "raises"
    if not row.get("peer_removed"):
        return "prunes nothing"
    if not row.get("peer_runs"):
        return "forward raises"
    return "equal" if row.get("peer_equal") else "other outputs"


def summarize(rows: Sequence[Row]) -> Mapping[str, float]:
    classifiers = [row for row in rows if row["kind"] == "classifier"]
    others = [row for row in rows if row["kind"] != "classifier"]
    peers = [row for row in rows if "peer_stopped" in row]
    return {
        "classifiers_ok_fraction": fraction(row["ok"] for row in classifiers),
        "others_ok_fraction": fraction(row["ok"] for row in others),
        "raised": sum(row.get("runs") is False or row.get("trains") is False for row in rows),
        "models": len(rows),
        "peer_runs_fraction": fraction(row.get("peer_runs") is True for row in peers),
        "peer_equal_fraction": fraction(row.get("peer_equal") is True for row in peers),
    }


def fraction(answers: Any) -> float:
    answers = list(answers)
    return sum(answers) / len(answers) if answers else float("nan")


def read_rows(arguments: argparse.Namespace) -> dict[str, Row]:
    """What an earlier run measured and this one need not, by model."""
    if arguments.json is None or not arguments.json.exists():
        return {}
    rows = {row["model"]: row for row in json.loads(arguments.json.read_text())["models"]}
    return {name: stale(row) if is_again(row, arguments) else row for name, row in rows.items()}


def is_again(row: Row, arguments: argparse.Namespace) -> bool:
    """Whether this run was asked to measure a model anew."""
    if not re.search(arguments.only, row["model"]):
        return False
    return arguments.again == "all" or (arguments.again == "failed" and not row.get("ok"))


def stale(row: Row) -> Row:
    """Without what is to be measured again; torch-pruning does not change meanwhile."""
    return {key: value for key, value in row.items() if key == "model" or key.startswith("peer_")}


def write_rows(rows: Mapping[str, Row], arguments: argparse.Namespace) -> None:
    """All facts of all models, beside what `finish` writes."""
    if arguments.json is None:
        return
    document = json.loads(arguments.json.read_text()) if arguments.json.exists() else {}
    document["models"] = list(rows.values())
    scratch = arguments.json.with_suffix(".part")
    scratch.write_text(json.dumps(document, indent=1) + "\n")
    scratch.replace(arguments.json)


def parse_arguments() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--only", default="", help="regular expression of the models' names")
    parser.add_argument(
        "--again", choices=["failed", "all"], help="of the models in the file: measure these anew"
    )
    parser.add_argument("--jobs", type=int, default=1, help="models at a time")
    parser.add_argument("--seconds", type=float, default=120.0, help="of processor time, a model")
    parser.add_argument("--peer-seconds", type=float, default=60.0, help="the same, torch-pruning")
    parser.add_argument("--memory", type=float, default=8.0, help="GiB, a model")
    parser.add_argument("--no-peer", action="store_true", help="leave torch-pruning out")
    arguments = parser.parse_args()
    if arguments.quick and not arguments.only:
        arguments.only = f"^({QUICK})$"
    return arguments


if __name__ == "__main__":
    main()
