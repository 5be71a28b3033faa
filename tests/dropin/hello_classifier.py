"""Classification with the keys of 2023: defaults for forward pass, loss and evaluation."""

import argparse

from zoo import digit_net, digit_splits

from compressor import Engine, TorchFramework

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("-b", "--batch_size", type=int, default=64)
    parser.add_argument("-d", "--delta", type=float, default=1)
    parser.add_argument("-l", "--level", type=int, default=1, choices=(1, 2))
    parser.add_argument(
        "-o",
        "--optimization",
        default="compression",
        choices=("compression", "latency", "quantization"),
    )
    parser.add_argument("--deepsearch", action="store_true")
    parser.add_argument("--fp16", action="store_true")
    parser.add_argument("--dryrun", action="store_true")
    parser.add_argument("--horovod", action="store_true")
    parser.add_argument("--device", default="GPU", choices=("GPU", "CPU"))
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--ft_lr", type=float, default=0.01)
    parser.add_argument("--ft_epochs", type=int, default=1)
    args = parser.parse_args()

    data_splits = digit_splits(args.batch_size)
    reference_model = digit_net()
    framework = TorchFramework()

    config = {
        "deepsearch": args.deepsearch,
        "delta": args.delta,
        "device": args.device,
        "use_horovod": args.horovod,
        "level": args.level,
        "optimization": args.optimization,
        "export": {
            "format": "onnx",
            "kwargs": {"precision": "fp16" if args.fp16 else "fp32"},
        },
        "full_trainer": {
            "epochs": 2,
            "optimizer": {"name": "SGD", "lr": args.lr, "momentum": 0.9, "weight_decay": 5e-4},
            "scheduler": {
                "factory": {"name": "MultiStepLR", "milestones": [1], "gamma": 0.1},
                "triggers": {"after_epoch": True},
                "eval_based": False,
            },
        },
        "fine_tuner": {
            "loop_params": {
                "epochs": args.ft_epochs,
                "optimizer": {"name": "SGD", "lr": args.ft_lr},
            }
        },
    }

    optimized_model = Engine(
        framework=framework, data=data_splits, model=reference_model, config=config
    ).run(dryrun=args.dryrun)
