"""Short runs of the engine on torch, for tests that look at what came of one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from compressor import Engine, TorchForwardPass, TorchFramework
from compressor.result import Result
from tests.brevity import be_brief

be_brief()  # in processes of their own, too


def accuracy(model: nn.Module, loader: Any) -> dict[str, float]:
    """In percent."""
    right = [(model(inputs).argmax(1) == labels).float() for inputs, labels in loader]
    return {"accuracy": 100 * float(torch.cat(right).mean())}


def fit(model: nn.Module, batches: list[Any]) -> nn.Module:
    """Train `model` in place on the batches, once on each."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for inputs, labels in batches:
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
    return model.eval()


def compress(model: nn.Module, data: Mapping[str, Any], folder: Path, **config: Any) -> Result:
    """One trial for a classifier, on the CPU; without fine-tuning unless `config` has it."""
    untrained = {"optimizer": {"name": "SGD", "lr": 0.01}, "epochs": 0}
    engine = Engine(
        framework=TorchFramework(),
        data=data,
        model=model,
        config={
            "run_dir": str(folder),
            "device": "CPU",
            "progress": False,
            "budget": {"trials": 1},
            "fine_tuner": untrained,
            "full_trainer": untrained,
            **config,
        },
        forward_pass=TorchForwardPass(model_input_pattern=(0, "_")),
        eval_func=accuracy,
        loss_function_cls=lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]),
    )
    engine.run()
    assert engine.result is not None
    return engine.result
