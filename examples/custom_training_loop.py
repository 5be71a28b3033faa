"""A training loop of one's own in place of the built-in trainer.

You have a training function that you trust: of any form, with its own augmentation, schedule and
optimizer. `ExternalTrainingLoop` hands it each pruned model and the settings it wants, a copy for
each call, with the epochs of a short fine-tuning or of a full one. The engine does the rest. What
your loop does not do (distillation, training through the rounding of int8) is then not done.

python examples/custom_training_loop.py
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from digits_data import Batch, DigitsNet, make_loaders
from torch import Tensor, nn

from compressor import Engine, ExternalTrainingLoop, Result, TorchFramework
from compressor.report.console import render


@dataclass
class Settings:
    """What the loop is told. `epochs` and `validation` are the names that the engine looks for."""

    epochs: int
    lr: float = 0.05
    smoothing: float = 0.1
    validation: bool = True


class DigitsLoop(ExternalTrainingLoop):
    """SGD with one cycle of the learning rate, on images moved by a pixel, with smoothed labels."""

    def __init__(
        self, train: Iterable[Batch], test: Iterable[Batch], settings: Settings, tuning_epochs: int
    ) -> None:
        super().__init__(self.fit, settings)
        self.train_loader, self.test_loader = train, test
        self.tuning_epochs = tuning_epochs

    def modify_args_for_finetuning(self, args: Settings) -> Settings:
        """For each candidate: few epochs at a lower rate."""
        args.epochs, args.lr = self.tuning_epochs, args.lr / 5
        return args

    def fit(self, model: nn.Module, settings: Settings) -> nn.Module:
        optimizer = torch.optim.SGD(model.parameters(), settings.lr, momentum=0.9, nesterov=True)
        steps = settings.epochs * len(self.train_loader)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, settings.lr, total_steps=steps)
        model.train()
        for _ in range(settings.epochs):
            for images, labels in self.train_loader:
                logits = model(moved(images))
                optimizer.zero_grad()
                F.cross_entropy(logits, labels, label_smoothing=settings.smoothing).backward()
                optimizer.step()
                schedule.step()
        model.eval()
        if settings.validation:
            print(f"accuracy after {settings.epochs} epochs: {self.accuracy(model):.2f} %")
        return model

    @torch.no_grad()
    def accuracy(self, model: nn.Module) -> float:
        right = [model(images).argmax(1) == labels for images, labels in self.test_loader]
        return 100 * torch.cat(right).float().mean().item()


def moved(images: Tensor) -> Tensor:
    """The whole batch (N, 1, 8, 8) by up to a pixel, at random; what enters is background."""
    row, column = torch.randint(0, 3, (2,)).tolist()
    return F.pad(images, (1, 1, 1, 1), value=-1.0)[:, :, row : row + 8, column : column + 8]


def main(argv: Sequence[str] | None = None) -> Result:
    arguments = parse_arguments(argv)
    torch.manual_seed(arguments.seed)
    is_quick = arguments.quick
    data = make_loaders()
    settings = Settings(epochs=4 if is_quick else 20)
    loop = DigitsLoop(data["train"], data["test"], settings, tuning_epochs=1 if is_quick else 5)
    engine = Engine(
        framework=TorchFramework(),
        data=data,
        model=loop.train(DigitsNet(16 if is_quick else 64)),
        config={
            "delta": arguments.delta,
            "optimization": "macs",
            "techniques": ["channel_pruning"] if is_quick else None,
            "external_training_loop": loop,
            "device": "CPU",
            "budget": {"trials": 1 if is_quick else 4},
            "full_trainer": {"epochs": settings.epochs},
            "fine_tuner": {"loop_params": {"epochs": loop.tuning_epochs}},
            "export": {"formats": ["onnx"]},
            "run_dir": str(arguments.run_dir),
            "seed": arguments.seed,
        },
    )
    engine.run()
    render(engine.result)
    return engine.result


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--delta", type=float, default=1.0, help="points of accuracy to give up")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--run-dir", type=Path, default=Path("runs", "custom-training-loop"))
    parser.add_argument("--quick", action="store_true", help="a small network, one trial")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
