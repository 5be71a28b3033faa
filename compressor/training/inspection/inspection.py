"""What was found out about a classifier, as a value: a page for people, JSON for programs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from compressor.files import write_text
from compressor.training.inspection.confusion import ClassScores, class_scores
from compressor.training.inspection.images import Normalization
from compressor.training.inspection.samples import Sample


@dataclass(frozen=True, eq=False)
class Inspection:
    """A classifier on one pass over some data.

    Attributes:
        classes: names, by index.
        confusion: (K, K) of int64: labels in rows, predictions in columns.
        loss: mean cross entropy, in nats; what a model was trained with may be another.
        best: predicted right, with the lowest loss; the most extreme first, here and below.
        worst: the highest loss.
        most_confused: the smallest margin between the two most probable classes.
        denormalize: mean and standard deviation of the images, where they are known.
        title: of the page.
        notes: sentences about what could not be shown.
    """

    classes: tuple[str, ...]
    confusion: Tensor
    loss: float
    best: tuple[Sample, ...]
    worst: tuple[Sample, ...]
    most_confused: tuple[Sample, ...]
    denormalize: Normalization | None = None
    title: str = "Inspection"
    notes: tuple[str, ...] = ()

    @property
    def samples(self) -> int:
        """How many samples there were."""
        return int(self.confusion.sum())

    @property
    def right(self) -> int:
        """How many of them were predicted right."""
        return int(self.confusion.diagonal().sum())

    @property
    def accuracy(self) -> float:
        """The part that was predicted right, 0 to 1."""
        return self.right / self.samples

    @cached_property
    def scores(self) -> ClassScores:
        """Precision, recall and F1 of each class."""
        return class_scores(self.confusion)

    def to_html(self) -> str:
        """One page that needs nothing else: no network, no other file, no script."""
        from compressor.training.inspection.page import render_page  # which needs this file

        return render_page(self)

    def save(self, path: str | Path) -> Path:
        """Write the page to `path`, whose folder is made if it is missing; returns `path`."""
        path = Path(path)
        write_text(path, self.to_html())
        return path

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; the images are left out."""
        scores = self.scores
        rows = zip(
            self.classes,
            self.confusion.sum(1).tolist(),
            scores.precision.tolist(),
            scores.recall.tolist(),
            scores.f1.tolist(),
            strict=True,
        )
        keys = ("name", "samples", "precision", "recall", "f1")
        return {
            "title": self.title,
            "samples": self.samples,
            "accuracy": self.accuracy,
            "loss": self.loss,
            "macro_f1": scores.macro_f1,
            "classes": [dict(zip(keys, row, strict=True)) for row in rows],
            "confusion": self.confusion.tolist(),
            "best": [self._describe(sample) for sample in self.best],
            "worst": [self._describe(sample) for sample in self.worst],
            "most_confused": [self._describe(sample) for sample in self.most_confused],
            "notes": list(self.notes),
        }

    def _describe(self, sample: Sample) -> dict[str, Any]:
        return {
            "index": sample.index,
            "label": self.classes[sample.label],
            "prediction": self.classes[sample.prediction],
            "runner_up": self.classes[sample.runner_up],
            "label_probability": sample.label_probability,
            "prediction_probability": sample.prediction_probability,
            "runner_up_probability": sample.runner_up_probability,
            "loss": sample.loss,
        }
