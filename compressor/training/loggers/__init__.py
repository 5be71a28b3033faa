"""Where measured values go, one file each."""

from compressor.training.loggers.base import Logger
from compressor.training.loggers.json_lines import JsonLinesLogger, read_json_lines
from compressor.training.loggers.memory import InMemoryLogger, Row
from compressor.training.loggers.mlflow import MLflowLogger
from compressor.training.loggers.tensorboard import TensorBoardLogger

__all__ = [
    "InMemoryLogger",
    "JsonLinesLogger",
    "Logger",
    "MLflowLogger",
    "Row",
    "TensorBoardLogger",
    "read_json_lines",
]
