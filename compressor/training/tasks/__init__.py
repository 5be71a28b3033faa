"""Tasks: models that say how they are called, trained and judged.

The names below are loaded when they are first used; what needs an extra asks for it when it is
called.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from compressor.training.tasks.base import Metric, TaskModel, compute_metrics, named_metrics

if TYPE_CHECKING:
    from compressor.training.tasks.adapted import AdaptedTask
    from compressor.training.tasks.classifier import ClassifierTask
    from compressor.training.tasks.detection import DetectionTask
    from compressor.training.tasks.huggingface import HuggingFaceTask
    from compressor.training.tasks.language import LanguageCrossEntropy
    from compressor.training.tasks.timm import timm_task

__all__ = [
    "AdaptedTask",
    "ClassifierTask",
    "DetectionTask",
    "HuggingFaceTask",
    "LanguageCrossEntropy",
    "Metric",
    "TaskModel",
    "compute_metrics",
    "named_metrics",
    "timm_task",
]

_HOMES = {
    "AdaptedTask": "adapted",
    "ClassifierTask": "classifier",
    "DetectionTask": "detection",
    "HuggingFaceTask": "huggingface",
    "LanguageCrossEntropy": "language",
    "timm_task": "timm",
}


def __getattr__(name: str) -> object:
    """Load a public name from its home and keep it."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """All public names, loaded or not."""
    return sorted({*globals(), *__all__})
