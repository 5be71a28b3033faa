"""What watches training, one file each."""

from compressor.training.callbacks.best import KeepBest, load_best
from compressor.training.callbacks.early_stopping import EarlyStopping
from compressor.training.callbacks.history import History
from compressor.training.callbacks.learning_curve import LearningCurveStopping
from compressor.training.callbacks.learning_rate import LearningRateMonitor
from compressor.training.callbacks.memory import MemoryMonitor
from compressor.training.callbacks.monitor import Monitor
from compressor.training.callbacks.nan_monitor import NaNMonitor
from compressor.training.callbacks.progress import ProgressBar
from compressor.training.callbacks.throughput import ThroughputMonitor

__all__ = [
    "EarlyStopping",
    "History",
    "KeepBest",
    "LearningCurveStopping",
    "LearningRateMonitor",
    "MemoryMonitor",
    "Monitor",
    "NaNMonitor",
    "ProgressBar",
    "ThroughputMonitor",
    "load_best",
]
