"""What a run is asked to do: frozen dataclasses, read from a dict or YAML in any known spelling."""

from compressor.config.parts import (
    BudgetConfig,
    CustomCompression,
    ExecutorConfig,
    ExportConfig,
    LayerCompression,
    QuantizationArgs,
    TargetConfig,
)
from compressor.config.schema import Config
from compressor.config.trainer import DistillationConfig, EmaConfig, TrainerConfig
from compressor.interfaces.optimizers import SchedulerConfig

__all__ = [
    "BudgetConfig",
    "Config",
    "CustomCompression",
    "DistillationConfig",
    "EmaConfig",
    "ExecutorConfig",
    "ExportConfig",
    "LayerCompression",
    "QuantizationArgs",
    "SchedulerConfig",
    "TargetConfig",
    "TrainerConfig",
]
