"""Classification with the keys of 2021: a forward pass, loss and evaluation of the user's own."""

import argparse

import torch
import torch.nn.functional as F
from zoo import digit_net, digit_splits

from compressor import Device, Engine, LossFunction, TorchEvaluationFunction, TorchFramework
from compressor import TorchForwardPass as FP


class ClassificationLoss(LossFunction):
    def __init__(self, label_smoothing=0.0, device=Device.CPU):
        super().__init__(device)
        self.label_smoothing = label_smoothing

    def __call__(self, model, batch):
        x, y = batch
        if self.device == Device.GPU:
            x, y = x.cuda(), y.cuda()
        else:
            x, y = x.cpu(), y.cpu()
        return {"loss": F.cross_entropy(model(x), y, label_smoothing=self.label_smoothing)}


class EvalAccuracy(TorchEvaluationFunction):
    def __init__(self, device="cuda"):
        self.device = device

    def _compute_inference(self, model, data_loader, **kwargs):
        total_acc = 0
        for x, y in data_loader:
            if self.device == "cuda":
                x, y = x.cuda(), y.cuda()
            out = F.softmax(model(x), dim=-1).argmax(dim=1)
            total_acc += torch.mean((out == y).float()).cpu().item()
        return {"mykey": 100.0 * (total_acc / float(len(data_loader))), "batches": len(data_loader)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--delta", type=float, default=1)
    parser.add_argument("--level", type=int, default=3)
    parser.add_argument("--deepsearch", action="store_true")
    parser.add_argument("--dryrun", action="store_true")
    parser.add_argument("--horovod", action="store_true")
    parser.add_argument("--device", default="GPU", choices=("GPU", "CPU"))
    parser.add_argument("--bn_fuse", action="store_true")
    args = parser.parse_args()

    data_splits = digit_splits(batch_size=64)
    reference_model = digit_net()
    forward_pass = FP(model_input_pattern=(0, "_"))
    eval_func = EvalAccuracy(device="cuda" if args.device == "GPU" else "cpu")
    config = {
        "deepsearch": args.deepsearch,
        "level": args.level,
        "delta": args.delta,
        "device": args.device,
        "use_horovod": args.horovod,
        "onnx_precision": "fp16",
        "full_trainer": {
            "optimizer": {"name": "SGD", "lr": 0.1},
            "scheduler": {
                "factory": {"name": "ReduceLROnPlateau", "mode": "max", "patience": 1},
                "eval_based": True,
            },
            "epochs": 2,
            "eval_freq": 1,
            "eval_key": "mykey",
            "eval_split": "test",
        },
    }
    if args.bn_fuse:
        config["bn_fusion"] = True
    engine = Engine(
        framework=TorchFramework(),
        data=data_splits,
        model=reference_model,
        config=config,
        forward_pass=forward_pass,
        eval_func=eval_func,
        loss_function_cls=ClassificationLoss,
        loss_function_kwargs={"label_smoothing": 0.1},
    )
    optimized_model = engine.run(dryrun=args.dryrun)
