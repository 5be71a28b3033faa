"""The latency table in a whole run: where it is kept, what it is asked, how far it was off."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from compressor import Engine, TorchFramework
from compressor.cli.digits import digit_loaders
from compressor.targets.layer_latencies import machine_path
from compressor.testing.models import TinyResNet

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    loaders = digit_loaders()
    train, test = (loaders[split].dataset for split in ("train", "test"))
    data = {
        "train": DataLoader(TensorDataset(*train[:256]), 64),
        "test": DataLoader(TensorDataset(*test[:100]), 100),
    }
    torch.manual_seed(0)
    model = TinyResNet()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(4):
        for images, labels in data["train"]:
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
    config = {
        "delta": 10.0,
        "optimization": "latency",
        "techniques": ["channel_pruning", "quantization"],
        "budget": {"trials": 1},
        "fine_tuner": {"epochs": 1},
        "full_trainer": {"epochs": 1},
        "run_dir": str(tmp_path_factory.mktemp("run")),
    }
    engine = Engine(TorchFramework(), data, model.eval(), config)
    engine.run()
    return engine


def test_latencies_were_predicted_and_their_error_is_stated(engine: Engine) -> None:
    result = engine.result
    assert result is not None
    assert all(r.predicted["latency_ms"] > 0 for r in result.variants)
    run_dir = Path(engine.config.run_dir or "")
    stated = json.loads((run_dir / "result.json").read_text())["latency_errors"]
    assert stated["variants"] == sum(bool(len(r.plan)) for r in result.variants)
    assert 0 <= stated["median_error_fraction"] < 1  # a promise of nothing would be 1
    assert "was predicted from single layers" in (run_dir / "engine.log").read_text()


def test_single_layers_are_kept_for_the_machine_and_costs_for_the_run(engine: Engine) -> None:
    alone = machine_path().read_text()
    for kind in ("float", "static_int8"):
        assert f"onnxruntime cpu threads=1 {kind} Conv2d(16, 16, kernel_size=(3, 3)" in alone
    (told,) = (Path(engine.config.run_dir or "") / "reference").glob("layer_costs-*.jsonl")
    keys = [json.loads(line)[0] for line in told.read_text().splitlines()[1:]]
    assert {"int8", "mixed"} <= set(keys)
    # Widths of the group of layer2.0.conv1 were asked for, with all else unchanged.
    asked = [key for key in keys if key.startswith("layer2.0.conv1 ") and "inputs=16" in key]
    assert {f"outputs={width}" for width in (8, 16, 24, 32)} <= {
        part for key in asked for part in key.replace(",", "").split()
    }
