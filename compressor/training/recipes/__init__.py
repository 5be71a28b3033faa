"""Presets of the trainer: functions that return a configured loop, each on top of another.

A loop of your own with callbacks: `recipe`, `train_and_test`, `train_and_call`, `classification`,
`cross_entropy_classification`. For compressed models: `finetune_compressed`, `distill`.
"""

from compressor.training.recipes.classification import classification, cross_entropy_classification
from compressor.training.recipes.finetune import (
    distill,
    finetune_compressed,
    hot_algorithms,
    medium_algorithms,
    mild_algorithms,
)
from compressor.training.recipes.hooks import Lane, RecipeCallbacks
from compressor.training.recipes.loop import Recipe, recipe
from compressor.training.recipes.meters import (
    AccAvg,
    ConfusionMatrix,
    EpochMetricAvg,
    ExponentialMetricAvg,
    Log,
    Throughput,
    WindowedMetricAvg,
)
from compressor.training.recipes.presets import train_and_call, train_and_test
from compressor.training.recipes.reporting import (
    CallRecipe,
    Checkpoint,
    InspectionPage,
    StdoutLogger,
    ToLogger,
)
from compressor.training.recipes.stepping import LRByFraction, LRSched, Optimizer, Polyak

__all__ = [
    "AccAvg",
    "CallRecipe",
    "Checkpoint",
    "ConfusionMatrix",
    "EpochMetricAvg",
    "ExponentialMetricAvg",
    "InspectionPage",
    "LRByFraction",
    "LRSched",
    "Lane",
    "Log",
    "Optimizer",
    "Polyak",
    "Recipe",
    "RecipeCallbacks",
    "StdoutLogger",
    "Throughput",
    "ToLogger",
    "WindowedMetricAvg",
    "classification",
    "cross_entropy_classification",
    "distill",
    "finetune_compressed",
    "hot_algorithms",
    "medium_algorithms",
    "mild_algorithms",
    "recipe",
    "train_and_call",
    "train_and_test",
]


def __getattr__(name: str) -> object:
    """Only ends in an error: that of a counter says that there is no need for one."""
    hint = ""
    if name == "Counter":
        hint = ". Counting is built in: state['epoch'], state['iters'], state['epoch_batch']"
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}{hint}")
