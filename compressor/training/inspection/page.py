"""The page about a classifier: one HTML file that needs no network, no other file and no script."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from compressor.training.inspection.confusion import frequent_mistakes
from compressor.training.inspection.images import png_uri, to_heat, to_rgb
from compressor.training.inspection.template import PAGE, STYLE

if TYPE_CHECKING:
    from compressor.training.inspection.inspection import Inspection
    from compressor.training.inspection.samples import Sample

MOST_CLASSES = 100  # in the matrix: its cells are the square of this
NUMBERED_CLASSES = 24  # up to here there is room for the numbers in the cells
MOST_MISTAKES = 12
SMALL_IMAGE = 96  # pixels: up to here enlarged as squares, not blurred
STRONGEST = 0.85  # shade of a cell: text is readable on it in light and dark

GALLERIES = (
    ("Worst", "worst", "The highest loss: the label was given the least probability."),
    ("Most confused", "most_confused", "The two most probable classes are closest to each other."),
    ("Best", "best", "Right, with the lowest loss."),
)
MAP_TEXT = " Beside each, how much every pixel moves the score of the prediction: bright, much."


def render_page(inspection: Inspection) -> str:
    """The whole page. Names of classes, title and notes are escaped."""
    from jinja2 import Environment, StrictUndefined  # here: importing this package does not need it
    from markupsafe import Markup

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    names = inspection.classes
    galleries: list[dict[str, Any]] = [
        {"title": title, "text": text, "samples": [_sample(each, inspection) for each in kept]}
        for title, field, text in GALLERIES
        if (kept := getattr(inspection, field))
    ]
    has_maps = any(each["heat"] for part in galleries for each in part["samples"])
    return environment.from_string(PAGE).render(
        title=inspection.title,
        style=Markup(STYLE),
        numbers=_numbers(inspection),
        notes=inspection.notes,
        mistakes=[
            {
                "label": names[label],
                "prediction": names[prediction],
                "times": times,
                "of": int(inspection.confusion[label].sum()),
            }
            for label, prediction, times in frequent_mistakes(inspection.confusion, MOST_MISTAKES)
        ],
        matrix=_matrix(inspection.confusion, names),
        scores=_score_rows(inspection),
        galleries=galleries,
        map_text=MAP_TEXT if has_maps else "",
    )


def _numbers(inspection: Inspection) -> list[dict[str, Any]]:
    """The headline: name, value, a detail below it, and whether the value is words."""
    scores, samples = inspection.scores, inspection.confusion.sum(1)
    numbers = [
        ("Accuracy", _percent(inspection.accuracy), f"{inspection.right} of {inspection.samples}"),
        ("Macro F1", _percent(scores.macro_f1), "mean of the classes"),
        ("Cross entropy", f"{inspection.loss:.3g}", "nats, mean of the samples"),
        ("Classes", str(len(inspection.classes)), f"{int((samples > 0).sum())} with samples"),
    ]
    occurring = samples.nonzero().flatten()
    weakest = int(occurring[scores.recall[occurring].argmin()])
    recall = f"{_percent(scores.recall[weakest].item())} of {int(samples[weakest])} recognised"
    return [
        *({"name": a, "value": b, "detail": c, "is_words": False} for a, b, c in numbers),
        {
            "name": "Least recognised",
            "value": inspection.classes[weakest],
            "detail": recall,
            "is_words": True,
        },
    ]


def _matrix(confusion: Tensor, names: Sequence[str]) -> dict[str, Any]:
    """Rows of cells; None is a cell of 0."""
    shown = _shown_classes(confusion)
    sums = confusion.sum(1)
    remark = (
        f" Shown are the {len(shown)} of {len(names)} classes with the most mistakes."
        if len(shown) < len(names)
        else ""
    )

    def cell(label: int, prediction: int, times: int) -> dict[str, Any] | None:
        if not times:
            return None
        # Square root: a mistake of one in a hundred is to be seen.
        shade = STRONGEST * math.sqrt(times / int(sums[label]))
        return {
            "kind": "r" if label == prediction else "w",
            "shade": f"{max(shade, 0.08):.2f}",
            "name": names[prediction],
            "times": times,
        }

    rows = [
        {
            "name": names[label],
            "cells": [
                cell(label, prediction, times)
                for prediction, times in zip(shown, counts, strict=True)
            ],
        }
        for label, counts in zip(shown, confusion[shown][:, shown].tolist(), strict=True)
    ]
    return {
        "names": [names[index] for index in shown],
        "rows": rows,
        "is_dense": len(shown) > NUMBERED_CLASSES,
        "cell": 40 if len(shown) <= 12 else 30 if len(shown) <= NUMBERED_CLASSES else 13,
        "remark": remark,
    }


def _shown_classes(confusion: Tensor) -> list[int]:
    """All classes, or those that take part in the most mistakes; in their order."""
    if len(confusion) <= MOST_CLASSES:
        return list(range(len(confusion)))
    wrong = confusion.clone().fill_diagonal_(0)
    order = (wrong.sum(0) + wrong.sum(1)).sort(descending=True, stable=True).indices
    return sorted(order[:MOST_CLASSES].tolist())


def _score_rows(inspection: Inspection) -> list[dict[str, Any]]:
    """A row for each class; a fraction of nothing is left open."""
    scores, matrix = inspection.scores, inspection.confusion
    parts = torch.stack((scores.precision, scores.recall, scores.f1), dim=1)
    is_known = torch.stack((matrix.sum(0) > 0, matrix.sum(1) > 0, scores.is_present), dim=1)
    order = scores.f1.masked_fill(~scores.is_present, 2.0).sort(stable=True).indices.tolist()
    return [
        {
            "name": inspection.classes[index],
            "samples": int(matrix[index].sum()),
            "parts": [
                {"share": f"{value:.3f}", "percent": _percent(value) if known else ""}
                for value, known in zip(
                    parts[index].tolist(), is_known[index].tolist(), strict=True
                )
            ],
        }
        for index in order
    ]


def _sample(sample: Sample, inspection: Inspection) -> dict[str, Any]:
    names = inspection.classes
    pixels = to_rgb(sample.image, inspection.denormalize)
    guesses = {
        sample.prediction: sample.prediction_probability,
        sample.label: sample.label_probability,
        sample.runner_up: sample.runner_up_probability,
    }
    return {
        "index": sample.index,
        "label": names[sample.label],
        "prediction": names[sample.prediction],
        "is_right": sample.is_right,
        "loss": f"{sample.loss:.3g}",
        "guesses": [
            {"name": names[index], "share": f"{share:.3f}", "percent": _percent(share)}
            for index, share in sorted(guesses.items(), key=lambda item: -item[1])
        ],
        "picture": png_uri(pixels),
        "heat": "" if sample.saliency is None else png_uri(to_heat(sample.saliency)),
        "width": pixels.shape[1],
        "height": pixels.shape[0],
        "is_small": max(pixels.shape[:2]) <= SMALL_IMAGE,
    }


def _percent(share: float) -> str:
    """A fraction for people.

    >>> _percent(0.9131)
    '91.3 %'
    """
    return f"{100 * share:.1f} %"
