"""What was measured of training methods, as words and tables: from `results/methods.json`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from compressor.training import algorithms
from compressor.training.algorithm import Algorithm

RESULTS = Path(__file__).parent / "results" / "methods.json"
PLAIN = "plain"
TRAININGS = {"scratch": "a short training", "recovery": "a short recovery"}
LEVELS = ("mild", "medium", "hot")
Row = Mapping[str, Any]


def measured(name: str) -> str:
    """Measured cost and gain of the method `name`, a sentence for each network; '' if unknown.

    Args:
        name: of its class.
    """
    rows = [row for row in document().get("rows", ()) if row["method"] == name]
    return " ".join(filter(None, map(sentence, rows)))


def sentence(row: Row) -> str:
    """One row in words.

    >>> row = {"network": "A", "step time ratio": 1.5}
    >>> sentence({**row, "scratch gain": 0.25, "± of scratch gain": 0.5})
    'A: a step takes 1.50 times as long; +0.2 ± 0.5 points after a short training.'
    """
    facts = []
    if row.get("step time ratio") is not None:
        facts.append(f"a step takes {row['step time ratio']:.2f} times as long")
    for kind, words in TRAININGS.items():
        if row.get(f"{kind} gain") is not None:
            facts.append(f"{with_spread(row, f'{kind} gain', sign='+')} points after {words}")
    return f"{row['network']}: {'; '.join(facts)}." if facts else ""


def with_spread(row: Row, name: str, sign: str = "") -> str:
    """A mean and its spread over seeds; '' if it was not measured.

    >>> with_spread({"gain": 1.0, "± of gain": 0.25}, "gain", sign="+")
    '+1.0 ± 0.2'
    """
    value, spread = row.get(name), row.get(f"± of {name.removesuffix(' accuracy %')}")
    if value is None:
        return ""
    return f"{value:{sign}.1f}" + (f" ± {spread:.1f}" if spread is not None else "")


def methods_page() -> str:
    """Every method with its cost and gain, and how `finetune_compressed` was chosen."""
    found = document()
    lines = ["# Training methods, measured", "", *INTRODUCTION, ""]
    if not found:
        return "\n".join([*lines, "There are no results yet."]) + "\n"
    summary, schedules = found["summary"], found["schedules"]
    lines += how_measured(summary, schedules, found["rows"])
    lines += ["## One method at a time", "", methods_table(found["rows"]), ""]
    lines += ["## Combinations, and what `finetune_compressed` is made of", ""]
    lines += [*combinations(found["levels"], schedules), ""]
    lines += ["```text", *record(found), "```"]
    return "\n".join(lines) + "\n"


INTRODUCTION = (
    "What each [training method](algorithms.md) costs and what it gains. Made from",
    "`docs/results/methods.json` by `python -m docs.generate`; how it is measured:",
    "`benchmarks/methods.py`.",
)


def how_measured(summary: Row, schedules: Mapping[str, Any], rows: Sequence[Row]) -> list[str]:
    """The columns in words, with the schedules."""
    scratch, recovery, text = (schedules[name] for name in ("scratch", "recovery", "text"))
    before, after, estimated = (
        f"{summary[f'{name}_accuracy']:.1f} %" for name in ("reference", "pruned", "reestimated")
    )
    recovered, of_images = seeds(rows, "recovery"), seeds(rows, "scratch")
    of_text = seeds(rows, "scratch", "BERT")
    return [
        "- **Step time**: processor time of a step with the method, over one without, on one",
        "  thread; ± is half of the middle half of the rounds. Below 1 is faster. What is done",
        "  once, when a fit begins or ends, is not in it. Other programs ran meanwhile: a few",
        "  hundredths are no difference.",
        "- **Short training**: gain in points of accuracy over plain training, from random",
        f"  weights: {told(scratch)}, or {told(text)}.",
        "- **Recovery**: gain over plain fine-tuning of the trained ResNet-20 without half of its",
        f"  work: {told(recovery)}. It had {before} before it was pruned, {after} after, and",
        f"  {estimated} with its batch norms re-estimated, which is no training.",
        "- Factorize, GradualSparsity, HoldMasks and WeightClustering make a model smaller still:",
        "  what they lose is the price of that. GradualPruning begins with the whole network and",
        "  cuts it by as much; its five cuts fall into the few steps that are timed, and weigh",
        "  less in a longer fit.",
        "- ± of a gain is the standard deviation over seeds; of a seed all methods see the same",
        f"  batches. There are {recovered} seeds of a recovery, {of_images} of a short training of",
        f"  images and {of_text} of one of sentences; a gain without ± has one.",
        "- The images that judge are 1,017, the sentences 872: they are the same for all rows, but",
        "  differences below a point say little of others. Trainings are short and images small:",
        "  what a method gives in long ones is not shown, nor is what it was made",
        "  for, such as speed at large images or sequences.",
        "",
    ]


def seeds(rows: Sequence[Row], kind: str, network: str = "ResNet") -> str:
    """How many a row has."""
    counts = {row[f"{kind} seeds"] for row in rows if network in row["network"]} - {0}
    return " to ".join(str(each) for each in sorted({min(counts), max(counts)})) if counts else "0"


def told(schedule: Row) -> str:
    """A schedule in words."""
    samples, epochs = schedule["samples"], schedule["epochs"]
    of = "all images" if samples is None else f"{samples:,} images"
    of = "all sentences" if schedule["optimizer"]["name"] == "AdamW" else of
    return f"{epochs} epoch{'s' * (epochs > 1)} of {of}"


def methods_table(rows: Sequence[Row]) -> str:
    """One row a method and network."""
    cells = []
    for row in rows:
        name = row["method"]
        ratio, spread = row["step time ratio"], row["± of ratio"]
        is_plain = name == PLAIN
        kind = " accuracy %" if is_plain else " gain"
        cells.append(
            [
                f"[{name}](algorithms/{name.lower()}.md)" if has_page(name) else name,
                row["network"],
                row["settings"].replace("|", "\\|") or ("" if is_plain else "defaults"),
                f"{ratio:.2f} ± {spread:.2f}" if ratio is not None else "",
                *(
                    with_spread(row, each + kind, "" if is_plain else "+")
                    + (" %" if is_plain and row[each + kind] is not None else "")
                    for each in TRAININGS
                ),
            ]
        )
    names = ("method", "network", "settings", "step time", "short training", "recovery")
    return table(names, cells)


def has_page(name: str) -> bool:
    """Whether it is an algorithm."""
    found = getattr(algorithms, name, None)
    return isinstance(found, type) and issubclass(found, Algorithm)


def combinations(rows: Sequence[Row], schedules: Mapping[str, Any]) -> list[str]:
    """The rows of combinations, best first, and the choice."""
    columns = ("combination", "learning rate", "accuracy %", "gain", "seconds")
    cells = [
        [
            f"**{row['combination']}**" if row["combination"] in LEVELS else row["combination"],
            f"{row['learning rate']:g}",
            with_spread(row, "recovery accuracy %"),
            with_spread(row, "recovery gain", "+"),
            f"{row['seconds']:.0f}",
        ]
        for row in rows
    ]
    return [
        f"The same recovery in {told(schedules['levels'])}. The teacher's weight is 1 and that of",
        "the labels, where they are named, 1; MixUp mixes by any share, SAM is at every fourth",
        "batch. The gain is over plain fine-tuning at the same seed; seconds are processor time of",
        "one training. Rows without ± have one seed.",
        "",
        table(columns, cells),
        "",
        *CHOICE,
    ]


CHOICE = (
    "`finetune_compressed` was chosen by these tables:",
    "",
    "- **mild** is distillation with its defaults, of which the labels have a tenth: the method",
    "  that gained most by itself in the short recovery. In the longer one it is ahead of plain",
    "  fine-tuning on average and not with every seed. What else `mild` had is left out: labels",
    "  at full weight, which gained less with the one seed that was tried; an average of the",
    "  weights, which gained nothing where the learning rate falls to 0; and clipping gradients",
    "  at a norm of 1, which lost.",
    "- **medium** adds CutMix, which lost much where it was alone, and beside a teacher no more",
    "  than MixUp and RandAugment did. MixUp and label smoothing, which it had, are left out.",
    "- **hot** adds SAM at every fourth batch.",
    "",
    "Neither of the two is shown to be better than `mild`: in such short trainings nothing that",
    "was added to the teacher gained. They are for the longer ones that they do by default, where",
    "a network sees the same few images many times; try `mild` first. The tables are of one small",
    "network and one data set, and the choice was made on the images that judge.",
)


def record(found: Row) -> list[str]:
    """How it came about."""
    machine, versions = found["machine"], found["versions"]
    return [
        f"command: {found['command']}",
        f"machine: {machine['cpu']}, one core of {machine['cores']}",
        f"versions: {', '.join(f'{name} {version}' for name, version in versions.items())}",
        f"seeds: {found['seed']} and those after it",
    ]


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(each) + " |" for each in (columns, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(columns), *lines[1:]])


@cache
def document() -> dict[str, Any]:
    """All of the results; empty where there are none."""
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}  # type: ignore[no-any-return]
