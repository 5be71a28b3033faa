"""One trainer for everything: events, algorithms that change training, callbacks that watch it."""

from compressor.training.algorithm import Algorithm, Callback
from compressor.training.clock import Clock, Duration, Window
from compressor.training.errors import DivergedError
from compressor.training.events import Event
from compressor.training.state import State
from compressor.training.trainer import Trainer

__all__ = [
    "Algorithm",
    "Callback",
    "Clock",
    "DivergedError",
    "Duration",
    "Event",
    "State",
    "Trainer",
    "Window",
]
