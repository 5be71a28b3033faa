"""The user's step in one form: forward and loss over a batch, and the loss of given outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeAlias

from torch import Tensor, nn

from compressor.errors import ConfigError, LossError
from compressor.interfaces.data import sample_count, split_batch
from compressor.interfaces.inputs import ModelInputs
from compressor.interfaces.loss import loss_terms
from compressor.training.events import Event
from compressor.training.tasks.base import TaskModel

if TYPE_CHECKING:
    from compressor.training.state import State

LossFunction: TypeAlias = Callable[[nn.Module, Any], Tensor | Mapping[str, Tensor]]
Fire: TypeAlias = Callable[[Event], None]


class Call(NamedTuple):
    """One call of the model: what it was called with, and what it gave."""

    inputs: ModelInputs
    outputs: Any


class Step(Protocol):
    """What is done with a batch before the backward pass."""

    def run(self, state: State, fire: Fire) -> dict[str, Tensor]:
        """Call the model on `state.batch`, fire what belongs to it, and give the loss terms."""

    def loss(self, state: State, outputs: Any, batch: Any) -> dict[str, Tensor]:
        """The terms for `outputs` of the present batch with the targets in `batch`."""

    def call(self, model: nn.Module, batch: Any) -> Any:
        """Call `model` on `batch` as `run` does, without events."""

    def terms(self, model: nn.Module, batch: Any) -> dict[str, Tensor]:
        """The loss terms of `model` on `batch`, without events."""

    def sample_count(self, batch: Any) -> int:
        """Samples in `batch`."""

    def split(self, batch: Any, size: int) -> Sequence[Any]:
        """Parts of `batch`, of at most `size` samples."""


class TaskStep:
    """The step of a `TaskModel`: forward and loss are methods of their own.

    Args:
        task: is the model that is trained.
        is_observed: somebody wants to know what the model was called with.
    """

    def __init__(self, task: TaskModel, *, is_observed: bool) -> None:
        self.is_observed = is_observed
        self.call = _call_model
        self.sample_count = task.sample_count
        self.split = task.split_batch

    def run(self, state: State, fire: Fire) -> dict[str, Tensor]:
        """Call the model on `state.batch`, fire what belongs to it, and give the loss terms."""
        fire(Event.BEFORE_FORWARD)
        batch = state.batch
        state.outputs = state.runner(batch)
        if self.is_observed:
            state.calls = [Call(ModelInputs((batch,)), state.outputs)]
        fire(Event.AFTER_FORWARD)
        return loss_terms(state.model.loss(state.outputs, state.batch))  # type: ignore[operator]

    def loss(self, state: State, outputs: Any, batch: Any) -> dict[str, Tensor]:
        """The terms for `outputs` of the present batch with the targets in `batch`."""
        return loss_terms(state.model.loss(outputs, batch))  # type: ignore[operator]

    def terms(self, model: nn.Module, batch: Any) -> dict[str, Tensor]:
        """The loss terms of `model` on `batch`, without events."""
        return loss_terms(model.loss(model(batch), batch))  # type: ignore[operator]


class FunctionStep:
    """A function of (model, batch) that calls the model itself.

    Args:
        function: gives the loss terms.
        is_observed: somebody wants to know what the model was called with; hooks cost as much as
            all the rest of the engine.
    """

    def __init__(self, function: LossFunction, *, is_observed: bool) -> None:
        self.function = function
        self.is_observed = is_observed
        self.call = function
        self.sample_count = sample_count
        self.split = split_batch

    def run(self, state: State, fire: Fire) -> dict[str, Tensor]:
        """Call the function on `state.batch`, fire what belongs to it, and give the loss terms.

        When a listener replaced outputs or targets, the function is asked again for their loss.
        """
        fire(Event.BEFORE_FORWARD)
        batch = state.batch
        if not self.is_observed:
            return loss_terms(self.function(state.runner, batch))
        with recorded_calls(state.runner) as calls:
            terms = self.function(state.runner, batch)
        state.calls = calls
        state.outputs = outputs = calls[-1].outputs if calls else None
        fire(Event.AFTER_FORWARD)
        if state.outputs is outputs and state.batch is batch:
            return loss_terms(terms)
        return self.loss(state, state.outputs, state.batch)

    def loss(self, state: State, outputs: Any, batch: Any) -> dict[str, Tensor]:
        """The terms for `outputs` of the present batch with the targets in `batch`.

        Raises:
            LossError: if the function did not call the model.
        """
        if not state.calls:
            raise LossError(
                "The loss function never called the model, so its outputs are not known. "
                "Call `model(...)` itself in it, not one of its methods."
            )
        recorded = [*(call.outputs for call in state.calls[:-1]), outputs]
        with replaying(state.model, recorded) as model:
            return loss_terms(self.function(model, batch))

    def terms(self, model: nn.Module, batch: Any) -> dict[str, Tensor]:
        """The loss terms of `model` on `batch`, without events."""
        return loss_terms(self.function(model, batch))


class ManualStep:
    """Does all that is to be done with a batch: forward, backward, and the optimizer's step.

    Args:
        function: of the batch; what it returns goes into `State.values`.
    """

    def __init__(self, function: Callable[[Any], Mapping[str, Any] | None]) -> None:
        self.function = function
        self.sample_count = sample_count

    def __call__(self, batch: Any) -> Mapping[str, Any]:
        """What the function returns for `batch`."""
        return self.function(batch) or {}


@contextmanager
def replaying(model: nn.Module, outputs: Sequence[Any]) -> Iterator[nn.Module]:
    """Inside the `with`, `model` gives recorded outputs in turn; in all else it is itself.

    Raises:
        LossError: if it is called more often than there are outputs.
    """
    recorded = iter(outputs)

    def forward(*_: Any, **__: Any) -> Any:
        try:
            return next(recorded)
        except StopIteration:
            raise LossError(
                "The loss function called the model more often than before on the same batch. "
                "Let the number of calls depend on the batch alone."
            ) from None

    own = vars(model)
    before = own.get("forward")
    own["forward"] = forward
    try:
        yield model
    finally:
        del own["forward"]
        if before is not None:
            own["forward"] = before


def make_step(model: nn.Module, function: LossFunction | None, *, is_observed: bool) -> Step:
    """The step of a task, or of a function of (model, batch).

    Raises:
        ConfigError: if there is neither.
    """
    if function is not None:
        return FunctionStep(function, is_observed=is_observed)
    if isinstance(model, TaskModel):
        return TaskStep(model, is_observed=is_observed)
    raise ConfigError(
        f"{type(model).__name__} is no TaskModel, so how it is trained is not known. Give `step`, "
        "a function of (model, batch) that returns the loss, or wrap the model in a task: "
        "ClassifierTask(model)."
    )


@contextmanager
def recorded_calls(model: Any) -> Iterator[list[Call]]:
    """All calls of `model` inside the `with`: what it was called with, and what it gave."""
    calls: list[Call] = []

    def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Any) -> None:
        calls.append(Call(ModelInputs(args, kwargs), outputs))

    handle = model.register_forward_hook(note, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()


@contextmanager
def in_training_mode(model: nn.Module) -> Iterator[None]:
    """Put `model` into training mode, in place; modules that remain have their own mode after."""
    modes = [(module, module.training) for module in model.modules()]
    model.train()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def check_differentiable(total: Tensor) -> None:
    """Do nothing if `total` has a gradient.

    Raises:
        LossError: if it has none.
    """
    if not total.requires_grad:
        raise LossError(
            "The loss does not depend on any parameter that requires grad. "
            "Leave out .item(), .detach() and no_grad, and freeze less of the model."
        )


def _call_model(model: nn.Module, batch: Any) -> Any:
    return model(batch)
