"""The samples by which recipes are known, in our words."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import nn

from compressor.training.recipes import (
    CallRecipe,
    EpochMetricAvg,
    LRByFraction,
    Optimizer,
    StdoutLogger,
    classification,
    cross_entropy_classification,
    recipe,
    train_and_test,
)
from tests.training.helpers import are_equal, make_loader, make_model, weights_of

CLASSES = ["below", "above"]


class OptimizerCallback:
    """As a user writes one."""

    def __init__(self, opt: torch.optim.Optimizer) -> None:
        self.opt = opt

    def on_batch_start(self, state: dict[str, Any]) -> None:
        self.opt.zero_grad()

    def on_batch_end(self, state: dict[str, Any]) -> None:
        self.opt.step()


def naive(model: nn.Module) -> None:
    opt = torch.optim.RAdam(model.parameters(), lr=0.01)

    def forward_pass(batch: Any) -> dict[str, Any]:
        x, y = batch
        opt.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        opt.step()
        return {}

    recipe(forward_pass, make_loader()).run(5)


def with_own_callback(model: nn.Module) -> None:
    opt = torch.optim.RAdam(model.parameters(), lr=0.01)

    def forward_pass(batch: Any) -> dict[str, Any]:
        x, y = batch
        nn.functional.cross_entropy(model(x), y).backward()
        return {}

    loop = recipe(forward_pass, make_loader())
    loop.register("model", model)
    loop.callbacks.add_callbacks([OptimizerCallback(opt)])
    loop.cpu()
    loop.run(5)


def composed(model: nn.Module) -> None:
    opt = torch.optim.RAdam(model.parameters(), lr=0.01)

    def forward_pass(batch: Any) -> dict[str, Any]:
        x, y = batch
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        return {"loss": loss}

    def test_pass(batch: Any) -> dict[str, Any]:
        x, y = batch
        with torch.no_grad():
            model.eval()
            loss = nn.functional.cross_entropy(model(x), y)
            model.train()
        return {"loss": loss}

    out = io.StringIO()
    test_recipe = recipe(test_pass, make_loader())
    test_recipe.callbacks.add_callbacks(
        [
            EpochMetricAvg("loss", post_each_batch=False),
            StdoutLogger(log_every=-1, prefix="Test", to=out),
        ]
    )
    loop = recipe(forward_pass, make_loader())
    loop.register("model", model)
    loop.register("test_recipe", test_recipe)
    loop.callbacks.add_callbacks(
        [
            Optimizer(opt),
            EpochMetricAvg("loss", post_each_batch=True),
            StdoutLogger(log_every=10, to=out),
            CallRecipe(test_recipe, run_every=10, prefix="test"),
        ]
    )
    loop.cpu()
    state = loop.run(5)
    assert state["metrics"].keys() == {"loss", "test/loss"}
    assert "epoch 2, batch 10: loss" in out.getvalue()
    assert out.getvalue().startswith("Test epoch 1, batch 4: loss")


def preset(model: nn.Module) -> None:
    opt = torch.optim.RAdam(model.parameters(), lr=0.01)

    def forward_pass(batch: Any) -> dict[str, Any]:
        x, y = batch
        pred = model(x)
        loss = nn.functional.cross_entropy(pred, y)
        loss.backward()
        return {"loss": loss, "pred": pred}

    def test_pass(batch: Any) -> dict[str, Any]:
        x, y = batch
        pred = model(x)
        return {"loss": nn.functional.cross_entropy(pred, y), "pred": pred}

    loop = train_and_test(model, forward_pass, test_pass, make_loader(), make_loader())
    loop.callbacks.add_callbacks([Optimizer(opt), EpochMetricAvg("loss")])
    loop.test_loop.callbacks.add_callbacks([EpochMetricAvg("loss", post_each_batch=False)])
    loop.run(2)
    loop = classification(model, forward_pass, test_pass, make_loader(), make_loader(), CLASSES)
    loop.callbacks.add_callbacks([Optimizer(opt), LRByFraction(opt, lambda fraction: 1.0)])
    loop.run(3)


def test_every_sample_trains_the_same_weights() -> None:
    weights = []
    for sample in (naive, with_own_callback, composed, preset):
        model = make_model()
        sample(model)
        weights.append(weights_of(model))
    assert all(are_equal(weights[0], other) for other in weights[1:])


@pytest.mark.parametrize("test_every", [1, -1])
def test_the_last_sample_needs_no_instruction(test_every: int) -> None:
    loop = cross_entropy_classification(
        make_model(), make_loader(), make_loader(), CLASSES, test_every=test_every
    )
    loop.cpu()
    assert {"loss", "accuracy", "lr", "test/loss", "test/accuracy"} <= loop.run(5)["metrics"].keys()
