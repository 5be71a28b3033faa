"""Compress a trained PyTorch model within a metric budget, and certify the exported file.

The names below are loaded when they are first used: `import compressor` does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from compressor.config import Config
    from compressor.engine import Engine
    from compressor.export.quantize import Quantized, quantize
    from compressor.frameworks.torch_framework import TorchFramework
    from compressor.interfaces import (
        Accuracy,
        DefaultTorchNativeSchedulerFactory,
        Device,
        EvalLossFunction,
        EvaluationFunction,
        ExternalTrainingLoop,
        ForwardPass,
        LossFunction,
        NativeOptimizerFactory,
        NativeSchedulerFactory,
        TopK,
        TorchEvaluationFunction,
        TorchForwardPass,
    )
    from compressor.profiling.profile import compare, profile
    from compressor.result import Result
    from compressor.structure.archive import load, save
    from compressor.techniques.one_shot import Pruned, prune
    from compressor.training import (
        Algorithm,
        Callback,
        Evaluator,
        Event,
        EventEngine,
        State,
        TaskModel,
        Trainer,
    )
    from compressor.training.tasks import ClassifierTask

__version__ = "0.1.0"

__all__ = [
    "Accuracy",
    "Algorithm",
    "Callback",
    "ClassifierTask",
    "Config",
    "DefaultTorchNativeSchedulerFactory",
    "Device",
    "Engine",
    "EvalLossFunction",
    "EvaluationFunction",
    "Evaluator",
    "Event",
    "EventEngine",
    "ExternalTrainingLoop",
    "ForwardPass",
    "LossFunction",
    "NativeOptimizerFactory",
    "NativeSchedulerFactory",
    "Pruned",
    "Quantized",
    "Result",
    "State",
    "TaskModel",
    "TopK",
    "TorchEvaluationFunction",
    "TorchForwardPass",
    "TorchFramework",
    "Trainer",
    "__version__",
    "compare",
    "load",
    "profile",
    "prune",
    "quantize",
    "save",
]

_HOMES = {
    "Accuracy": "compressor.interfaces",
    "Algorithm": "compressor.training",
    "Callback": "compressor.training",
    "ClassifierTask": "compressor.training.tasks",
    "Config": "compressor.config",
    "DefaultTorchNativeSchedulerFactory": "compressor.interfaces",
    "Device": "compressor.interfaces",
    "Engine": "compressor.engine",
    "EvalLossFunction": "compressor.interfaces",
    "EvaluationFunction": "compressor.interfaces",
    "Evaluator": "compressor.training",
    "Event": "compressor.training",
    "EventEngine": "compressor.training",
    "ExternalTrainingLoop": "compressor.interfaces",
    "ForwardPass": "compressor.interfaces",
    "LossFunction": "compressor.interfaces",
    "NativeOptimizerFactory": "compressor.interfaces",
    "NativeSchedulerFactory": "compressor.interfaces",
    "Pruned": "compressor.techniques.one_shot",
    "Quantized": "compressor.export.quantize",
    "Result": "compressor.result",
    "State": "compressor.training",
    "TaskModel": "compressor.training",
    "TopK": "compressor.interfaces",
    "TorchEvaluationFunction": "compressor.interfaces",
    "TorchForwardPass": "compressor.interfaces",
    "TorchFramework": "compressor.frameworks.torch_framework",
    "Trainer": "compressor.training",
    "compare": "compressor.profiling.profile",
    "load": "compressor.structure.archive",
    "profile": "compressor.profiling.profile",
    "prune": "compressor.techniques.one_shot",
    "quantize": "compressor.export.quantize",
    "save": "compressor.structure.archive",
}


def __getattr__(name: str) -> object:
    """Load a public name from its home and keep it."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """All public names, loaded or not."""
    return sorted({*globals(), *__all__})
