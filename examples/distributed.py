"""One script for one process, for several of torchrun, and for several of horovodrun.

Nothing in it speaks of processes but the last line of `main`: rank 0 leads, all train together,
all return the same model. The batches below are those of all ranks of torchrun together; with
Horovod every rank takes batches of its own, and the learning rate grows with their number.

python examples/distributed.py
torchrun --nproc_per_node 2 examples/distributed.py
horovodrun -np 2 --gloo python examples/distributed.py --horovod
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from digits_data import DigitsNet, make_loaders, train

from compressor import Engine, Result, TorchFramework
from compressor.distributed.launch import is_main_process
from compressor.report.console import render


def main(argv: Sequence[str] | None = None) -> Result:
    arguments = parse_arguments(argv)
    torch.manual_seed(arguments.seed)
    is_quick = arguments.quick
    data = make_loaders()
    # Every rank needs the same reference: one of the same seed, or one read from a file.
    reference = train(
        DigitsNet(16 if is_quick else 64), data["train"], epochs=4 if is_quick else 15
    )
    engine = Engine(
        framework=TorchFramework(),
        data=data,
        model=reference,
        config={
            "delta": arguments.delta,
            "optimization": "compression",
            "techniques": ["channel_pruning"] if is_quick else ["channel_pruning", "quantization"],
            "device": arguments.device,
            "use_horovod": arguments.horovod,
            "budget": {"trials": 1 if is_quick else 4},
            "full_trainer": {
                "optimizer": {"name": "SGD", "lr": 0.05, "momentum": 0.9, "nesterov": True},
                "epochs": 2 if is_quick else 15,
            },
            "fine_tuner": {"loop_params": {"epochs": 1 if is_quick else 4}},
            "export": {"formats": ["onnx"]},
            "run_dir": str(arguments.run_dir),
            "seed": arguments.seed,
        },
    )
    engine.run()
    if is_main_process():
        render(engine.result)
    return engine.result


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--horovod", action="store_true", help="the processes are of horovodrun")
    parser.add_argument("--device", choices=["cpu", "gpu"], default="cpu")
    parser.add_argument("--delta", type=float, default=1.0, help="points of accuracy to give up")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--run-dir", type=Path, default=Path("runs", "distributed"))
    parser.add_argument("--quick", action="store_true", help="a small network, one trial")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
