"""Detection with priors: batches of four, a loss of two terms, an evaluation on `native_dl`."""

import argparse

import torch
import torch.nn.functional as F
from zoo import DIGIT, KINDS, TinySSD, make_priors, mean_average_precision, pretrained, scene_splits

from compressor import (
    Device,
    Engine,
    LossFunction,
    TorchEvaluationFunction,
    TorchForwardPass,
    TorchFramework,
)
from compressor.logs import get_logger as getLogger

logger = getLogger(__name__)


class SSDLoss(LossFunction):
    def __init__(self, priors, scale):
        self.priors = priors
        self.scale = scale

    def __call__(self, model, batch):
        images, boxes, labels, _ = batch
        if self.device == Device.GPU:
            images, boxes, labels = images.cuda(), boxes.cuda(), labels.cuda()
        confidence, locations = model(images)
        offsets = (boxes[:, :1, :2] + DIGIT / 2 - self.priors.to(boxes.device)) / self.scale
        nearest = offsets.square().sum(2).argmin(1)
        rows = torch.arange(len(images))
        wanted = torch.zeros(confidence.shape[:2], dtype=torch.long, device=labels.device)
        wanted[rows, nearest] = labels[:, 0]
        weight = torch.tensor([0.2] + KINDS * [1.0], device=labels.device)
        return {
            "regression_loss": F.smooth_l1_loss(locations[rows, nearest], offsets[rows, nearest]),
            "classification_loss": F.cross_entropy(confidence.transpose(1, 2), wanted, weight),
        }


class SSDEval(TorchEvaluationFunction):
    def __init__(self, priors, scale):
        self.priors = priors
        self.scale = scale

    def _compute_inference(self, model, data_loader, **kwargs):
        found, truth = [], []
        for images, boxes, labels, _ in data_loader.native_dl:
            device = next(model.parameters()).device
            confidence, locations = (each.cpu() for each in model(images.to(device)))
            scores, kinds = confidence.softmax(2)[..., 1:].max(2)
            best = scores.argmax(1)
            rows = torch.arange(len(images))
            corners = self.priors[best] + locations[rows, best] * self.scale - DIGIT / 2
            for i in range(len(images)):
                box = torch.cat([corners[i], corners[i] + DIGIT])
                scene = len(truth)
                found.append((scene, int(kinds[i, best[i]]), float(scores[i, best[i]]), box))
                truth.append((scene, int(labels[i, 0]) - 1, boxes[i, 0]))
        logger.info("%d scenes", len(truth))
        return {"mAP": mean_average_precision(found, truth, KINDS)}


def eval_nothing(model, data_splits):
    return {"mAP": 1}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("-d", "--delta", type=float, default=0.05)
    parser.add_argument("-l", "--level", type=int, default=1)
    parser.add_argument("--deepsearch", action="store_true")
    parser.add_argument("--dryrun", action="store_true")
    parser.add_argument("--horovod", action="store_true")
    parser.add_argument("--device", default="GPU", choices=("GPU", "CPU"))
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--ft_lr", type=float, default=0.01)
    parser.add_argument("--ft_epochs", type=int, default=1)
    args = parser.parse_args()

    data_splits = scene_splits(batch_size=32)
    priors = make_priors()
    loss_cls, loss_kwargs = SSDLoss, {"priors": priors, "scale": 4.0}
    torch.manual_seed(0)
    reference_model = pretrained(TinySSD(), data_splits["train"], SSDLoss(priors, 4.0), epochs=8)
    eval_func = eval_nothing if args.dryrun else SSDEval(priors, 4.0)
    forward_pass = TorchForwardPass(model_input_pattern=(0, "_", "_", "_"))

    config = {
        "task_type": "object_detection",
        "deepsearch": args.deepsearch,
        "delta": args.delta,
        "level": args.level,
        "device": args.device,
        "use_horovod": args.horovod,
        "export": {"format": ["onnx"]},
        "full_trainer": {
            "optimizer": {"name": "SGD", "lr": args.lr, "momentum": 0.9, "weight_decay": 5e-4},
            "epochs": 1,
        },
        "fine_tuner": {
            "loop_params": {
                "epochs": args.ft_epochs,
                "loop_test": args.dryrun,
                "optimizer": {"lr": args.ft_lr},
            }
        },
    }
    optimized_model = Engine(
        TorchFramework(),
        data=data_splits,
        model=reference_model,
        config=config,
        eval_func=eval_func,
        forward_pass=forward_pass,
        loss_function_cls=loss_cls,
        loss_function_kwargs=loss_kwargs,
    ).run(dryrun=args.dryrun)
