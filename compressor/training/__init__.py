"""One trainer for everything: events, algorithms that change training, callbacks that watch it."""

from compressor.training.algorithm import Algorithm, Callback
from compressor.training.clock import Clock, Duration, Window
from compressor.training.errors import DivergedError, OutOfMemoryError
from compressor.training.evaluator import Evaluator
from compressor.training.event_engine import EventEngine
from compressor.training.events import Event
from compressor.training.state import State
from compressor.training.step import ManualStep
from compressor.training.tasks.base import TaskModel
from compressor.training.trainer import Trainer

__all__ = [
    "Algorithm",
    "Callback",
    "Clock",
    "DivergedError",
    "Duration",
    "Evaluator",
    "Event",
    "EventEngine",
    "ManualStep",
    "OutOfMemoryError",
    "State",
    "TaskModel",
    "Trainer",
    "Window",
]
