"""Segmentation: optimizer and scheduler from factories, one of them handed in as its class."""

import argparse

import torch
import torch.nn.functional as F
from zoo import KINDS, TinyUNet, mask_splits, pretrained

from compressor import (
    Engine,
    LossFunction,
    NativeOptimizerFactory,
    NativeSchedulerFactory,
    TorchEvaluationFunction,
    TorchForwardPass,
    TorchFramework,
)


class UNetLoss(LossFunction):
    def __init__(self, num_classes):
        self.num_classes = num_classes

    def __call__(self, model, batch):
        images, masks = batch
        logits = model(images)
        chosen = F.one_hot(masks, self.num_classes).movedim(3, 1)
        overlap = 2 * (logits.softmax(1) * chosen).sum() / (2 * masks.numel())
        weight = torch.tensor([0.2] + (self.num_classes - 1) * [1.0])
        return {"cross_entropy": F.cross_entropy(logits, masks, weight), "dice": 1 - overlap}


class UNetEval(TorchEvaluationFunction):
    def __init__(self, num_classes):
        self.num_classes = num_classes

    def _compute_inference(self, model, data_loader, **kwargs):
        confusion = torch.zeros(self.num_classes**2)
        for images, masks in data_loader.native_dl:
            guesses = model(images).argmax(1)
            pairs = (masks * self.num_classes + guesses).flatten()
            confusion += torch.bincount(pairs, minlength=len(confusion))
        confusion = confusion.reshape(self.num_classes, -1)
        both = confusion.diag()
        either = confusion.sum(0) + confusion.sum(1) - both
        return {
            "miou": float((both / either.clamp_min(1)).mean()),
            "dice_coeff": float(2 * both.sum() / (either + both).sum()),
        }


def eval_nothing(model, data_splits):
    return {"miou": 1.0, "dice_coeff": 1.0}


class UNetNativeOptimizerFactory(NativeOptimizerFactory):
    def __init__(self, lr):
        self.lr = lr

    def make(self, native_model):
        return torch.optim.RMSprop(
            native_model.parameters(), lr=self.lr, weight_decay=1e-8, momentum=0.9
        )


class UNetNativeSchedulerFactory(NativeSchedulerFactory):
    def make(self, native_optimizer):
        return torch.optim.lr_scheduler.ReduceLROnPlateau(native_optimizer, "max", patience=2)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("-d", "--delta", type=float, default=0.05)
    parser.add_argument("--eval_key", default="miou", choices=("miou", "dice_coeff"))
    parser.add_argument("--dryrun", action="store_true")
    parser.add_argument("--horovod", action="store_true")
    parser.add_argument("--fp16", action="store_true")
    parser.add_argument("--device", default="GPU", choices=("GPU", "CPU"))
    parser.add_argument("--lr", type=float, default=0.001)
    parser.add_argument("--ft_lr", type=float, default=0.001)
    parser.add_argument("--ft_epochs", type=int, default=1)
    args = parser.parse_args()

    data_splits = mask_splits(batch_size=32)
    torch.manual_seed(0)
    reference_model = pretrained(
        TinyUNet(), data_splits["train"], UNetLoss(KINDS + 1), epochs=5, lr=0.05
    )
    eval_func = eval_nothing if args.dryrun else UNetEval(KINDS + 1)
    config = {
        "task_type": "segmentation",
        "delta": args.delta,
        "level": 1,
        "device": args.device,
        "use_horovod": args.horovod,
        "export": {
            "format": ["onnx"],
            "kwargs": {"precision": "fp16" if args.fp16 else "fp32"},
        },
        "full_trainer": {
            "epochs": 1,
            "eval_key": args.eval_key,
            "optimizer": UNetNativeOptimizerFactory(lr=args.lr),
            "scheduler": {"factory": UNetNativeSchedulerFactory, "eval_based": True},
        },
        "fine_tuner": {
            "loop_params": {
                "epochs": args.ft_epochs,
                "optimizer": UNetNativeOptimizerFactory(lr=args.ft_lr),
            }
        },
    }
    optimized_model = Engine(
        TorchFramework(),
        data=data_splits,
        model=reference_model,
        config=config,
        eval_func=eval_func,
        forward_pass=TorchForwardPass(model_input_pattern=(0, "_")),
        loss_function_cls=UNetLoss,
        loss_function_kwargs={"num_classes": KINDS + 1},
    ).run(dryrun=args.dryrun)
