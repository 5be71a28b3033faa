"""A teacher as a training borrows it: called on what the student was called with."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from compressor.training.state import State
from compressor.training.step import Call
from compressor.training.taps import Taps
from compressor.training.tasks.base import TaskModel


class LentTeacher:
    """A teacher for the time of a fit: in eval mode, on the student's device.

    Args:
        teacher: is given back as it was.
        tapped: names of its layers whose outputs are wanted.
    """

    def __init__(self, teacher: nn.Module, tapped: Collection[str]) -> None:
        self._teacher = teacher
        self._asked = teacher
        self._taps = Taps(tapped, is_for_training=False)
        self._taps.disarm()
        self._modes = [(module, module.training) for module in teacher.modules()]
        self._home = next((parameter.device for parameter in teacher.parameters()), None)

    def borrow(self, state: State) -> None:
        """Bring it to where `state` is."""
        self._taps.put_on(self._teacher)
        self._teacher.to(state.device).eval()
        if isinstance(state.model, TaskModel) and not isinstance(self._teacher, TaskModel):
            self._asked = state.model.around(self._teacher)

    def ask(self, calls: Sequence[Call]) -> tuple[list[Any], dict[str, list[Tensor]]]:
        """Outputs for the inputs of each call, and the features."""
        self._taps.arm()
        with torch.no_grad():
            answers = [call.inputs.call(self._asked) for call in calls]
        features = self._taps.take()
        self._taps.disarm()
        return answers, features

    def give_back(self) -> None:
        """Put modes and device back."""
        self._taps.take_off()
        for module, mode in self._modes:
            module.training = mode
        if self._home is not None:
            self._teacher.to(self._home)
