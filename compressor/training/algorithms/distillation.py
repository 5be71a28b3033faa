"""A teacher's outputs, and features, as targets beside or instead of the labels.

Outputs: Hinton et al. (2015). Features: Romero et al. (2015); of a narrower student, the maps of
attention of Zagoruyko and Komodakis (2017). One of several teachers at a time: 2211.00683.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compressor.errors import ConfigError, ModelError
from compressor.interfaces.inputs import ModelInputs, output_tensors
from compressor.logs import get_logger
from compressor.training.algorithm import Algorithm
from compressor.training.card import Card
from compressor.training.events import Event
from compressor.training.state import State
from compressor.training.step import Call
from compressor.training.taps import Taps, has_module
from compressor.training.tasks.base import TaskModel

if TYPE_CHECKING:
    from compressor.structure.surgery import Edit

logger = get_logger(__name__)

SQUARE_FLOOR = 1e-12  # a teacher that says 0 everywhere


def distillation_loss(student: Any, teacher: Any, temperature: float = 2.0) -> Tensor:
    """Mean distance between the outputs of two models, over their tensors.

    Logits (N, K), K > 1: KL(teacher || student) of the softened distributions, times the square of
    the temperature, which keeps the size of the gradient. Other tensors: mean squared error over
    the mean square of the teacher's. Of outputs with an attribute `logits`, as those of
    transformers, only that counts; its last dimension is the classes, and each token is a sample.

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
    ours, theirs = _comparable(student), _comparable(teacher)
    shapes, wanted = [tuple(t.shape) for t in ours], [tuple(t.shape) for t in theirs]
    if shapes != wanted or not ours:
        raise ModelError(
            f"The student gives tensors of shapes {shapes} and the teacher {wanted}: there is "
            "nothing to compare. A model that returns something else in training mode cannot be "
            "distilled as a whole; train it without distillation."
        )
    pairs = zip(ours, theirs, strict=True)
    distances = [_output_distance(s.float(), t.detach().float(), temperature) for s, t in pairs]
    return torch.stack(distances).mean()


def feature_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Distance between what two layers give for the same inputs.

    Of equal shapes: mean squared error over the mean square of the teacher's. If they differ in one
    dimension, the channels, as after pruning: mean squared distance of their `attention_map`s,
    times the number of positions, so that it is between 0 and 2.

    Args:
        student: (N, C, …), or (N, …, C).
        teacher: the same, perhaps with more or fewer channels.

    Returns:
        Shape (), 0 or more.

    Raises:
        ModelError: if they differ in more, or only have channels.

    >>> feature_distance(torch.ones(2, 3, 4, 4), torch.ones(2, 8, 4, 4)).item()
    0.0
    """
    student, teacher = student.float(), teacher.detach().float()
    if student.shape == teacher.shape:
        return _relative_error(student, teacher)
    differ = [
        dim for dim, (a, b) in enumerate(zip(student.shape, teacher.shape, strict=False)) if a != b
    ]
    if student.dim() != teacher.dim() or student.dim() < 3 or len(differ) != 1 or not differ[0]:
        raise ModelError(
            f"Features of shapes {tuple(student.shape)} and {tuple(teacher.shape)} cannot be "
            "compared: they may differ in the number of channels, if they have positions beside. "
            "Name layers before the shapes part."
        )
    ours, theirs = attention_map(student, differ[0]), attention_map(teacher, differ[0])
    return (ours - theirs).square().sum(1).mean()


def attention_map(features: Tensor, dim: int = 1) -> Tensor:
    """Where a layer is active: the mean square over its channels, as a vector of norm 1.

    Args:
        features: (N, C, …).
        dim: that of the channels.

    Returns:
        (N, positions).
    """
    return F.normalize(features.square().mean(dim).flatten(1), dim=1)


class Distillation(Algorithm):
    """Adds the distance to teachers that see the same inputs, as the student got them.

    During a fit teachers are in eval mode and on the student's device; both are put back. They are
    not trained, and not in the checkpoint. When the student is a `TaskModel` and a teacher is not,
    the teacher is called by the student's task.

    Args:
        teacher: is called like the student; or several, whose distances are averaged.
        weight: of the distance of outputs; 0 compares features alone.
        task_weight: of the terms of the user's own loss.
        temperature: softens logits.
        sample: ask one of the teachers, drawn anew for every batch, instead of all.
        features: names of layers whose outputs are compared as well; a mapping, student's name ->
            teacher's name, where they differ. See `feature_distance`. A layer that surgery removes
            drops out.
        feature_weight: of the mean distance of features.

    Raises:
        ConfigError: if there is no teacher, or no temperature.
    """

    card = Card(
        summary="Trains the model to answer, and if wanted to see, as a teacher does.",
        source="Hinton et al. (2015), Distilling the knowledge in a neural network; Zagoruyko and "
        "Komodakis (2017), Paying more attention to attention",
        functional="distillation_loss",
        use_when="A compressed model is recovered and its reference is at hand.",
        avoid_when="The teacher is worse than the labels, or was trained with label smoothing.",
        cost="A forward pass of each teacher that is asked, and its memory.",
    )

    def __init__(
        self,
        teacher: nn.Module | Sequence[nn.Module],
        *,
        weight: float = 0.9,
        task_weight: float = 0.1,
        temperature: float = 2.0,
        sample: bool = False,
        features: Mapping[str, str] | Sequence[str] = (),
        feature_weight: float = 1.0,
    ) -> None:
        if isinstance(teacher, nn.Module) and not isinstance(teacher, nn.ModuleList):
            self.teachers = [teacher]
        else:
            self.teachers = list(teacher)
        if not self.teachers:
            raise ConfigError("There is no teacher. Give a model, or several.")
        if not temperature > 0:
            raise ConfigError(f"temperature={temperature} softens nothing. Write 1 or more.")
        self.weight = weight
        self.task_weight = task_weight
        self.temperature = temperature
        self.sample = sample
        self.features = (
            dict(features) if isinstance(features, Mapping) else {name: name for name in features}
        )
        self.feature_weight = feature_weight
        self.events = _events(sample, bool(self.features))
        self._student_taps = Taps(self.features, is_for_training=True)
        self._lent: list[_Lent] = []
        self._drawn: int | None = None

    def on(self, event: Event, state: State) -> None:
        """Prepare the teachers, and add the terms."""
        if event is Event.SETUP:
            self._student_taps.put_on(state.model)
        elif event is Event.FIT_START:
            self._borrow(state)
        elif event is Event.BATCH_START:
            self._drawn = int(torch.randint(len(self.teachers), ()))
        elif event is Event.BEFORE_FORWARD:
            self._student_taps.forget()  # activations that were computed again in the backward pass
        elif event is Event.AFTER_LOSS:
            if not self._lent:  # a loop without FIT_START
                self._borrow(state)
            self._add_terms(state)

    def rebind(self, edit: Edit, state: State) -> None:
        """Tap the modules that are now where the old ones were."""
        if not self._student_taps.are_on:
            return
        self._student_taps.take_off()
        for name in [name for name in self.features if not has_module(state.model, name)]:
            logger.info("%s: the layer %r is gone and no longer compared", self.key, name)
            del self.features[name]
            self._student_taps.drop(name)
        self._student_taps.put_on(state.model)

    def close(self) -> None:
        """Give the teachers back as they were, and the student without taps."""
        for lent in self._lent:
            lent.give_back()
        self._lent = []
        self._student_taps.take_off()

    def _borrow(self, state: State) -> None:
        if any(teacher is state.model for teacher in self.teachers):
            raise ConfigError(
                "The teacher is the model that is trained. Give a copy: copy.deepcopy(model)."
            )
        self._lent = [_Lent(teacher, self.features.values()) for teacher in self.teachers]
        for lent in self._lent:
            lent.borrow(state)
        if self.features and not self._student_taps.are_on:  # a second fit
            self._student_taps.put_on(state.model)

    def _add_terms(self, state: State) -> None:
        calls, features = _calls(state), self._student_taps.take()
        asked = [self._lent[self._drawn]] if self._drawn is not None else self._lent
        outputs, distances = [], []
        for lent in asked:
            answers, theirs = lent.ask(calls)
            if self.weight:
                outputs += [
                    distillation_loss(call.outputs, answer, self.temperature)
                    for call, answer in zip(calls, answers, strict=True)
                ]
            distances += [
                distance
                for ours, name in self.features.items()
                for distance in _feature_distances(ours, features[ours], theirs[name])
            ]
        if outputs:
            state.add_loss(self.key.lower(), torch.stack(outputs).mean(), self.weight)
        if distances:
            name = f"{self.key.lower()}_features"
            state.add_loss(name, torch.stack(distances).mean(), self.feature_weight)
        for name in state.task_terms:
            state.weights[name] = self.task_weight * state.weights.get(name, 1.0)


class _Lent:
    """A teacher for the time of a fit."""

    def __init__(self, teacher: nn.Module, tapped: Collection[str]) -> None:
        self._teacher = teacher
        self._asked = teacher
        self._taps = Taps(tapped, is_for_training=False)
        self._modes = [(module, module.training) for module in teacher.modules()]
        self._home = next((parameter.device for parameter in teacher.parameters()), None)

    def borrow(self, state: State) -> None:
        self._taps.put_on(self._teacher)
        self._teacher.to(state.device).eval()
        if isinstance(state.model, TaskModel) and not isinstance(self._teacher, TaskModel):
            self._asked = state.model.around(self._teacher)

    def ask(self, calls: Sequence[Call]) -> tuple[list[Any], dict[str, list[Tensor]]]:
        """Outputs for the inputs of each call, and the features."""
        with torch.no_grad():
            answers = [call.inputs.call(self._asked) for call in calls]
        return answers, self._taps.take()

    def give_back(self) -> None:
        self._taps.take_off()
        for module, mode in self._modes:
            module.training = mode
        if self._home is not None:
            self._teacher.to(self._home)


def _events(sample: bool, has_features: bool) -> frozenset[Event]:
    """Only what is needed: every event costs."""
    events = {Event.FIT_START, Event.AFTER_LOSS}
    if sample:
        events.add(Event.BATCH_START)
    if has_features:
        events |= {Event.SETUP, Event.BEFORE_FORWARD}
    return frozenset(events)


def _calls(state: State) -> Sequence[Call]:
    """The student's calls; in a loop of the user's own, the one that gave `state.outputs`."""
    if state.calls:
        return state.calls
    if isinstance(state.model, TaskModel) and state.outputs is not None:
        return [Call(ModelInputs((state.batch,)), state.outputs)]
    raise ModelError(
        "The loss function never called the model, so there is nothing to distil. "
        "Call `model(...)` itself in it, not one of its methods."
    )


def _comparable(outputs: Any) -> list[Tensor]:
    logits = getattr(outputs, "logits", None)
    return [logits.flatten(0, -2)] if isinstance(logits, Tensor) else output_tensors(outputs)


def _output_distance(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    if student.dim() == 2 and student.shape[1] > 1:
        divergence = F.kl_div(
            F.log_softmax(student / temperature, dim=1),
            F.log_softmax(teacher / temperature, dim=1),
            reduction="batchmean",
            log_target=True,
        )
        return divergence * temperature**2
    return _relative_error(student, teacher)


def _relative_error(student: Tensor, teacher: Tensor) -> Tensor:
    return F.mse_loss(student, teacher) / teacher.square().mean().clamp_min(SQUARE_FLOOR)


def _feature_distances(name: str, ours: list[Tensor], theirs: list[Tensor]) -> list[Tensor]:
    if len(ours) != len(theirs) or not ours:
        raise ModelError(
            f"The layer {name!r} gave {len(ours)} feature tensors and its teacher's {len(theirs)}. "
            "Name layers that run once in each call of the model."
        )
    return [feature_distance(a, b) for a, b in zip(ours, theirs, strict=True)]
