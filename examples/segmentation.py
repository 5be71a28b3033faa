"""Train a small U-Net to find and name digits in scenes, then compress it within a point of mIoU.

The scenes are composed of scikit-learn's real digits. It shows a task other than classification:
a loss and a metric of one's own, a model with skip connections that `cat` joins, and a file for
ONNX Runtime whose mean intersection over union is certified.

python examples/segmentation.py
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from digit_scenes import CLASSES, Scenes, make_scenes
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassJaccardIndex

from compressor import (
    Device,
    Engine,
    LossFunction,
    TorchEvaluationFunction,
    TorchForwardPass,
    TorchFramework,
)

Batch = tuple[Tensor, Tensor]
BACKGROUND_WEIGHT = 0.2  # most pixels are background


class UNet(nn.Module):
    """Three levels; what the first two saw is joined to what is scaled up again."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.first = make_stage(1, width)
        self.second = make_stage(width, 2 * width)
        self.bottom = make_stage(2 * width, 4 * width)
        self.up_second = nn.ConvTranspose2d(4 * width, 2 * width, 2, stride=2)
        self.join_second = make_stage(4 * width, 2 * width)
        self.up_first = nn.ConvTranspose2d(2 * width, width, 2, stride=2)
        self.join_first = make_stage(2 * width, width)
        self.head = nn.Conv2d(width, CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 1, H, W), multiples of 4, to logits (N, CLASSES, H, W)."""
        first = self.first(x)
        second = self.second(F.max_pool2d(first, 2))
        x = self.bottom(F.max_pool2d(second, 2))
        x = self.join_second(torch.cat([self.up_second(x), second], dim=1))
        x = self.join_first(torch.cat([self.up_first(x), first], dim=1))
        return self.head(x)


def make_stage(in_channels: int, channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        nn.Conv2d(channels, channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
    )


class PixelLoss(LossFunction):
    """Cross entropy of every pixel."""

    def __call__(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        images, masks = (tensor.to(self.device.torch_device) for tensor in batch)
        weight = torch.ones(CLASSES, device=images.device)
        weight[0] = BACKGROUND_WEIGHT
        return {"cross_entropy": F.cross_entropy(model(images), masks, weight)}


class MeanIoU(TorchEvaluationFunction):
    """Intersection over union in percent, the mean of all classes."""

    def _compute_inference(
        self, model: nn.Module, data_loader: Iterable[Batch], device: Device
    ) -> dict[str, float]:
        metric = MulticlassJaccardIndex(CLASSES, validate_args=False)
        for images, masks in data_loader:
            metric.update(model(images.to(device.torch_device)).cpu().argmax(dim=1), masks)
        return {"mIoU": 100 * float(metric.compute())}


def make_loaders(train_count: int, test_count: int) -> dict[str, DataLoader[Batch]]:
    def pairs(scenes: Scenes) -> TensorDataset:
        return TensorDataset(scenes.images, scenes.masks)

    return {
        "train": DataLoader(pairs(make_scenes(train_count, "train")), 32, shuffle=True),
        "test": DataLoader(pairs(make_scenes(test_count, "test")), 64),
    }


def train(model: nn.Module, loader: DataLoader[Batch], epochs: int, lr: float = 3e-3) -> None:
    loss = PixelLoss()
    optimizer = torch.optim.AdamW(model.parameters(), lr)
    steps = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, epochs * len(loader))
    model.train()
    for _ in range(epochs):
        for batch in loader:
            optimizer.zero_grad()
            loss(model, batch)["cross_entropy"].backward()
            optimizer.step()
            steps.step()
    model.eval()


def main() -> None:
    arguments = parse_arguments()
    quick = arguments.quick
    torch.manual_seed(arguments.seed)
    loaders = make_loaders(*((48, 16) if quick else (1000, 200)))
    model = UNet(width=8 if quick else 16)
    train(model, loaders["train"], epochs=12)
    adam = {"name": "AdamW", "lr": 1e-3}
    engine = Engine(
        framework=TorchFramework(),
        data=loaders,
        model=model,
        config={
            "task_type": "segmentation",
            "delta": 1.0,  # a point of mIoU, which is in percent
            "eval_key": "mIoU",
            "optimization": "latency",
            "budget": {"trials": 1} if quick else {"minutes": arguments.minutes},
            "full_trainer": {"optimizer": adam, "epochs": 1 if quick else 15},
            "fine_tuner": {"loop_params": {"optimizer": adam, "epochs": 1 if quick else 3}},
            "techniques": ["channel_pruning", "quantization"] if quick else None,
            "run_dir": str(arguments.run_dir),
            "seed": arguments.seed,
        },
        forward_pass=TorchForwardPass(model_input_pattern=(0, "_")),
        eval_func=MeanIoU(),
        loss_function_cls=PixelLoss,
    )
    engine.run()
    print(engine.result)
    print(f"The file to deploy: {engine.result.artifacts['onnx']}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=6.0, help="how long to search")
    parser.add_argument("--run-dir", type=Path, default=Path("runs", "segmentation"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="try every step in seconds")
    return parser.parse_args()


if __name__ == "__main__":
    main()
