"""A training loop with a bit of everything, as a recipe."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from compressor.training.recipes import Optimizer, Recipe, recipe
from tests.training.helpers import make_loader


def make_step(model: nn.Module) -> Callable[[Any], dict[str, Tensor]]:
    """Forward and backward, as in the documents."""

    def forward_pass(batch: Any) -> dict[str, Tensor]:
        x, y = batch
        pred = model(x)
        loss = nn.functional.cross_entropy(pred, y)
        loss.backward()
        return {"loss": loss, "pred": pred}

    return forward_pass


def make_test(model: nn.Module) -> Callable[[Any], dict[str, Tensor]]:
    """The same without backward."""

    def test_pass(batch: Any) -> dict[str, Tensor]:
        x, y = batch
        pred = model(x)
        return {"loss": nn.functional.cross_entropy(pred, y), "pred": pred}

    return test_pass


def make_recipe(model: nn.Module, *callbacks: Any, **options: Any) -> Recipe:
    """Registered model, SGD, four batches an epoch."""
    loop = recipe(make_step(model), options.pop("loader", None) or make_loader(), **options)
    loop.register("model", model)
    opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    loop.callbacks.add_callbacks([Optimizer(opt), *callbacks])
    return loop


def is_same(a: Any, b: Any) -> bool:
    """Whether two nestings are equal to the bit."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and torch.equal(a, b)
    if isinstance(a, Mapping):
        return a.keys() == b.keys() and all(is_same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(is_same, a, b))
    return bool(a == b)


class Spy:
    """Notes every hook, and what `look` says then."""

    def __init__(self, look: Callable[[dict[str, Any]], Any] = lambda state: None) -> None:
        self.look = look
        self.seen: list[Any] = []

    def on_epoch_start(self, state: dict[str, Any]) -> None:
        self.seen.append(("epoch_start", self.look(state)))

    def on_batch_start(self, state: dict[str, Any]) -> None:
        self.seen.append(("batch_start", self.look(state)))

    def on_batch_end(self, state: dict[str, Any]) -> None:
        self.seen.append(("batch_end", self.look(state)))

    def on_epoch_end(self, state: dict[str, Any]) -> None:
        self.seen.append(("epoch_end", self.look(state)))


class After:
    """Calls a function after each batch."""

    def __init__(self, function: Callable[[dict[str, Any]], Any]) -> None:
        self.function = function

    def on_batch_end(self, state: dict[str, Any]) -> None:
        self.function(state)
