"""A teacher's outputs as targets, beside or instead of the labels (Hinton et al., 2015)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compressor.errors import ModelError
from compressor.interfaces.inputs import output_tensors
from compressor.training.algorithm import Algorithm
from compressor.training.events import Event
from compressor.training.state import State


def distillation_loss(student: Any, teacher: Any, temperature: float = 2.0) -> Tensor:
    """Mean distance between the outputs of two models, over their tensors.

    Logits (N, K), K > 1: KL(teacher || student) of the softened distributions, times the square of
    the temperature, which keeps the size of the gradient. Other tensors: mean squared error over
    the mean square of the teacher's.

    Args:
        student: tensors in any nesting; those that are no floating point are left out.
        teacher: of the same form.
        temperature: above 0; 1 leaves the logits as they are.

    Returns:
        Shape (), 0 or more.

    Raises:
        ModelError: if the two do not have the same shapes.

    >>> logits = torch.tensor([[1.0, 2.0]])
    >>> distillation_loss(logits, logits).item()
    0.0
    """
    ours, theirs = output_tensors(student), output_tensors(teacher)
    shapes, wanted = [tuple(t.shape) for t in ours], [tuple(t.shape) for t in theirs]
    if shapes != wanted or not ours:
        raise ModelError(
            f"The student gives tensors of shapes {shapes} and the teacher {wanted}: there is "
            "nothing to compare. A model that returns something else in training mode cannot be "
            "distilled as a whole; train it without distillation."
        )
    pairs = zip(ours, theirs, strict=True)
    distances = [_distance(s.float(), t.detach().float(), temperature) for s, t in pairs]
    return torch.stack(distances).mean()


class Distillation(Algorithm):
    """Adds the distance to a teacher that sees the same inputs, as the student got them.

    During a fit the teacher is in eval mode and on the student's device; both are put back. It is
    not trained, and not in the checkpoint.

    Args:
        teacher: is called like the student.
        weight: of the distance.
        task_weight: of the terms of the user's own loss.
        temperature: softens logits.
    """

    events = frozenset({Event.FIT_START, Event.BATCH_START, Event.AFTER_FORWARD, Event.AFTER_LOSS})

    def __init__(
        self,
        teacher: nn.Module,
        *,
        weight: float = 0.9,
        task_weight: float = 0.1,
        temperature: float = 2.0,
    ) -> None:
        self.teacher = teacher
        self.weight = weight
        self.task_weight = task_weight
        self.temperature = temperature
        self._distances: list[Tensor] = []
        self._modes: list[tuple[nn.Module, bool]] = []
        self._home: torch.device | None = None

    def on(self, event: Event, state: State) -> None:
        """Prepare the teacher, ask it at every forward pass, add the term."""
        if event is Event.FIT_START:
            self._borrow(state.device)
        elif event is Event.BATCH_START:
            self._distances = []
        elif event is Event.AFTER_FORWARD:
            assert state.inputs is not None
            with torch.no_grad():
                outputs = state.inputs.call(self.teacher)
            self._distances.append(distillation_loss(state.outputs, outputs, self.temperature))
        elif event is Event.AFTER_LOSS:
            self._add_term(state)

    def close(self) -> None:
        """Give the teacher back as it was."""
        self._distances = []
        for module, mode in self._modes:
            module.training = mode
        if self._home is not None:
            self.teacher.to(self._home)
        self._modes, self._home = [], None

    def _borrow(self, device: torch.device) -> None:
        first = next(self.teacher.parameters(), None)
        self._home = None if first is None else first.device
        self._modes = [(module, module.training) for module in self.teacher.modules()]
        self.teacher.to(device).eval()

    def _add_term(self, state: State) -> None:
        if not self._distances:
            raise ModelError(
                "The loss function never called the model, so there is nothing to distil. "
                "Call `model(...)` itself in it, not one of its methods."
            )
        state.add_loss("distillation", torch.stack(self._distances).mean(), self.weight)
        for name in state.task_terms:
            state.weights[name] = self.task_weight * state.weights.get(name, 1.0)


def _distance(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    if student.dim() == 2 and student.shape[1] > 1:
        divergence = F.kl_div(
            F.log_softmax(student / temperature, dim=1),
            F.log_softmax(teacher / temperature, dim=1),
            reduction="batchmean",
            log_target=True,
        )
        return divergence * temperature**2
    # 1e-12: a teacher that says 0 everywhere
    return F.mse_loss(student, teacher) / teacher.square().mean().clamp_min(1e-12)
