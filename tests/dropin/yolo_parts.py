"""What the scripts for the detector on a grid share: its loss, its evaluation, its optimizer."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from zoo import (
    DIGIT,
    KINDS,
    TinyYOLO,
    downloaded,
    grid_splits,
    mean_average_precision,
    pretrained,
)

from compressor import Device, LossFunction, NativeOptimizerFactory, TorchEvaluationFunction


class YOLOLoss(LossFunction):
    """Of the list that the model returns in training; shape (1,)."""

    def __init__(self, num_classes: int, img_size: int) -> None:
        self.num_classes = num_classes
        self.img_size = img_size

    def __call__(self, model: Any, batch: Any) -> Any:
        images, targets, _, _ = batch
        if self.device == Device.GPU:
            images, targets = images.cuda(), targets.cuda()
        total = torch.zeros(1, device=images.device)
        for raw in model(images):
            cells = raw.shape[1]
            at = (targets[:, 2:4] * cells).long()
            cell = (targets[:, 0].long(), at[:, 1], at[:, 0])
            objects = torch.zeros(raw.shape[:3], device=raw.device)
            objects[cell] = 1.0
            mine = raw[cell]
            boxes = torch.cat([targets[:, 2:4] * cells - at, targets[:, 4:6]], 1)
            total = total + F.binary_cross_entropy_with_logits(raw[..., 4], objects)
            total = total + F.cross_entropy(mine[:, 5:], targets[:, 1].long())
            total = total + F.mse_loss(mine[:, :4].sigmoid(), boxes)
        return total


class YOLOEval(TorchEvaluationFunction):
    """mAP and recall; the evaluated model returns decoded boxes first."""

    def __init__(self, threshold: float = 0.3) -> None:
        self.threshold = threshold

    def _compute_inference(self, model: Any, data_loader: Any, **kwargs: Any) -> Any:
        found: list[Any] = []
        truth: list[Any] = []
        first = 0
        for images, targets, _, _ in data_loader.native_dl:
            decoded, _ = model(images.to(next(model.parameters()).device))
            for number, rows in enumerate(decoded.cpu()):
                scores, kinds = (rows[:, 4:5] * rows[:, 5:]).max(1)
                for score, kind, (x, y, w, h) in zip(scores, kinds, rows[:, :4], strict=True):
                    if score > self.threshold:
                        box = torch.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2])
                        found.append((first + number, int(kind), float(score), box))
            for number, kind, x, y, *_ in targets.tolist():
                left, top = 2 * DIGIT * x - DIGIT / 2, 2 * DIGIT * y - DIGIT / 2
                box = torch.tensor([left, top, left + DIGIT, top + DIGIT])
                truth.append((first + int(number), int(kind), box))
            first += len(images)
        return {
            "recall": min(len(found) / len(truth), 1.0),
            "mAP": mean_average_precision(found, truth, KINDS),
        }


@downloaded
def pretrained_yolo(num_classes: int, img_size: int) -> nn.Module:
    """The detector as a user finds it."""
    torch.manual_seed(0)
    loss = YOLOLoss(num_classes, img_size)
    model = TinyYOLO(num_classes, img_size)
    return pretrained(model, grid_splits(batch_size=32)["train"], loss, epochs=10)


def eval_nothing(model: Any, data_splits: Any, device: Any = None) -> Any:
    """For dry runs."""
    return {"mAP": 1.0, "recall": 1.0}


class YOLONativeOptimizerFactory(NativeOptimizerFactory):
    """SGD whose decay is for the weights of convolutions alone."""

    def __init__(self, lr: float) -> None:
        self.lr = lr

    def make(self, native_model: nn.Module) -> torch.optim.Optimizer:
        decayed = [p for p in native_model.parameters() if p.dim() > 1]
        others = [p for p in native_model.parameters() if p.dim() <= 1]
        optimizer = torch.optim.SGD(others, lr=self.lr, momentum=0.9, nesterov=True)
        optimizer.add_param_group({"params": decayed, "weight_decay": 5e-4})
        return optimizer
