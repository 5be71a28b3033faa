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
from compressor.training.algorithms.lent_teacher import LentTeacher
from compressor.training.algorithms.soft_targets import class_scores
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


def distillation_loss(
    student: Any, teacher: Any, temperature: float = 2.0, attention_mask: Tensor | None = None
) -> Tensor:
    """Mean distance between the outputs of two models, over their tensors.

    Logits (N, K), K > 1: KL(teacher || student) of the softened distributions, times the square of
    the temperature, which keeps the size of the gradient. Other tensors: mean squared error over
    the mean square of the teacher's. A class whose logit is -inf in both is left out.

    Of outputs with "logits", a key or an attribute, as those of transformers, only these count:
    (N, K), (N, T, K) of tokens, or (N, K, H, W) of pixels. Each token, or pixel, is a sample.

    Args:
        student: tensors in any nesting; those that are no floating point are left out.
        teacher: of the same form.
        temperature: above 0; 1 leaves the logits as they are.
        attention_mask: (N, T); tokens where it is 0 are padding and do not count. Logits of another
            form pass it over.

    Returns:
        Shape (), 0 or more.

    Raises:
        ConfigError: if the temperature is not above 0.
        ModelError: if the two do not have the same shapes.

    >>> logits = torch.tensor([[1.0, 2.0]])
    >>> distillation_loss(logits, logits).item()
    0.0
    """
    _check_temperature(temperature)
    ours, theirs = _comparable(student), _comparable(teacher)
    shapes, wanted = [tuple(t.shape) for t in ours], [tuple(t.shape) for t in theirs]
    if shapes != wanted or not ours:
        raise ModelError(
            f"The student gives tensors of shapes {shapes} and the teacher {wanted}: there is "
            "nothing to compare. A model that returns something else in training mode cannot be "
            "distilled as a whole; train it without distillation."
        )
    pairs = zip(ours, theirs, strict=True)
    counts = _counting_samples(student, attention_mask)
    distances = [
        _output_distance(s.float(), t.detach().float(), temperature, counts) for s, t in pairs
    ]
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
        weight: of the distance of outputs, 0 or more; 0 compares features alone. Where the model's
            inputs have an "attention_mask", padding does not count.
        task_weight: of the terms of the user's own loss, 0 or more.
        temperature: softens logits; above 0.
        sample: ask one of the teachers, drawn anew for every batch, instead of all.
        features: names of layers whose outputs are compared as well; a mapping, student's name ->
            teacher's name, where they differ. See `feature_distance`. A layer that surgery removes
            drops out.
        feature_weight: of the mean distance of features, 0 or more.

    Raises:
        ConfigError: if there is no teacher, no temperature, or nothing to compare.
    """

    card = Card(
        summary="Trains the model to answer, and if wanted to see, as a teacher does.",
        source="Hinton et al. (2015), Distilling the knowledge in a neural network; Zagoruyko and "
        "Komodakis (2017), Paying more attention to attention",
        functional="distillation_loss",
        settings="`weight` and `task_weight`, which say how much the teacher and the "
        "labels count; `temperature`, 1 to 4; `features` of named layers.",
        use_when="A compressed model is recovered and its reference is at hand.",
        avoid_when="The teacher is worse than the labels, or was trained with label smoothing.",
        cost="A forward pass of each teacher that is asked, and its memory.",
    )

    _drawn: int | None  # which teacher, if one is

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
        _check_temperature(temperature)
        _check_weights(weight, task_weight, feature_weight, features)
        self.weight = weight
        self.task_weight = task_weight
        self.temperature = temperature
        self.sample = sample
        self.features = (
            dict(features) if isinstance(features, Mapping) else {name: name for name in features}
        )
        self.feature_weight = feature_weight
        self.events = _events(sample, bool(self.features))
        self._lent: list[LentTeacher] = []
        self._begin()

    def on(self, event: Event, state: State) -> None:
        """Prepare the teachers, and add the terms."""
        if event is Event.SETUP:
            self.close()
            self._begin()  # what another trainer's surgery removed is there again
            self._student_taps.put_on(state.model)
        elif event is Event.FIT_START:
            self._borrow(state)
        elif event is Event.BATCH_START:
            self._drawn = int(torch.randint(len(self.teachers), ()))
        elif event is Event.BEFORE_FORWARD:
            self._student_taps.arm()  # which forgets a pass that did not fit into memory
        elif event is Event.AFTER_LOSS:
            if not self._lent:  # a loop without FIT_START
                self._borrow(state)
            self._add_terms(state)

    def rebind(self, edit: Edit, state: State) -> None:
        """Tap the modules that are now where the old ones were."""
        if not self._student_taps.are_on:
            return
        self._student_taps.take_off()
        for name in [name for name in self._compared if not has_module(state.model, name)]:
            logger.info("%s: the layer %r is gone and no longer compared", self.key, name)
            del self._compared[name]
            self._student_taps.drop(name)
        self._student_taps.put_on(state.model)

    def close(self) -> None:
        """Give the teachers back as they were, and the student without taps."""
        for lent in self._lent:
            lent.give_back()
        self._lent = []
        self._student_taps.take_off()

    def _begin(self) -> None:
        self._compared = dict(self.features)  # but for layers that surgery removes
        self._student_taps = Taps(self._compared, is_for_training=True)
        self._student_taps.disarm()
        self._drawn = None

    def _borrow(self, state: State) -> None:
        if any(teacher is state.model for teacher in self.teachers):
            raise ConfigError(
                "The teacher is the model that is trained. Give a copy: copy.deepcopy(model)."
            )
        self._lent = [LentTeacher(teacher, self._compared.values()) for teacher in self.teachers]
        for lent in self._lent:
            lent.borrow(state)
        if self._compared and not self._student_taps.are_on:  # a second fit
            self._student_taps.put_on(state.model)

    def _add_terms(self, state: State) -> None:
        calls, features = _calls(state), self._student_taps.take()
        self._student_taps.disarm()  # nothing of batches outside a window, or of backward passes
        asked = [self._lent[self._drawn]] if self._drawn is not None else self._lent
        outputs, distances = [], []
        for lent in asked:
            answers, theirs = lent.ask(calls)
            if self.weight:
                outputs += [
                    distillation_loss(
                        call.outputs, answer, self.temperature, _attention_mask(call, state.batch)
                    )
                    for call, answer in zip(calls, answers, strict=True)
                ]
            distances += [
                distance
                for ours, name in self._compared.items()
                for distance in _feature_distances(ours, features[ours], theirs[name])
            ]
        if outputs:
            state.add_loss(self.key.lower(), torch.stack(outputs).mean(), self.weight)
        if distances:
            name = f"{self.key.lower()}_features"
            state.add_loss(name, torch.stack(distances).mean(), self.feature_weight)
        for name in state.task_terms:
            state.weights[name] = self.task_weight * state.weights.get(name, 1.0)


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


def _attention_mask(call: Call, batch: Any) -> Tensor | None:
    """What the model was told of padding: among its inputs, or in the batch."""
    for place in (call.inputs.kwargs, *call.inputs.args, batch):
        mask = place.get("attention_mask") if isinstance(place, Mapping) else None
        if isinstance(mask, Tensor):
            return mask
    return None


def _logits(outputs: Any) -> Tensor | None:
    """Those of outputs that call them so."""
    named = isinstance(outputs, Mapping) and "logits" in outputs
    return class_scores(outputs) if named or hasattr(outputs, "logits") else None


def _comparable(outputs: Any) -> list[Tensor]:
    logits = _logits(outputs)
    if logits is None:
        return output_tensors(outputs)
    classes_last = logits.movedim(1, -1) if logits.dim() > 3 else logits
    return [classes_last.flatten(0, -2)]


def _counting_samples(outputs: Any, attention_mask: Tensor | None) -> Tensor | None:
    """1 for each token that counts and 0 for padding; None: all count."""
    logits = _logits(outputs)
    if attention_mask is None or logits is None or logits.shape[:-1] != attention_mask.shape:
        return None
    return attention_mask.flatten().float()


def _output_distance(
    student: Tensor, teacher: Tensor, temperature: float, counts: Tensor | None
) -> Tensor:
    if student.dim() == 2 and student.shape[1] > 1:
        student, teacher = _without_infinities(student / temperature, teacher / temperature)
        divergences = F.kl_div(
            F.log_softmax(student, dim=1),
            F.log_softmax(teacher, dim=1),
            reduction="none",
            log_target=True,
        ).sum(1)
        return _mean(divergences, counts) * temperature**2
    if counts is not None:
        is_padding = (counts == 0)[:, None]
        student, teacher = (each.masked_fill(is_padding, 0.0) for each in (student, teacher))
    return _relative_error(student, teacher)


def _without_infinities(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Logits that are -inf as large numbers: 0 * (inf - inf) would be NaN.

    Where only the student's is, the distance is infinite indeed.
    """
    least = torch.finfo(teacher.dtype).min / 2  # half: log_softmax subtracts from it
    is_out = teacher.isneginf()
    return student.masked_fill(is_out & student.isneginf(), least), teacher.masked_fill(
        is_out, least
    )


def _mean(distances: Tensor, counts: Tensor | None) -> Tensor:
    if counts is None:
        return distances.mean()
    is_counted = counts > 0  # not by multiplication: what padding gave may be infinite
    total = distances.masked_fill(~is_counted, 0.0).sum()
    return total / is_counted.sum().clamp_min(1)


def _relative_error(student: Tensor, teacher: Tensor) -> Tensor:
    return F.mse_loss(student, teacher) / teacher.square().mean().clamp_min(SQUARE_FLOOR)


def _feature_distances(name: str, ours: list[Tensor], theirs: list[Tensor]) -> list[Tensor]:
    if len(ours) != len(theirs) or not ours:
        raise ModelError(
            f"The layer {name!r} gave {len(ours)} feature tensors and its teacher's {len(theirs)}. "
            "Name layers that run once in each call of the model."
        )
    return [feature_distance(a, b) for a, b in zip(ours, theirs, strict=True)]


def _check_temperature(temperature: float) -> None:
    if not temperature > 0:
        raise ConfigError(f"temperature={temperature} softens nothing. Write 1 or more.")


def _check_weights(
    weight: float, task_weight: float, feature_weight: float, features: Collection[str]
) -> None:
    if isinstance(features, str):
        raise ConfigError(f"features={features!r} is a name and no list. Write [{features!r}].")
    weights = {"weight": weight, "task_weight": task_weight, "feature_weight": feature_weight}
    for option, value in weights.items():
        if not value >= 0:
            raise ConfigError(f"{option}={value} would reward a distance. Write 0 or more.")
    if not weight and not (features and feature_weight):
        raise ConfigError(
            "weight=0 compares no outputs, and there are no features to compare. Write a weight "
            "above 0, or name layers in `features`."
        )
