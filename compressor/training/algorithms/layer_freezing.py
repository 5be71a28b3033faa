"""Layers that stop learning from the front on, as in FreezeOut (Brock et al., 2017)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from compressor.errors import ConfigError
from compressor.training.algorithm import Algorithm
from compressor.training.algorithms.windows import refuse_window
from compressor.training.card import Card
from compressor.training.clock import Duration, DurationLike
from compressor.training.events import Event
from compressor.training.ramp import progress
from compressor.training.state import State

if TYPE_CHECKING:
    from compressor.structure.surgery import Edit

WHOLE = Duration.parse("1dur")


def freeze_layers(model: nn.Module, fraction: float) -> list[nn.Parameter]:
    """Let the first layers of `model` require no gradient any more, in place.

    Layers are the modules with parameters of their own, in the order in which they were registered,
    which is mostly that of their use. The last one always stays. A parameter that several layers
    share is frozen with the last of them.

    Args:
        model: whose modes, and with them what its batch norms do, stay as they are.
        fraction: of the layers, 0 to 1, rounded down.

    Returns:
        The parameters that required a gradient before. Their `.grad` is None now, so that
        optimizers pass over them: `zero_grad(set_to_none=False)` would leave zeros, which momentum
        steps.

    Raises:
        ConfigError: if `fraction` is out of range.

    >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2), nn.Linear(2, 1))
    >>> len(freeze_layers(model, 0.7)), [p.requires_grad for p in model.parameters()]
    (4, [False, False, False, False, True, True])
    """
    if not 0 <= fraction <= 1:
        raise ConfigError(f"fraction={fraction} is no part of the layers. Write 0 to 1.")
    layers = _layers(model)
    frozen = layers[: count_frozen(len(layers), fraction)]
    stays = {id(parameter) for layer in layers[len(frozen) :] for parameter in layer}
    chosen = {
        id(parameter): parameter
        for layer in frozen
        for parameter in layer
        if parameter.requires_grad and id(parameter) not in stays
    }
    for parameter in chosen.values():
        parameter.requires_grad_(False)
        parameter.grad = None
    return list(chosen.values())


def count_frozen(layers: int, fraction: float) -> int:
    """How many of so many layers `freeze_layers` takes: all but one at most."""
    # 1e-9: 0.7 * 10 is 7, although 0.7 is less
    return min(int(layers * fraction + 1e-9), max(layers - 1, 0))


class LayerFreezing(Algorithm):
    """Freezes more and more layers, from the front, until the end of training.

    Which ones is a function of the clock. Frozen parameters are not stepped, keep what the
    optimizer remembers of them, and require a gradient again after the fit. Batch norms of frozen
    layers are left in training mode: they go on normalising by the batch and following its
    statistics, so that freezing does not change what the layer computes; only their scale and shift
    stop. It has no `window`: what is frozen stays so until the fit ends.

    Args:
        start: before it no layer is frozen.
        level: fraction of the layers that is frozen at the end.

    Raises:
        ConfigError: if `level` is out of range.
    """

    events = frozenset({Event.SETUP, Event.BATCH_START})
    card = Card(
        summary="Stops training layers from the front on, while the rest goes on.",
        source="Brock et al. (2017), FreezeOut: Accelerate training by progressively freezing "
        "layers",
        functional="freeze_layers",
        settings="`start`, when the first layer is frozen; `level`, the fraction that is "
        "at the end.",
        use_when="Fine-tuning, whose first layers hardly change; backward passes get shorter.",
        avoid_when="Front layers were pruned or quantized and have to recover; together with "
        "torch.compile, which compiles anew at every change.",
        cost="Saves up to the backward pass of the frozen layers; nothing of the forward pass.",
    )

    def __init__(self, start: DurationLike = "0.5dur", level: float = 1.0) -> None:
        if not 0 <= level <= 1:
            raise ConfigError(f"level={level} is no part of the layers. Write 0 to 1.")
        self.start = Duration.parse(start)
        self.level = level
        self._frozen: list[nn.Parameter] = []
        self._names: frozenset[str] = frozenset()
        self._count = 0  # of frozen layers; -1: not known
        self._layers: int | None = None  # how many the model has; None: to be counted

    def on(self, event: Event, state: State) -> None:
        """Freeze what the clock says."""
        if event is Event.SETUP:
            refuse_window(self, "`start` and `level`", "nobody would thaw its layers outside")
            self.close()
            return
        reached = progress(state.clock, state.max_duration, self.start, WHOLE)
        if self._layers is None:
            self._layers = len(_layers(state.model))
        count = count_frozen(self._layers, self.level * reached)
        if count != self._count:
            self._thaw(state.model)
            self._frozen = freeze_layers(state.model, self.level * reached)
            mine = {id(parameter) for parameter in self._frozen}
            self._names = frozenset(
                name for name, p in state.model.named_parameters() if id(p) in mine
            )
            self._count = count

    def rebind(self, edit: Edit, state: State) -> None:
        """Thaw the successors of what was frozen; the next batch freezes anew."""
        self._names -= edit.added
        self._thaw(state.model)
        self._layers = None

    def state_dict(self) -> dict[str, Any]:
        """What is frozen by it, and not by the user."""
        return {"names": sorted(self._names)}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Take it: an edit that is made again leaves flags as they were at the checkpoint."""
        self._names, self._count = frozenset(saved["names"]), -1

    def close(self) -> None:
        """Let all that was frozen require a gradient again."""
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        self._frozen, self._names, self._count, self._layers = [], frozenset(), 0, None

    def _thaw(self, model: nn.Module) -> None:
        for name, parameter in model.named_parameters():
            if name in self._names:
                parameter.requires_grad_(True)
        self._frozen, self._names, self._count = [], frozenset(), 0


def _layers(model: nn.Module) -> list[list[nn.Parameter]]:
    """The own parameters of each module that has some."""
    own = (list(module.parameters(recurse=False)) for module in model.modules())
    return [parameters for parameters in own if parameters]
