"""Weights that stay in a set while they train, zeros at zero or equals equal: what this takes.

Gradients and stepped weights are projected onto the set, which is projected gradient descent.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from compressor.errors import ConfigError
from compressor.training import binding
from compressor.training.algorithm import Algorithm
from compressor.training.events import Event
from compressor.training.state import State
from compressor.training.taps import find_module, has_module

if TYPE_CHECKING:
    from compressor.structure.surgery import Edit


class Holding(Algorithm):
    """Base of what holds weights; subclasses say which and how.

    Gradients are projected before every step, and weights after it, since momentum would move them
    away. An average of the weights (`EMA`, `SWA`) is projected when it is put into the model, so
    that what is evaluated and kept is like what is trained. After the fit the weights themselves
    are in the set; nothing is left on the model. It has no `window`.

    Args:
        layers: names of the modules whose `weight` is held, or, where a module has none, those of
            the linear and convolution layers in it; None: all linear and convolution layers.
    """

    events = frozenset(
        {
            Event.SETUP,
            Event.FIT_START,
            Event.BEFORE_STEP,
            Event.AFTER_STEP,
            Event.EVAL_START,
            Event.FIT_END,
        }
    )
    before = ("GradientClipping",)  # what is clipped is what is stepped
    after = ("WeightAverage", "SAM")  # the average that was put in is held, too
    participle = "held"

    def __init__(self, layers: Collection[str] | None) -> None:
        self.layers = None if layers is None else tuple(layers)
        self._held: dict[str, Tensor] = {}  # of each weight: what `project` needs
        self._bound: list[tuple[nn.Parameter, Tensor]] | None = None

    @abstractmethod
    def project(self, values: Tensor, held: Tensor) -> None:
        """Move a gradient or a weight, in place, to the nearest that `held` allows."""

    def fits(self, weight: Tensor) -> bool:
        """Whether this weight can be held; others are left alone."""
        del weight
        return True

    def on(self, event: Event, state: State) -> None:
        """Hold gradients or weights."""
        if event is Event.SETUP:
            self.check_window()
            self._held, self._bound = {}, None  # those of another trainer
            if not self.targets(state.model, is_strict=True):
                raise ConfigError(
                    f"The model has no layer that could be {self.participle}. "
                    "Name some in `layers`."
                )
        elif event is Event.BEFORE_STEP:
            for parameter, held in self._bind(state.model):
                if parameter.grad is not None:
                    self.project(parameter.grad, held)
        else:
            self.hold(state.model)

    def check_window(self) -> None:
        """Refuse a window.

        Raises:
            ConfigError: if there is one.
        """
        if self.window is not None:
            raise ConfigError(
                f"{self.key!r} has a window, and nobody would hold the weights outside. "
                "Leave it out."
            )

    def hold(self, model: nn.Module) -> None:
        """Project the weights."""
        with torch.no_grad():
            for parameter, held in self._bind(model):
                self.project(parameter, held)

    def begin_to_hold(self, held: Mapping[str, Tensor]) -> None:
        """From now on these, by the name of the weight."""
        self._held, self._bound = dict(held), None

    def targets(self, model: nn.Module, *, is_strict: bool = False) -> dict[str, nn.Parameter]:
        """The weights that are held, once each, by name.

        Raises:
            ConfigError: if `is_strict`, for a name in `layers` that has no weight which fits.
        """
        chosen = None
        if self.layers is not None:
            known = [name for name in self.layers if is_strict or has_module(model, name)]
            modules = {name: find_module(model, name) for name in known}
            chosen = {id(layer) for module in modules.values() for layer in _holders(module)}
            for name in modules if is_strict else ():
                self.check_layer(name, list(_holders(modules[name])))
        found: dict[int, tuple[str, nn.Parameter]] = {}
        for name, module in model.named_modules():
            is_target = _is_layer(module) if chosen is None else id(module) in chosen
            weight = module._parameters.get("weight")
            if is_target and weight is not None and self.fits(weight):
                found.setdefault(id(weight), (f"{name}.weight".lstrip("."), weight))
        return dict(found.values())

    def holds(self, model: nn.Module, name: str, weight: nn.Parameter) -> bool:
        """Whether `name`, one of `layers`, is what `weight` is held for."""
        if not has_module(model, name):
            return False
        holders = _holders(find_module(model, name))
        return any(holder._parameters["weight"] is weight for holder in holders)

    def check_layer(self, name: str, holders: list[nn.Module]) -> None:
        """Refuse a name in `layers` of a module that has no weight, itself or in layers inside.

        Raises:
            ConfigError: if it has none.
        """
        if not holders:
            raise ConfigError(
                f"The layer {name!r} has no parameter `weight` that could be {self.participle}. "
                "Leave it out of `layers`, or bake its parametrization in first."
            )

    def rebind(self, edit: Edit, state: State) -> None:
        """Cut what is held like its parameters."""
        targets = self.targets(state.model)
        cut = {
            name: binding.cut(held, edit.sliced.get(name, ()))
            for name, held in self._held.items()
            if name in targets and name not in edit.added
        }
        self.begin_to_hold({n: h for n, h in cut.items() if h.shape == targets[n].shape})

    def state_dict(self) -> dict[str, Any]:
        """What is held."""
        return {"held": self._held}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Take it."""
        self.begin_to_hold(saved["held"])

    def close(self) -> None:
        """Let go of the model."""
        self._bound = None

    def _bind(self, model: nn.Module) -> list[tuple[nn.Parameter, Tensor]]:
        """Parameters and what they are held by, where they are."""
        if self._bound is None:
            targets = self.targets(model) if self._held else {}
            self._held = {n: held.to(targets[n].device) for n, held in self._held.items()}
            self._bound = [(targets[name], held) for name, held in self._held.items()]
        return self._bound


def _is_layer(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, _ConvNd))


def _holders(module: nn.Module) -> Iterator[nn.Module]:
    """`module` if it has a weight, else the layers in it that have one."""
    if module._parameters.get("weight") is not None:
        yield module
        return
    for inner in module.modules():
        if _is_layer(inner) and inner._parameters.get("weight") is not None:
            yield inner
