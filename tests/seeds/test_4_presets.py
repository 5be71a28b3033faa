"""The samples of document 4 in full, and as presets: its code blocks 10 to 13."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import compressor.training.recipes as tcr
from compressor.training.loggers import InMemoryLogger
from tests.seeds.digits import CLASSES, make_loader, make_test_loader, whole
from tests.seeds.recipe_helpers import (
    Noted,
    accuracy_of,
    assert_same_weights,
    loss_of,
    make_model,
    make_optimizer,
    train_by_hand,
)


# Block 10; a test follows each epoch too, so that the last weights are never left out.
@pytest.mark.slow
def test_training_and_testing_in_full(capsys: pytest.CaptureFixture[str]) -> None:
    model = make_model()
    opt = make_optimizer(model)
    data_loader, test_loader = make_loader(), make_test_loader()
    trained, tested = Noted(), Noted()
    train_log, test_log = InMemoryLogger(), InMemoryLogger()

    def forward_pass(batch: Any) -> dict[str, Any]:
        x, y = batch
        pred = model(x)
        loss = nn.functional.cross_entropy(pred, y)
        loss.backward()
        trained(model, loss)
        return {"loss": loss}

    def test_pass(batch: Any) -> dict[str, Any]:
        x, y = batch
        with torch.no_grad():
            model.eval()
            pred = model(x)
            loss = nn.functional.cross_entropy(pred, y)
            tested(model, loss)
            model.train()
        return {"loss": loss}

    test_recipe = tcr.recipe(test_pass, test_loader)
    test_recipe.callbacks.add_callbacks(
        [
            tcr.EpochMetricAvg("loss", post_each_batch=False),
            tcr.StdoutLogger(log_every=-1, prefix="Test"),
            tcr.ToLogger(test_log, log_every=-1, prefix="Test"),
        ]
    )

    recipe = tcr.recipe(forward_pass, data_loader)
    recipe.register("model", model)
    recipe.register("test_recipe", test_recipe)
    recipe.callbacks.add_callbacks(
        [
            tcr.Optimizer(opt),
            tcr.EpochMetricAvg("loss", post_each_batch=True),
            tcr.StdoutLogger(log_every=10),
            tcr.ToLogger(train_log, log_every=10),
            tcr.CallRecipe(test_recipe, run_every=100, prefix="test"),
        ]
    )
    recipe.cpu()
    state = recipe.run(5)

    assert trained.modes == {(True, True)}
    assert tested.modes == {(False, False)}
    assert trained.losses[-1] < trained.losses[0]
    by_hand = make_model()
    assert trained.losses == train_by_hand(by_hand, data_loader, 5)  # tests disturb nothing
    assert_same_weights(model, by_hand)
    assert len(tested.losses) == 5 * 2
    assert state["metrics"]["test/loss"] == pytest.approx(loss_of(model, test_loader), rel=1e-5)
    assert train_log.most_recent["test/loss"] == test_log.most_recent["Test/loss"]
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("Test epoch") for line in lines) == 5


# Block 11
@pytest.mark.slow
def test_train_and_test_sees_to_modes_gradients_and_checkpoints(tmp_path: Path) -> None:
    model = make_model()
    opt = make_optimizer(model)
    data_loader, test_loader = make_loader(), make_test_loader()
    trained, tested = Noted(), Noted()

    def forward_pass(batch: Any) -> dict[str, Any]:
        x, y = batch
        pred = model(x)
        loss = nn.functional.cross_entropy(pred, y)
        loss.backward()
        trained(model, loss)
        return {"loss": loss}

    def test_pass(batch: Any) -> dict[str, Any]:
        x, y = batch
        pred = model(x)
        loss = nn.functional.cross_entropy(pred, y)
        tested(model, loss)
        return {"loss": loss}

    # Where checkpoints go has to be said: without a folder there are none.
    recipe = tcr.train_and_test(
        model,
        forward_pass,
        test_pass,
        data_loader,
        test_loader,
        save_dir=tmp_path,
        save_interval="5ep",
    )

    recipe.callbacks.add_callbacks(
        [tcr.Optimizer(opt), tcr.EpochMetricAvg("loss", post_each_batch=True)]
    )
    recipe.test_loop.callbacks.add_callbacks([tcr.EpochMetricAvg("loss", post_each_batch=False)])

    recipe.cpu()
    state = recipe.run(5)

    assert trained.modes == {(True, True)}
    assert tested.modes == {(False, False)}
    by_hand = make_model()
    assert trained.losses == train_by_hand(by_hand, data_loader, 5)
    assert state["metrics"]["test/loss"] == pytest.approx(loss_of(model, test_loader), rel=1e-5)
    saved = {name: value.clone() for name, value in model.state_dict().items()}
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    assert recipe.resume()
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in saved.items())


# Block 12
@pytest.mark.slow
def test_classification_measures_and_shows_what_is_worth_knowing(tmp_path: Path) -> None:
    model = make_model()
    opt = make_optimizer(model)
    data_loader, test_loader = make_loader(32, batch_size=16), make_test_loader()

    def forward_pass(batch: Any) -> dict[str, Any]:
        x, y = batch
        pred = model(x)
        loss = nn.functional.cross_entropy(pred, y)
        loss.backward()
        return {"loss": loss, "pred": pred}

    def test_pass(batch: Any) -> dict[str, Any]:
        x, y = batch
        pred = model(x)
        loss = nn.functional.cross_entropy(pred, y)
        return {"loss": loss, "pred": pred}

    recipe = tcr.classification(
        model,
        forward_pass,
        test_pass,
        data_loader,
        test_loader,
        CLASSES,
        report_dir=tmp_path,  # the visual report is a file
    )

    recipe.callbacks.add_callbacks([tcr.Optimizer(opt)])

    recipe.cpu()
    metrics = recipe.run(5)["metrics"]

    assert {"loss", "accuracy", "test/macro_f1"} <= metrics.keys()
    assert metrics["test/loss"] == pytest.approx(loss_of(model, test_loader), rel=1e-5)
    assert metrics["test/accuracy"] == pytest.approx(accuracy_of(model, test_loader))
    assert metrics["test/accuracy"] > 0.3  # of ten classes, each as frequent
    confusion = recipe.test_loop.state["confusion"]
    _, labels = whole(test_loader)
    assert confusion.sum(1).tolist() == labels.bincount(minlength=10).tolist()
    assert confusion.trace().item() == round(12 * metrics["test/accuracy"])
    page = (tmp_path / "inspection.html").read_text(encoding="utf-8")
    for part in ("Confusion matrix", "<h2>Best</h2>", "<h2>Worst</h2>", "<h2>Most confused</h2>"):
        assert part in page


# Block 13; AdamW stands for the optimizer of the document.
@pytest.mark.slow
def test_cross_entropy_classification_leaves_nothing_to_write() -> None:
    model = make_model()
    data_loader, test_loader = make_loader(32, batch_size=16), make_test_loader()
    before = loss_of(model, data_loader)

    recipe = tcr.cross_entropy_classification(model, data_loader, test_loader, CLASSES)

    recipe.cpu()
    metrics = recipe.run(5)["metrics"]

    assert metrics["loss"] < before - 0.5
    assert metrics["test/accuracy"] == pytest.approx(accuracy_of(model, test_loader))
    assert metrics["test/accuracy"] > 0.3
    assert metrics["test/loss"] == pytest.approx(loss_of(model, test_loader), rel=1e-5)
    assert metrics["lr"] < 1e-3 / 2  # it has warmed up, and is on its way down
