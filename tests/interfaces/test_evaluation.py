from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, top_k_accuracy_score
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from compressor.errors import DataError, MetricError
from compressor.interfaces import (
    Accuracy,
    Device,
    EvalLossFunction,
    EvaluationFunction,
    Missclass,
    TopK,
    TorchEvaluationFunction,
    TorchForwardPass,
    evaluate,
    get_accuracy,
    get_missclass,
    get_topk,
)
from compressor.interfaces.metrics import count_right

CPU = Device.CPU


class Echo(nn.Module):
    """Returns its input, and has what user code asks a model for."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.frozen = nn.BatchNorm1d(1).eval()

    def forward(self, x: Tensor) -> Tensor:
        assert not self.training
        return x + self.weight


def make_batches(samples: int = 70, classes: int = 7, size: int = 32) -> list[Any]:
    random = torch.Generator().manual_seed(0)
    scores = torch.rand(samples, classes, generator=random)
    labels = torch.randint(classes, (samples,), generator=random)
    return list(zip(scores.split(size), labels.split(size), strict=True))


BATCHES = make_batches()
SCORES, LABELS = (torch.cat(parts).numpy() for parts in zip(*BATCHES, strict=True))


def test_accuracy_weighs_every_sample_alike() -> None:
    expected = 100 * accuracy_score(LABELS, SCORES.argmax(1))
    by_batch = np.mean([100 * (x.argmax(1) == y).float().mean().item() for x, y in BATCHES])
    assert Accuracy()(Echo(), BATCHES) == {"accuracy": pytest.approx(expected)}
    assert abs(expected - by_batch) > 0.1
    assert Missclass()(Echo(), BATCHES) == {"missclass": pytest.approx(100 - expected)}
    assert get_accuracy(Echo(), BATCHES)["accuracy"] == pytest.approx(expected)
    assert get_missclass(Echo(), BATCHES)["missclass"] == pytest.approx(100 - expected)


def test_top_k_agrees_with_sklearn() -> None:
    metrics = TopK((1, 3))(Echo(), BATCHES)
    for k in (1, 3):
        expected = 100 * top_k_accuracy_score(LABELS, SCORES, k=k, labels=range(7))
        assert metrics[f"top-{k}"] == pytest.approx(expected)
    assert list(get_topk(Echo(), BATCHES)) == ["top-1", "top-5"]
    assert get_topk(Echo(), BATCHES, topk=(3,))["top-3"] == metrics["top-3"]
    assert TopK((9,))(Echo(), BATCHES) == {"top-9": 100.0}


@pytest.mark.parametrize(
    ("logits", "labels", "right"),
    [
        ([[0.1, 0.9], [0.8, 0.2]], [1, 1], 1),
        ([[0.1, 0.9], [0.8, 0.2]], [[1], [0]], 2),
        ([[0.1, 0.9], [0.8, 0.2]], [[0.0, 1.0], [0.0, 1.0]], 1),
        ([0.5, -0.5, 2.0], [1, 1, 1], 2),
        ([[0.5], [-0.5]], [1.0, 0.0], 2),
    ],
)
def test_labels_of_every_form(logits: Any, labels: Any, right: int) -> None:
    assert count_right(torch.tensor(logits), torch.tensor(labels), (1,)).tolist() == [right]


def test_pixels_are_counted_one_by_one() -> None:
    random = torch.Generator().manual_seed(0)
    logits = torch.rand(2, 3, 4, 5, generator=random)
    labels = torch.randint(3, (2, 4, 5), generator=random)
    expected = (logits.argmax(1) == labels).float().mean().item()
    assert Accuracy()(Echo(), [(logits, labels)])["accuracy"] == pytest.approx(100 * expected)


def test_labels_that_do_not_belong_to_the_output_are_refused() -> None:
    with pytest.raises(MetricError, match=r"output \(2, 3\) and the labels \(5,\)"):
        count_right(torch.zeros(2, 3), torch.zeros(5), (1,))


def test_batches_of_another_form() -> None:
    class Named(TorchForwardPass):
        def extract_model_inputs(self, batch: Any) -> Any:
            return batch["image"]

    batches = [{"image": x, "class": y} for x, y in BATCHES]
    assert Accuracy(Named(), label="class")(Echo(), batches) == Accuracy()(Echo(), BATCHES)


def test_a_transform_sees_every_batch() -> None:
    wrong = get_accuracy(Echo(), BATCHES, transform=lambda batch: (-batch[0], batch[1]))
    negated = [(-x, y) for x, y in BATCHES]
    assert wrong == get_accuracy(Echo(), negated)


def test_the_mean_loss_weighs_every_sample_alike() -> None:
    def loss(model: nn.Module, batch: Any) -> dict[str, Tensor]:
        value = nn.functional.cross_entropy(model(batch[0]), batch[1])
        return {"a": value, "b": value}

    expected = 2 * nn.functional.cross_entropy(torch.tensor(SCORES), torch.tensor(LABELS))
    metrics = EvalLossFunction(loss)(Echo(), BATCHES)
    assert metrics["loss"] == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize(
    "metric", [Accuracy(), EvalLossFunction(lambda model, batch: model(batch))]
)
def test_nothing_to_judge_on_is_refused(metric: Any) -> None:
    with pytest.raises(DataError, match="yields no batch"):
        metric(Echo(), [])


def test_a_model_without_scores_is_refused() -> None:
    class Words(nn.Module):
        def forward(self, x: Tensor) -> str:
            return "cat"

    with pytest.raises(MetricError, match="returned a str without a floating point tensor"):
        Accuracy()(Words(), BATCHES)


class Own(TorchEvaluationFunction):
    """As the documents show it: no `super().__init__()`, keywords taken together."""

    def __init__(self, device: str = "cuda") -> None:
        self.device = device

    def _compute_inference(self, model: nn.Module, data_loader: Any, **kwargs: Any) -> Any:
        assert kwargs["device"] is CPU
        assert not model.training
        assert not torch.is_grad_enabled()
        assert data_loader.native_dl is BATCHES
        return {"mykey": float(len(data_loader)), "device": str(next(model.parameters()).device)}


class Short(TorchEvaluationFunction):
    def _compute_inference(self, model: nn.Module, data_loader: Any) -> Any:  # type: ignore
        return {"mykey": 3.0}


class Applied(EvaluationFunction):
    def apply(self, model: nn.Module, data_loader: Any) -> Any:  # type: ignore[override]
        return {"mykey": 3.0}


class Called(EvaluationFunction):
    def __call__(self, model: nn.Module, data_loader: Any) -> Any:  # type: ignore[override]
        return {"mykey": 3.0}


def plain(model: nn.Module, data_splits: Any) -> dict[str, float]:
    return {"mykey": 3.0}


def with_device(model: nn.Module, data_splits: Any, device: Any = None) -> dict[str, float]:
    assert device is CPU
    return {"mykey": 3.0}


def with_needed_device(model: nn.Module, loader: Any, *, device: Any) -> dict[str, float]:
    return with_device(model, loader, device)


@pytest.mark.parametrize(
    "eval_func",
    [
        Own(),
        Short(),
        Applied(),
        Called(),
        plain,
        with_device,
        with_needed_device,
        functools.partial(with_device),
        lambda model, loader, **kwargs: {"mykey": 3.0},
    ],
)
def test_every_form_of_evaluation_is_called_as_it_allows(eval_func: Any) -> None:
    assert evaluate(eval_func, Echo(), BATCHES, CPU, "mykey") == {"mykey": 3.0}


@pytest.mark.parametrize("base", [EvaluationFunction, TorchEvaluationFunction])
def test_a_base_says_which_method_is_missing(base: Any) -> None:
    with pytest.raises(NotImplementedError, match=f"{base.__name__} needs"):
        base()(Echo(), BATCHES)


def returning(value: Any) -> Any:
    return lambda model, loader: value


@pytest.mark.parametrize("value", [0.5, np.float32(0.5), torch.tensor(0.5), torch.tensor([0.5])])
def test_a_bare_number_gets_the_name_of_the_key(value: Any) -> None:
    assert evaluate(returning(value), Echo(), BATCHES, CPU, "miou") == {"miou": 0.5}
    assert evaluate(returning(value), Echo(), BATCHES, CPU, None) == {"metric": 0.5}
    (only,) = evaluate(returning({"a": value}), Echo(), BATCHES, CPU, None).items()
    assert only == ("a", 0.5)
    assert type(only[1]) is float


def test_only_finite_numbers_are_passed_on() -> None:
    metrics = {"a": 1, "nan": float("nan"), "table": [1, 2], "classes": torch.ones(3), "text": "1"}
    assert evaluate(returning(metrics), Echo(), BATCHES, CPU, "a") == {"a": 1.0}


@pytest.mark.parametrize(
    ("returned", "key", "message"),
    [
        ({"acc": 1.0, "loss": 2.0}, "accuracy", "no 'accuracy', .* Known: acc, loss"),
        ({"a": float("nan")}, "a", "The metric 'a' is nan"),
        ({"a": float("inf")}, "a", "The metric 'a' is inf"),
        (float("nan"), "a", "The metric 'a' is nan"),
        ({"a": [1, 2]}, "a", "The metric 'a' is not a number"),
        ({"a": 1, "b": 2}, None, r"2 finite numbers \(a, b\), and no eval_key"),
        (None, "a", "The evaluation returned a NoneType"),
        ("0.9", "a", "The evaluation returned a str"),
    ],
)
def test_metrics_that_cannot_be_used_say_why(returned: Any, key: Any, message: str) -> None:
    with pytest.raises(MetricError, match=message):
        evaluate(returning(returned), Echo(), BATCHES, CPU, key)


def test_a_function_with_other_needs_is_refused_before_it_runs() -> None:
    def needs_more(model: nn.Module, loader: Any, threshold: float) -> float:
        raise AssertionError

    with pytest.raises(MetricError, match=r"needs_more cannot be called .* 'threshold'"):
        evaluate(needs_more, Echo(), BATCHES, CPU, "a")


def test_mistakes_of_the_users_own_code_come_as_they_are() -> None:
    def broken(model: nn.Module, loader: Any) -> float:
        return len(3)  # type: ignore[arg-type]

    with pytest.raises(TypeError, match="has no len"):
        evaluate(broken, Echo(), BATCHES, CPU, "a")


def test_the_model_is_left_as_it_was() -> None:
    def messy(model: nn.Module, loader: Any) -> float:
        assert not model.training
        assert not torch.is_grad_enabled()
        model.train()
        model.requires_grad_(False)
        return 1.0

    model = Echo()
    model.frozen.weight.requires_grad_(False)
    flags = [parameter.requires_grad for parameter in model.parameters()]
    modes = [module.training for module in model.modules()]
    evaluate(messy, model, BATCHES, CPU, "a")
    assert [module.training for module in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == flags
    assert torch.is_grad_enabled()


def test_an_evaluation_leaves_the_loaders_own_generator_as_it_was() -> None:
    own = torch.Generator().manual_seed(1)
    loader = DataLoader(TensorDataset(torch.ones(4, 2)), shuffle=True, generator=own)
    state = own.get_state()
    count = {"batches": 0.0}

    def consume(model: nn.Module, batches: Any) -> dict[str, float]:
        count["batches"] = float(sum(1 for _ in batches))
        return count

    assert evaluate(consume, nn.Linear(2, 2), loader, CPU, None) == {"batches": 4}
    assert torch.equal(own.get_state(), state)
