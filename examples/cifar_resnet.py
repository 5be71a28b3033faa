"""Compress a pretrained CIFAR ResNet within one point of accuracy, for the lowest latency.

python examples/cifar_resnet.py --data DIR --model resnet56 --minutes 30

On several GPUs, or as several processes of the CPU:
torchrun --nproc_per_node 2 examples/cifar_resnet.py --data DIR --model resnet56 --minutes 30
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from cifar_data import load_pretrained, make_loaders
from cifar_resnet_model import DEPTHS
from torch import Tensor, nn

from compressor import (
    Device,
    Engine,
    EvaluationFunction,
    ForwardPass,
    LossFunction,
    TorchFramework,
)
from compressor.distributed.launch import is_main_process

Batch = tuple[Tensor, Tensor]


class CifarForwardPass(ForwardPass):
    """How a batch of these loaders goes through the model."""

    def __init__(self) -> None:
        super().__init__(model_input_pattern=None, expecting_common_inputs=False)

    def extract_model_inputs(self, batch: Batch) -> Tensor:
        images, _ = batch
        return images

    def model_call(self, model: nn.Module, x: Tensor, device: Device) -> Tensor:
        return model(x.cuda() if device == Device.GPU else x.cpu())

    def create_random_model_inputs(self, batch_size: int) -> Tensor:
        (shape,) = self.get_model_input_shapes()
        return torch.randn(batch_size, *shape)

    def get_model_input_shapes(self) -> tuple[tuple[int, ...], ...]:
        return ((3, 32, 32),)


class CifarLoss(LossFunction):
    """Cross entropy."""

    def __call__(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        images, labels = batch
        if self.device == Device.GPU:
            images, labels = images.cuda(), labels.cuda()
        return {"cross_entropy": F.cross_entropy(model(images), labels)}


class CifarAccuracy(EvaluationFunction):
    """Top-1 accuracy in percent, of a model that may be on any device."""

    @torch.no_grad()
    def apply(self, model: nn.Module, data_loader: Iterable[Batch]) -> dict[str, float]:
        device = next(model.parameters()).device
        model.eval()
        correct = count = 0
        for images, labels in data_loader:
            guesses = model(images.to(device)).argmax(dim=1)
            correct += int((guesses == labels.to(device)).sum())
            count += len(labels)
        return {"accuracy": 100 * correct / count}


def main() -> None:
    arguments = parse_arguments()
    torch.manual_seed(arguments.seed)
    on_gpu = arguments.device == "gpu"
    sgd = {"name": "SGD", "lr": 0.02, "momentum": 0.9, "weight_decay": 5e-4, "nesterov": True}
    engine = Engine(
        framework=TorchFramework(),
        data=make_loaders(arguments.data, jpeg=arguments.jpeg),
        model=load_pretrained(arguments.data, arguments.model),
        config={
            "delta": arguments.delta,
            "optimization": arguments.optimization,
            "device": arguments.device,
            "eval_key": "accuracy",
            "target": {
                "runtime": "eager" if on_gpu else "onnxruntime",
                "device": "cuda" if on_gpu else "cpu",
                "threads": arguments.threads,
                "batch_size": arguments.batch_size,
            },
            "budget": {"minutes": arguments.minutes},
            "full_trainer": {"optimizer": sgd, "epochs": arguments.epochs},
            "fine_tuner": {"loop_params": {"optimizer": sgd, "epochs": arguments.fine_tune_epochs}},
            "run_dir": str(arguments.run_dir or Path("runs", f"cifar-{arguments.model}")),
            "seed": arguments.seed,
            "precision": arguments.precision,
        },
        forward_pass=CifarForwardPass(),
        eval_func=CifarAccuracy(),
        loss_function_cls=CifarLoss,
        loss_function_kwargs={},
    )
    engine.run()
    if is_main_process():  # under torchrun all have the result
        report(engine)


def report(engine: Engine) -> None:
    certificate = engine.result.certificate
    print(f"accuracy      {certificate.reference_metric:.2f} -> {certificate.metric:.2f} %")
    print(f"within delta  {certificate.within_delta} (delta {certificate.delta})")
    print(f"latency       {certificate.latency_ms:.3f} ms, {certificate.latency_ratio:.2f}x less")
    print(f"size          {certificate.size_bytes:,} bytes, {certificate.size_ratio:.2f}x less")
    for name, path in engine.result.artifacts.items():
        print(f"{name:<20}{path}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the images and weights")
    parser.add_argument("--model", choices=DEPTHS, default="resnet20")
    parser.add_argument("--delta", type=float, default=1.0, help="points of accuracy to give up")
    parser.add_argument(
        "--optimization", choices=["latency", "compression", "macs"], default="latency"
    )
    parser.add_argument("--minutes", type=float, default=30.0, help="how long to search")
    parser.add_argument("--epochs", type=int, default=30, help="of the last fine-tuning")
    parser.add_argument("--fine-tune-epochs", type=int, default=3, help="of each candidate")
    parser.add_argument("--batch-size", type=int, default=1, help="of the latency")
    parser.add_argument("--threads", type=int, default=1, help="of the latency")
    parser.add_argument("--device", choices=["cpu", "gpu"], default="cpu")
    parser.add_argument("--precision", choices=["auto", "fp32", "bf16"], default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--run-dir", type=Path, help="default: runs/cifar-<model>")
    parser.add_argument(
        "--jpeg", action="store_true", help="train on re-compressed images too, as many again"
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
