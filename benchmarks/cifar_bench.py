"""A CIFAR ResNet's job as the engine opens it, for benchmarks that work below the engine."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.common import ROOT
from compressor.config import Config
from compressor.frameworks.base import Job
from compressor.frameworks.torch_bench import TorchBench
from compressor.progress import SILENT

sys.path.insert(0, str(ROOT / "examples"))

from cifar_data import load_pretrained, make_loaders
from cifar_resnet import CifarAccuracy, CifarForwardPass, CifarLoss

SGD = {"name": "SGD", "lr": 0.02, "momentum": 0.9, "weight_decay": 5e-4, "nesterov": True}


def open_cifar_bench(
    arguments: argparse.Namespace,
    folder: Path,
    *,
    model: str,
    precision: str,
    techniques: Sequence[str] | None,
    quick_images: int,
) -> TorchBench:
    """The job, checked, with its reference judged.

    Args:
        arguments: with data, seed, quick, and epochs of each variant.
        folder: of the run.
        model: name of the ResNet.
        precision: of training.
        techniques: that may be used; None: all.
        quick_images: of each split in a smoke test.
    """
    loaders = make_loaders(arguments.data)
    if arguments.quick:
        for loader in loaders.values():
            loader.images = loader.images[:quick_images]
            loader.labels = loader.labels[:quick_images]
    config = {
        "delta": 1.0,
        "optimization": "macs",
        "techniques": techniques,
        "eval_key": "accuracy",
        "device": "CPU",
        "precision": precision,
        "seed": arguments.seed,
        "fine_tuner": {"optimizer": SGD, "epochs": arguments.epochs},
        "full_trainer": {"optimizer": SGD, "epochs": arguments.epochs},
    }
    job = Job(
        data=loaders,
        model=load_pretrained(arguments.data, model),
        config=Config.from_dict(config),
        forward_pass=CifarForwardPass(),
        eval_func=CifarAccuracy(),
        loss_function_cls=CifarLoss,
        loss_function_kwargs={},
    )
    bench = TorchBench(job, folder, SILENT)
    bench.check()
    bench.use_baseline(bench.baseline())
    return bench
