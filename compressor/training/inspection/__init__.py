"""Looking at a classifier of images: what it takes for what, and the samples that tell most."""

from compressor.training.inspection.classifier import inspect_classifier
from compressor.training.inspection.confusion import (
    ClassScores,
    class_scores,
    confusion_matrix,
    frequent_mistakes,
)
from compressor.training.inspection.inspection import Inspection
from compressor.training.inspection.report import VisualReport
from compressor.training.inspection.saliency import input_gradients
from compressor.training.inspection.samples import Sample, SampleCollector

__all__ = [
    "ClassScores",
    "Inspection",
    "Sample",
    "SampleCollector",
    "VisualReport",
    "class_scores",
    "confusion_matrix",
    "frequent_mistakes",
    "input_gradients",
    "inspect_classifier",
]
