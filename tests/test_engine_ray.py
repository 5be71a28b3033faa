"""The engine with workers of Ray finds what it finds alone; also when one of them is killed."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from compressor import Engine, TorchForwardPass, TorchFramework
from compressor.cli.digits import digit_loaders
from compressor.errors import ConfigError
from compressor.result import VariantRecord
from compressor.testing.models import TinyResNet
from tests.runs import accuracy, fit

pytestmark = pytest.mark.slow


class Digits(TensorDataset):
    """Holds what cannot be pickled, as data sets with an open file do."""

    def __init__(self, *tensors: Tensor) -> None:
        super().__init__(*tensors)
        self.lock = threading.Lock()


def make_loaders() -> dict[str, Any]:
    loaders = digit_loaders()
    train, test = (loaders[split].dataset for split in ("train", "test"))
    return {
        "train": DataLoader(
            Digits(*train[:256]), 64, shuffle=True, generator=torch.Generator().manual_seed(1)
        ),
        "test": DataLoader(Digits(*test[:200]), 100),
    }


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    torch.manual_seed(0)
    loader = make_loaders()["train"]
    return fit(TinyResNet(), [batch for _ in range(12) for batch in loader])


class KillingLoss:
    """Kills the process in which it is first called that is not the engine's, once."""

    def __init__(self, engine: int, note: str) -> None:
        self.engine, self.note = engine, Path(note)

    def __call__(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        is_training = model.training and torch.is_grad_enabled()
        if is_training and os.getpid() != self.engine and not self.note.exists():
            self.note.write_text(str(os.getpid()))
            os.kill(os.getpid(), signal.SIGKILL)
        return F.cross_entropy(model(batch[0]), batch[1])


def make_engine(model: nn.Module, data: Any, folder: Path, executor: Mapping[str, Any]) -> Engine:
    sgd = {"name": "SGD", "lr": 0.05, "momentum": 0.9}
    return Engine(
        framework=TorchFramework(),
        data=data,
        model=model,
        config={
            "delta": 15.0,
            "run_dir": str(folder),
            "device": "CPU",
            "progress": False,
            "techniques": ["channel_pruning", "block_removal"],
            "budget": {"trials": 4},
            "fine_tuner": {"optimizer": sgd, "epochs": 1},
            "full_trainer": {"optimizer": sgd, "epochs": 2},
            "executor": executor,
        },
        forward_pass=TorchForwardPass(model_input_pattern=(0, "_")),
        eval_func=accuracy,
        loss_function_cls=KillingLoss,
        loss_function_kwargs={"engine": os.getpid(), "note": str(folder.parent / "killed")},
    )


def lasting(record: VariantRecord) -> VariantRecord:
    """What does not depend on the clock."""
    cost = replace(record.cost, latency_ms=0.0) if record.cost else None
    return replace(record, seconds=0.0, cost=cost)


def test_workers_find_what_one_process_finds_though_one_is_killed(
    trained: nn.Module, tmp_path: Path
) -> None:
    folders = {kind: tmp_path / kind for kind in ("inline", "ray")}
    found = {}
    for kind, folder in folders.items():
        engine = make_engine(trained, make_loaders, folder, {"kind": kind, "workers": 2})
        model = engine.run()
        assert engine.result is not None
        found[kind] = model, engine.result
    assert (tmp_path / "killed").exists()
    (inline_model, inline), (ray_model, ray) = found["inline"], found["ray"]
    assert len(inline.variants) > 2
    assert [lasting(r) for r in ray.variants] == [lasting(r) for r in inline.variants]
    assert len(ray.plan) > 0
    assert ray.plan == inline.plan
    claims = [
        (
            r.certificate.metric,
            r.certificate.interval,
            r.certificate.size_bytes,
            r.certificate.macs,
            r.certificate.looks,
        )
        for r in (ray, inline)
    ]
    assert claims[0] == claims[1]
    weights = inline_model.state_dict()
    assert all(value.equal(weights[name]) for name, value in ray_model.state_dict().items())
    for record in ray.variants:
        files = [f / "variants" / record.id / "structure.json" for f in folders.values()]
        assert files[0].read_bytes() == files[1].read_bytes()
    assert not (folders["ray"] / ".workers").exists()
    assert "done again" in (folders["ray"] / "engine.log").read_text()


def test_data_that_cannot_be_sent_is_refused_before_the_start(
    trained: nn.Module, tmp_path: Path
) -> None:
    import ray

    engine = make_engine(trained, make_loaders(), tmp_path / "run", {"kind": "ray", "workers": 2})
    with pytest.raises(ConfigError, match=r"data\['train'\].*data=make_loaders"):
        engine.run()
    assert not ray.is_initialized()
    assert not list(tmp_path.glob("run/variants/*"))
