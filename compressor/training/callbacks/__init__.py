"""What watches training, one file each."""

from compressor.training.callbacks.best import KeepBest
from compressor.training.callbacks.early_stopping import EarlyStopping
from compressor.training.callbacks.history import History
from compressor.training.callbacks.progress import ProgressBar

__all__ = ["EarlyStopping", "History", "KeepBest", "ProgressBar"]
