"""Residual branches that are left out at random (Huang et al., 2016, 1603.09382)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from compressor.errors import ConfigError, suggest
from compressor.interfaces.data import first_batch, move
from compressor.interfaces.inputs import ModelInputs, device_of, record_inputs
from compressor.structure import surgery
from compressor.structure.trace import eval_mode
from compressor.training.algorithm import Algorithm
from compressor.training.algorithms.residual_branches import residual_branches
from compressor.training.algorithms.windows import refuse_window
from compressor.training.card import Card
from compressor.training.clock import Duration, DurationLike
from compressor.training.events import Event
from compressor.training.ramp import progress
from compressor.training.state import State
from compressor.training.tasks.base import TaskModel

if TYPE_CHECKING:
    from compressor.structure.surgery import Edit

Mode = Literal["row", "batch"]
Distribution = Literal["linear", "uniform"]
START = Duration.parse("0dur")


class BranchDrop:
    """Drops the output of the module that it hangs on; a hook of torch.

    Args:
        p: with which a sample's output becomes 0; what is kept is divided by 1 - p. May be set.
        mode: "row" draws for each sample, "batch" once for all.
        model: nothing is dropped but in its training mode. The mode of the module is not asked: a
            batch norm may be alone in its own.
    """

    def __init__(self, p: float, mode: Mode, model: nn.Module) -> None:
        # Here, because importing torchvision takes longer than all the rest of the functional API.
        from torchvision.ops import stochastic_depth

        self.p = p
        self.mode = mode
        self._model = model
        self._drop = stochastic_depth
        self._handle: Any = None

    def attach(self, module: nn.Module) -> None:
        """Hang on `module`."""
        self._handle = module.register_forward_hook(self)

    def remove(self) -> None:
        """Hang on nothing."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def __call__(self, module: nn.Module, _: Any, outputs: Any) -> Any:
        """The outputs, of which the first tensor is dropped; None leaves them as they are."""
        del module
        if not self._model.training or not self.p:
            return None
        if isinstance(outputs, Tensor):
            return self._drop(outputs, self.p, self.mode)
        return (self._drop(outputs[0], self.p, self.mode), *outputs[1:])


def drop_rates(count: int, drop_rate: float, distribution: Distribution = "linear") -> list[float]:
    """With which each of `count` branches is dropped: the deeper, the more, or all alike.

    >>> drop_rates(4, 0.2)
    [0.05, 0.1, 0.15, 0.2]
    """
    if distribution == "uniform":
        return [drop_rate] * count
    return [round(drop_rate * (index + 1) / count, 12) for index in range(count)]


def apply_stochastic_depth(
    model: nn.Module,
    branches: Sequence[str],
    drop_rate: float = 0.2,
    mode: Mode = "row",
    distribution: Distribution = "linear",
) -> dict[str, BranchDrop]:
    """Let residual branches of `model` be left out at random in training, in place.

    x + f(x) becomes x + d * f(x), where d is 0 with the probability p, else 1 / (1 - p). In
    evaluation nothing is dropped, so the model computes what it did. Modules, parameters and their
    names stay: it is done by hooks, which files do not hold. One that hangs there already stays.

    Args:
        model: a residual network.
        branches: names of the modules whose outputs are added, first to last, such as those of
            `residual_branches(model, inputs)`.
        drop_rate: of the last branch, 0 to below 1.
        mode: "row" draws for each sample, "batch" once for all.
        distribution: "linear" drops the l-th of L branches with l / L * drop_rate, "uniform" all
            alike.

    Returns:
        By name, what hangs there now and did not before; `remove()` takes it off.

    Raises:
        ConfigError: an option out of range.
        SurgeryError: if there is no module of such a name.

    >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    >>> drops = apply_stochastic_depth(model, ["0", "1"], drop_rate=0.5)
    >>> {name: drop.p for name, drop in drops.items()}
    {'0': 0.25, '1': 0.5}
    """
    _check_options(drop_rate, mode, distribution)
    modules = {name: surgery.get(model, name) for name in branches}
    rates = drop_rates(len(modules), drop_rate, distribution)
    drops = {}
    for (name, module), rate in zip(modules.items(), rates, strict=True):
        if not any(isinstance(hook, BranchDrop) for hook in module._forward_hooks.values()):
            drops[name] = BranchDrop(rate, mode, model)
            drops[name].attach(module)
    return drops


class StochasticDepth(Algorithm):
    """Leaves residual branches out at random while a fit lasts.

    Args:
        drop_rate: of the last branch, 0 to below 1.
        mode: "row" draws for each sample, "batch" once for all.
        distribution: "linear": the deeper a branch, the more often; "uniform": all alike.
        warmup: over which the rates grow from 0.
        inputs: of one call of the network, to find its branches in; None: what it is called with
            for the first batch of the loader. The network is the task's `model`, or the model.
        branches: names of the modules whose outputs are added to the stream; None finds them.

    Raises:
        ConfigError: an option out of range.
    """

    events = frozenset({Event.SETUP, Event.FIT_START, Event.BATCH_START})
    card = Card(
        summary="Leaves residual branches out at random, the deeper the more often.",
        source="Huang et al. (2016), Deep Networks with Stochastic Depth",
        functional="apply_stochastic_depth",
        settings="`drop_rate` of the last branch: higher for deeper networks.",
        use_when="A deep residual network overfits, and training is long.",
        avoid_when="The fit is short or the model underfits, as a compressed one does; it has a "
        "stochastic depth of its own; with a warm-up, together with torch.compile, which compiles "
        "anew for each rate.",
        cost="A product with a mask for each branch; all branches are computed. At the start the "
        "network is traced, unless `branches` are given.",
    )

    def __init__(
        self,
        drop_rate: float = 0.2,
        mode: Mode = "row",
        distribution: Distribution = "linear",
        warmup: DurationLike = "0dur",
        *,
        inputs: ModelInputs | None = None,
        branches: Sequence[str] | None = None,
    ) -> None:
        _check_options(drop_rate, mode, distribution)
        self.drop_rate = drop_rate
        self.mode: Mode = mode
        self.distribution: Distribution = distribution
        self.warmup = Duration.parse(warmup)
        self.inputs = inputs
        self.branches = branches
        self._rates: dict[str, float] = {}
        self._drops: dict[str, BranchDrop] = {}
        self._is_fitting = False

    def on(self, event: Event, state: State) -> None:
        """Find the branches; hang on them; follow the warm-up."""
        if event is Event.SETUP:
            refuse_window(self, "`drop_rate` and `warmup`", "nobody would take it off outside")
            names = self.branches or _find_branches(state, self.inputs)
            found = {name: surgery.get(state.model, name) for name in names}
            rates = drop_rates(len(found), self.drop_rate, self.distribution)
            self._rates = dict(zip(found, rates, strict=True))
        elif event is Event.FIT_START:
            self._is_fitting = True
            self._attach(state.model)
        else:
            share = progress(state.clock, state.max_duration, START, self.warmup)
            for name, drop in self._drops.items():
                drop.p = share * self._rates[name]

    def rebind(self, edit: Edit, state: State) -> None:
        """Hang on what took the place of a module."""
        del edit
        if self._is_fitting:
            self._attach(state.model)

    def close(self) -> None:
        """Take all off: the model is as it was."""
        for drop in self._drops.values():
            drop.remove()
        self._drops, self._is_fitting = {}, False

    def _attach(self, model: nn.Module) -> None:
        modules: Mapping[str, nn.Module] = dict(model.named_modules(remove_duplicate=False))
        names = [name for name in self._rates if name in modules]  # a branch may have been removed
        self._drops |= apply_stochastic_depth(model, names, self.drop_rate, self.mode)
        for name in names:
            if name in self._drops:
                self._drops[name].p = self._rates[name]


def _find_branches(state: State, inputs: ModelInputs | None) -> list[str]:
    """In the network of a task, or in the model itself."""
    model, prefix = state.model, ""
    network = getattr(model, "model", None) if isinstance(model, TaskModel) else None
    if isinstance(network, nn.Module):
        prefix = "model."
    else:
        network = model
    if inputs is None:
        batch = move(first_batch(state.train_dataloader), device_of(model))
        with eval_mode(model), torch.no_grad():
            inputs = record_inputs(network, lambda _: state.run_model(model, batch))
    return [f"{prefix}{name}" for name in residual_branches(network, inputs)]


def _check_options(drop_rate: float, mode: str, distribution: str) -> None:
    if not 0 <= drop_rate < 1:
        raise ConfigError(f"drop_rate={drop_rate} is no part of the time. Write 0 to below 1.")
    for name, value, known in (
        ("mode", mode, ("row", "batch")),
        ("distribution", distribution, ("linear", "uniform")),
    ):
        if value not in known:
            raise ConfigError(f"There is no {name} {value!r}. {suggest(str(value), known)}")
