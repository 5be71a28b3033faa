"""Train a torchvision SSD to find digits in scenes, then compress it within two points of mAP.

The scenes are composed of scikit-learn's real digits. Batches are lists of images and of targets,
the loss is a dict, and the metric is torchmetrics' mean average precision. What is compressed and
deployed is the network, backbone and heads, whose outputs have fixed shapes; boxes are made of them
and thinned out by torchvision's own code, for the file as for the model.

python examples/detection.py
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from digit_scenes import CLASSES, SIZE, make_scenes
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics.detection import MeanAveragePrecision
from torchvision.models.detection.anchor_utils import DefaultBoxGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.ssd import SSD, SSDHead
from torchvision.ops import box_iou

from compressor import (
    Device,
    Engine,
    LossFunction,
    TorchEvaluationFunction,
    TorchForwardPass,
    TorchFramework,
)

Target = dict[str, Tensor]
Batch = tuple[Sequence[Tensor], Sequence[Target]]
STRIDE = 4  # of the backbone
BOX_SCALES = [0.3, 0.36]  # of the canvas: about a digit's height


class Block(nn.Module):
    """Two convolutions beside a shortcut."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(x + self.bn2(self.conv2(out)))


def make_backbone(width: int, blocks: int = 3) -> nn.Sequential:
    """(N, 1, H, W) to (N, 2 * width, H / 4, W / 4)."""
    return nn.Sequential(
        nn.Conv2d(1, width, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        Block(width),
        nn.Conv2d(width, 2 * width, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(2 * width),
        nn.ReLU(),
        *[Block(2 * width) for _ in range(blocks)],
    )


def make_ssd(width: int) -> SSD:
    """The detector of torchvision with one level of features."""
    boxes = DefaultBoxGenerator([[2]], scales=BOX_SCALES, steps=[STRIDE])
    head = SSDHead([2 * width], boxes.num_anchors_per_location(), CLASSES)
    return SSD(
        make_backbone(width),
        boxes,
        (SIZE, SIZE),
        CLASSES,
        image_mean=[0.0],
        image_std=[1.0],
        head=head,
        score_thresh=0.05,
        detections_per_img=20,
    )


class Network(nn.Module):
    """The part that computes: what is in each of the boxes, and how it is to be moved."""

    def __init__(self, ssd: SSD) -> None:
        super().__init__()
        self.backbone, self.head = ssd.backbone, ssd.head

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """(N, 1, SIZE, SIZE) to offsets (N, boxes, 4) and class scores (N, boxes, CLASSES)."""
        return self.head([self.backbone(images)])


def default_boxes(ssd: SSD) -> Tensor:
    """(boxes, 4), the same for all images."""
    image = ImageList(torch.zeros(1, 1, SIZE, SIZE), [(SIZE, SIZE)])
    features = torch.zeros(1, 1, SIZE // STRIDE, SIZE // STRIDE)
    return ssd.anchor_generator(image, [features])[0]


class ListForwardPass(TorchForwardPass):
    """Images come as a list; the network takes them stacked."""

    def extract_model_inputs(self, batch: Batch) -> Tensor:
        images, _ = batch
        return torch.stack(list(images))


class DetectionLoss(LossFunction):
    """The two losses of an SSD, by name, computed by torchvision."""

    def __init__(self, ssd: SSD, device: Device = Device.CPU) -> None:
        super().__init__(device)
        self.ssd, self.boxes = ssd, default_boxes(ssd)

    def __call__(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        device = self.device.torch_device
        images, targets = batch
        targets = [{key: value.to(device) for key, value in each.items()} for each in targets]
        boxes = self.boxes.to(device)
        outputs = model(torch.stack(list(images)).to(device))
        matches = [self.ssd.proposal_matcher(box_iou(target["boxes"], boxes)) for target in targets]
        return self.ssd.compute_loss(targets, outputs, [boxes] * len(targets), matches)


class Precision(TorchEvaluationFunction):
    """Mean average precision in percent, over overlaps of 0.5 to 0.95."""

    def __init__(self, ssd: SSD) -> None:
        self.ssd, self.boxes = ssd, default_boxes(ssd)

    def _compute_inference(
        self, model: nn.Module, data_loader: Iterable[Batch], device: Device
    ) -> dict[str, float]:
        metric = MeanAveragePrecision(backend="pycocotools")
        for images, targets in data_loader:
            outputs = model(torch.stack(list(images)).to(device.torch_device))
            outputs = {key: value.cpu() for key, value in outputs.items()}
            sizes = [(SIZE, SIZE)] * len(images)
            boxes = [self.boxes] * len(images)
            found = self.ssd.postprocess_detections(outputs, boxes, sizes)
            metric.update(found, list(targets))
        return {"mAP": 100 * float(metric.compute()["map"])}


def make_loader(count: int, split: str, batch_size: int) -> DataLoader[Batch]:
    scenes = make_scenes(count, split)
    targets = [
        {"boxes": boxes, "labels": labels}
        for boxes, labels in zip(scenes.boxes, scenes.labels, strict=True)
    ]
    samples = list(zip(scenes.images, targets, strict=True))
    return DataLoader(samples, batch_size, shuffle=split == "train", collate_fn=as_lists)


def as_lists(samples: list[tuple[Tensor, Target]]) -> Batch:
    images, targets = zip(*samples, strict=True)
    return list(images), list(targets)


def train(model: nn.Module, loss: DetectionLoss, loader: DataLoader[Batch], epochs: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters())
    steps = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, epochs * len(loader))
    model.train()
    for _ in range(epochs):
        for batch in loader:
            optimizer.zero_grad()
            sum(loss(model, batch).values()).backward()
            optimizer.step()
            steps.step()
    model.eval()


def main() -> None:
    arguments = parse_arguments()
    quick = arguments.quick
    torch.manual_seed(arguments.seed)
    ssd = make_ssd(width=16 if quick else 32)
    model = Network(ssd)
    train_count, test_count = (48, 16) if quick else (1000, 200)
    loaders = {
        "train": make_loader(train_count, "train", batch_size=32),
        "test": make_loader(test_count, "test", batch_size=64),
    }
    train(model, DetectionLoss(ssd), loaders["train"], epochs=24 if quick else 15)
    adam = {"name": "AdamW", "lr": 1e-3}
    engine = Engine(
        framework=TorchFramework(),
        data=loaders,
        model=model,
        config={
            "task_type": "object_detection",
            "delta": 15.0 if quick else 2.0,  # points of mAP, which is in percent
            "eval_key": "mAP",
            "optimization": "latency",
            "budget": {"trials": 1} if quick else {"minutes": arguments.minutes},
            "full_trainer": {"optimizer": adam, "epochs": 1 if quick else 15},
            "fine_tuner": {"loop_params": {"optimizer": adam, "epochs": 1 if quick else 3}},
            "techniques": ["block_removal", "quantization"] if quick else None,
            "run_dir": str(arguments.run_dir),
            "seed": arguments.seed,
        },
        forward_pass=ListForwardPass(),
        eval_func=Precision(ssd),
        loss_function_cls=DetectionLoss,
        loss_function_kwargs={"ssd": ssd},
    )
    engine.run()
    print(engine.result)
    print(f"The file to deploy: {engine.result.artifacts['onnx']}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=6.0, help="how long to search")
    parser.add_argument("--run-dir", type=Path, default=Path("runs", "detection"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="try every step in seconds")
    return parser.parse_args()


if __name__ == "__main__":
    main()
