"""Taps: what layers inside a model give, recorded while it runs."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from compressor.errors import ConfigError, suggest
from compressor.interfaces.inputs import output_tensors
from compressor.training.tasks.base import TaskModel


class Taps:
    """Forward hooks that keep the outputs of some layers, one list a layer, in order of the calls.

    Put them on before a model is compiled: hooks that come later never fire.

    Args:
        names: of modules; of a task, the network's own names will do.
        is_for_training: only calls that record gradients count, which evaluation and the
            re-estimation of statistics do not.
    """

    def __init__(self, names: Collection[str], *, is_for_training: bool) -> None:
        self._outputs: dict[str, list[Tensor]] = {name: [] for name in names}
        self._is_for_training = is_for_training
        self._is_armed = True
        self._handles: list[RemovableHandle] = []

    @property
    def are_on(self) -> bool:
        """Whether a model has them."""
        return bool(self._handles)

    def put_on(self, model: nn.Module) -> None:
        """Register them on `model`, in place; a model that had them before loses them.

        Raises:
            ConfigError: if it has no module of one of the names.
        """
        modules = [find_module(model, name) for name in self._outputs]
        self.take_off()
        for module, record in zip(modules, map(self._recorder, self._outputs), strict=True):
            self._handles.append(module.register_forward_hook(record))

    def take_off(self) -> None:
        """Remove them, in place, and forget what they recorded."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self.forget()

    def drop(self, name: str) -> None:
        """Record this one no more; before they are put on."""
        del self._outputs[name]

    def arm(self) -> None:
        """Begin anew, and record from now on."""
        self.forget()
        self._is_armed = True

    def disarm(self) -> None:
        """Let go of what was recorded, and record nothing until they are armed."""
        self.forget()
        self._is_armed = False

    def take(self) -> dict[str, list[Tensor]]:
        """What was recorded since the last time, by name."""
        taken = {name: list(outputs) for name, outputs in self._outputs.items()}
        self.forget()
        return taken

    def forget(self) -> None:
        """Let go of what was recorded."""
        for outputs in self._outputs.values():
            outputs.clear()

    def _recorder(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        outputs, is_for_training = self._outputs[name], self._is_for_training

        def record(_: nn.Module, __: Any, output: Any) -> None:
            if self._is_armed and (torch.is_grad_enabled() or not is_for_training):
                outputs.extend(output_tensors(output)[:1])

        return record


def find_module(model: nn.Module, name: str) -> nn.Module:
    """The module called `name`, in `model` or in the network that a task is about.

    Raises:
        ConfigError: if there is none.
    """
    modules: dict[str, nn.Module] = dict(model.named_modules(remove_duplicate=False))
    if name not in modules and isinstance(model, TaskModel) and f"model.{name}" in modules:
        name = f"model.{name}"
    if not name or name not in modules:
        raise ConfigError(
            f"The model has no layer {name!r}. {suggest(name, filter(None, modules))}"
        )
    return modules[name]


def has_module(model: nn.Module, name: str) -> bool:
    """Whether `find_module` finds it."""
    try:
        find_module(model, name)
    except ConfigError:
        return False
    return True
