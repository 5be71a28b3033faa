"""The example's cost is what wrong answers cost, and the file is judged by it."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
import torch

from tests.examples import scripts


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return scripts.load("tabular_mlp", monkeypatch)


def test_a_missed_tumour_costs_five_false_alarms(example: ModuleType) -> None:
    class Echo(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    says = torch.tensor([[1.0], [1.0], [-1.0], [-1.0]])  # a tumour: yes, yes, no, no
    truth = torch.tensor([1.0, 0.0, 1.0, 0.0])
    batches = [(says, truth), (says[:1], truth[:1])]
    assert example.Cost().apply(Echo(), batches) == {
        "cost": (5 + 1) / 5,
        "missed": 1,
        "false alarms": 1,
    }


def test_rows_are_in_one_split_and_scaled_by_the_training_rows(example: ModuleType) -> None:
    loaders = example.make_loaders()
    train, test = (loaders[name].dataset.tensors for name in ("train", "test"))
    assert len(train[0]) + len(test[0]) == 569
    assert int(train[1].sum() + test[1].sum()) == 212, "malignant, by the table's description"
    torch.testing.assert_close(train[0].mean(0), torch.zeros(30), rtol=0, atol=1e-4)
    torch.testing.assert_close(train[0].std(0), torch.ones(30), rtol=0, atol=1e-4)


@pytest.mark.slow
def test_the_cost_of_the_file_is_certified(example: ModuleType, tmp_path: Path) -> None:
    options = ("--delta", 0.5, "--optimization", "compression", "--run-dir", tmp_path)
    result = scripts.run(example, *options)
    certificate = result.certificate
    features, is_tumour = example.make_loaders()["test"].dataset.tensors
    scores = scripts.outputs_of_file(result.artifacts["onnx"], {"input": features})[:, 0]
    costs = [
        5.0 if tumour and score <= 0 else 1.0 if not tumour and score > 0 else 0.0
        for score, tumour in zip(scores.tolist(), is_tumour.bool().tolist(), strict=True)
    ]
    assert certificate.metric_name == "cost"
    assert certificate.metric == pytest.approx(sum(costs) / len(costs))
    assert certificate.metric <= certificate.reference_metric + 0.5
    assert certificate.within_delta
    assert certificate.target["batch_size"] == 256
