from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from compressor.errors import ConfigError
from compressor.training.recipes import (
    EpochMetricAvg,
    Log,
    Optimizer,
    Recipe,
    classification,
    cross_entropy_classification,
    train_and_call,
    train_and_test,
)
from compressor.training.schedules import warmup_cosine
from tests.training.helpers import are_equal, make_loader, make_model, weights_of
from tests.training.recipes.helpers import Spy, make_recipe, make_step, make_test


def make(model: nn.Module, **options: Any) -> Recipe:
    loop = train_and_test(
        model, make_step(model), make_test(model), make_loader(), make_loader(), **options
    )
    opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    loop.callbacks.add_callbacks([Optimizer(opt), EpochMetricAvg("loss")])
    loop.test_loop.callbacks.add_callbacks([EpochMetricAvg("loss", post_each_batch=False)])
    return loop


def test_testing_is_peeled_off_without_a_trace() -> None:
    tested, alone = make_model(dropout=0.5), make_model(dropout=0.5)
    make(tested, test_every=1).run(2)
    make_recipe(alone).run(2)
    assert are_equal(weights_of(tested), weights_of(alone))


def test_the_test_loss_is_the_mean_over_all_samples_in_eval_mode() -> None:
    model = make_model(dropout=0.5)
    state = make(model).run(1)
    data = make_loader().dataset.tensors  # type: ignore[attr-defined]
    with torch.no_grad():
        expected = nn.functional.cross_entropy(model.eval()(data[0]), data[1]).item()
    assert state["metrics"]["test/loss"] == pytest.approx(expected)


def test_modes_and_gradients_are_right_in_each_loop_and_put_back() -> None:
    model = make_model()
    model[1].eval()  # a frozen batch norm; it trains in a run, and is put back
    loop = make(model, test_every=2)

    def look(state: dict[str, Any]) -> tuple[bool, bool]:
        return model[1].training, torch.is_grad_enabled()

    train, test = Spy(look), Spy(look)
    loop.callbacks.add_callbacks([train])
    loop.test_loop.callbacks.add_callbacks([test])
    loop.run(1)
    assert {value for _, value in train.seen} == {(True, True)}
    assert {value for _, value in test.seen} == {(False, False)}
    assert model.training
    assert not model[1].training


def test_modes_are_put_back_after_an_error_in_a_test() -> None:
    model = make_model()

    def failing(batch: Any) -> None:
        raise ZeroDivisionError

    loop = train_and_test(model, make_step(model), failing, make_loader(), make_loader())
    model.eval()
    with pytest.raises(ZeroDivisionError):
        loop.run(1)
    assert not model.training
    assert torch.is_grad_enabled()


def test_the_test_loop_can_be_run_alone() -> None:
    model = make_model()
    loop = make(model)
    before = weights_of(model)
    assert loop.test_loop.run(1)["metrics"].keys() == {"loss"}
    assert are_equal(before, weights_of(model))


def test_model_and_test_loop_are_registered(tmp_path: Path) -> None:
    loop = make(make_model(), save_dir=tmp_path)
    loop.run(1)
    other = make_model(1)
    second = make(other, save_dir=tmp_path)
    assert second.resume()
    assert are_equal(weights_of(other), weights_of(loop.model))
    assert second.test_loop.state["epoch"] == 1


def test_presets_write_to_the_log_and_not_to_stdout(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "compressor"):
        make(make_model(), log_every=-1).run(1)
    assert capsys.readouterr().out == ""
    assert len([line for line in caplog.messages if line.startswith("epoch 1, batch 4: ")]) == 1
    assert "test/loss" in caplog.messages[-1]


def test_a_function_is_called_in_eval_mode_without_gradients() -> None:
    model, seen = make_model(), []

    def call() -> dict[str, Any]:
        seen.append((model.training, torch.is_grad_enabled()))
        return {"samples": 3}

    loop = train_and_call(model, make_step(model), call, make_loader(), call_every=2)
    loop.call_loop.callbacks.add_callbacks([Log("samples")])
    state = loop.run(1)
    assert seen == [(False, False)] * 2
    assert loop.call_loop.state["samples"] == 3
    assert state["metrics"] == {"call/samples": 3.0}


def images(samples: int = 12) -> list[Any]:
    labels = torch.arange(samples) % 3
    x = torch.randn(samples, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    x += labels.view(-1, 1, 1, 1)
    return [(x[i : i + 4], labels[i : i + 4]) for i in range(0, samples, 4)]


def make_net() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))


NAMES = ["one", "two", "three"]


def test_classification_measures_and_writes_the_report(tmp_path: Path) -> None:
    model, data = make_net(), images()
    loop = classification(
        model, make_step(model), make_test(model), data, data, NAMES, report_dir=tmp_path
    )
    loop.callbacks.add_callbacks([Optimizer(torch.optim.Adam(model.parameters(), lr=0.01))])
    metrics = loop.run(2)["metrics"]
    names = {"loss", "accuracy", "test/loss", "test/accuracy", "test/macro_f1"}
    assert metrics.keys() == names
    with torch.no_grad():
        pairs = [(model(x).argmax(1), y) for x, y in data]
    right = sum(int((pred == y).sum()) for pred, y in pairs)
    assert metrics["test/accuracy"] == right / 12
    confusion = loop.test_loop.state["confusion"]
    assert int(confusion.diagonal().sum()) == right
    assert confusion.sum(1).tolist() == [4, 4, 4]
    page = (tmp_path / "inspection.html").read_text()
    assert "three" in page
    assert "no maps of the input gradients" not in page
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_the_report_changes_nothing_in_the_training(tmp_path: Path) -> None:
    weights = []
    for report_dir in (None, tmp_path):
        model, data = make_net(), images()
        loop = cross_entropy_classification(model, data, data, NAMES, report_dir=report_dir)
        loop.run(1)
        loop.run(2)
        weights.append(weights_of(model))
    assert are_equal(*weights)


def test_cross_entropy_classification_is_the_loop_written_by_hand() -> None:
    model, by_hand, data = make_net(), make_net(), images()
    cross_entropy_classification(
        model, data, data, NAMES, lr=0.02, beta=0.8, weight_decay=0.1, label_smoothing=0.2
    ).run(4)
    opt = torch.optim.AdamW(by_hand.parameters(), lr=0.02, betas=(0.8, 0.999), weight_decay=0.1)
    for number in range(12):
        x, y = data[number % 3]
        opt.param_groups[0]["lr"] = 0.02 * warmup_cosine(number / 12)
        log_probabilities = by_hand(x).log_softmax(1)
        target = 0.8 * nn.functional.one_hot(y, 3) + 0.2 / 3
        loss = -(target * log_probabilities).sum(1).mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
    for name, value in weights_of(by_hand).items():
        # the loss is computed in another order
        torch.testing.assert_close(weights_of(model)[name], value, rtol=1e-4, atol=1e-5)


def test_cross_entropy_classification_learns() -> None:
    data = make_loader()
    loop = cross_entropy_classification(make_model(), data, data, ["no", "yes"], lr=0.05)
    assert loop.run(20)["metrics"]["test/accuracy"] > 0.9


def test_an_unknown_option_names_the_preset() -> None:
    model, data = make_net(), images()
    steps = make_step(model), make_test(model)
    with pytest.raises(ConfigError, match=r"cross_entropy_classification has no.*Known: .*, lr, "):
        cross_entropy_classification(model, data, data, NAMES, learning_rate=1.0)  # type: ignore[call-arg]
    with pytest.raises(ConfigError, match=r"^classification has no option 'learning_rate'"):
        classification(model, *steps, data, data, NAMES, learning_rate=1.0)  # type: ignore[call-arg]
    with pytest.raises(
        ConfigError, match=r"train_and_test has no option 'test_evry'.*'test_every'"
    ):
        train_and_test(model, *steps, data, data, test_evry=1)  # type: ignore[call-arg]
    with pytest.raises(ConfigError, match="train_and_call has no option 'x'"):
        train_and_call(model, steps[0], dict, data, x=1)  # type: ignore[call-arg]


def test_what_was_called_for_stays_in_the_state() -> None:
    model = make_model()
    loop = train_and_call(
        model, make_step(model), lambda: {"made": torch.ones(2, 3)}, make_loader()
    )
    state = loop.run(1)
    assert loop.call_loop.state["made"].shape == (2, 3)
    assert "pred" not in state


@pytest.mark.parametrize("options", [{"label_smoothing": 2.0}, {"lr": -1.0}, {"beta": 1.5}])
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"label_smoothing=2|AdamW refuses"):
        cross_entropy_classification(make_net(), images(), images(), NAMES, **options)


def test_one_class_is_refused() -> None:
    with pytest.raises(ConfigError, match="no names of two classes"):
        cross_entropy_classification(make_net(), images(), images(), ["one"])
