"""A table, a metric of one's own, and a file that scores it in batches.

569 biopsies with 30 measurements each (Wisconsin breast cancer, in scikit-learn; nothing is
downloaded). A missed tumour costs five times a false alarm, so the metric is a cost, and less of it
is better: `metric_mode="min"`, and `delta` is on the scale of that cost. The loss has the same
weights. The network is a plain MLP with one output; the time of 256 rows in ONNX Runtime counts.

python examples/tabular_mlp.py
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_breast_cancer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from compressor import Engine, EvaluationFunction, LossFunction, Result, TorchFramework
from compressor.report.console import render

Batch = tuple[Tensor, Tensor]  # features (N, 30), whether it is a tumour (N,)
COST_OF_MISSED = 5.0  # where a false alarm costs 1
TEST_FRACTION = 0.4


class WeightedLoss(LossFunction):
    """Cross entropy of two classes; a tumour weighs `weight` times as much as none."""

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = torch.tensor(weight)

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        features, is_tumour = batch
        logits = model(features).squeeze(1)
        return F.binary_cross_entropy_with_logits(logits, is_tumour, pos_weight=self.weight)


class Cost(EvaluationFunction):
    """What wrong answers cost a patient on average, and how many there are of each kind."""

    @torch.no_grad()
    def apply(self, model: nn.Module, data_loader: Iterable[Batch]) -> dict[str, float]:
        model.eval()
        missed = alarms = patients = 0
        for features, is_tumour in data_loader:
            says_tumour = model(features).squeeze(1) > 0
            missed += int((~says_tumour & is_tumour.bool()).sum())
            alarms += int((says_tumour & ~is_tumour.bool()).sum())
            patients += len(is_tumour)
        cost = (COST_OF_MISSED * missed + alarms) / patients
        return {"cost": cost, "missed": missed, "false alarms": alarms}


def make_loaders() -> dict[str, DataLoader[tuple[Tensor, ...]]]:
    """Features scaled by the training rows; the same split for every seed."""
    table = load_breast_cancer()
    features = torch.from_numpy(table.data).float()
    is_tumour = torch.from_numpy(table.target == 0).float()  # its classes: malignant, benign
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(0))
    test, train = order.split([count := int(TEST_FRACTION * len(order)), len(order) - count])
    features = (features - features[train].mean(0)) / features[train].std(0)
    return {
        "train": DataLoader(TensorDataset(features[train], is_tumour[train]), 32, shuffle=True),
        "test": DataLoader(TensorDataset(features[test], is_tumour[test]), 256),
    }


def make_mlp(width: int) -> nn.Module:
    layers: list[nn.Module] = [nn.Linear(30, width), nn.ReLU()]
    for _ in range(2):
        layers += [nn.Linear(width, width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, 1))


def train(model: nn.Module, loader: Iterable[Batch], epochs: int) -> None:
    """Train `model` in place."""
    loss, optimizer = WeightedLoss(COST_OF_MISSED), torch.optim.AdamW(model.parameters(), 1e-3)
    for _ in range(epochs):
        for batch in loader:
            optimizer.zero_grad()
            loss(model, batch).backward()
            optimizer.step()
    model.eval()


def main(argv: Sequence[str] | None = None) -> Result:
    arguments = parse_arguments(argv)
    torch.manual_seed(arguments.seed)
    is_quick = arguments.quick
    data = make_loaders()
    model = make_mlp(64 if is_quick else 512)
    train(model, data["train"], epochs=5 if is_quick else 20)
    engine = Engine(
        framework=TorchFramework(),
        data=data,
        model=model,
        config={
            "task_type": "__custom__",
            "eval_key": "cost",
            "metric_mode": "min",
            "delta": arguments.delta,
            "optimization": arguments.optimization,
            "techniques": ["channel_pruning", "quantization"],
            "target": {"runtime": "onnxruntime", "device": "cpu", "batch_size": 256},
            "device": "CPU",
            "budget": {"trials": 1 if is_quick else 4},
            "full_trainer": {
                "optimizer": {"name": "AdamW", "lr": 1e-3},
                "epochs": 2 if is_quick else 20,
            },
            "fine_tuner": {"loop_params": {"epochs": 1 if is_quick else 5}},
            "export": {"formats": ["onnx"]},
            "run_dir": str(arguments.run_dir),
            "seed": arguments.seed,
        },
        eval_func=Cost(),
        loss_function_cls=WeightedLoss,
        loss_function_kwargs={"weight": COST_OF_MISSED},
    )
    engine.run()
    render(engine.result)
    print("before:", Cost()(model, data["test"]))
    print("after: ", Cost()(engine.result.runtime_model(), data["test"]))
    return engine.result


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--delta", type=float, default=0.05, help="cost per patient to give up")
    parser.add_argument("--optimization", choices=["latency", "compression"], default="latency")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--run-dir", type=Path, default=Path("runs", "tabular-mlp"))
    parser.add_argument("--quick", action="store_true", help="a small network, one trial")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
