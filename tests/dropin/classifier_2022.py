"""Classification with the keys of 2022: `interval`, a list of formats, ready-made metrics."""

import argparse

from zoo import digit_net, digit_splits

from compressor import DefaultTorchNativeSchedulerFactory, Engine, TorchForwardPass, TorchFramework
from compressor.interfaces import get_topk

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("-d", "--delta", type=float, default=2)
    parser.add_argument("--dryrun", action="store_true")
    parser.add_argument("--device", default="GPU", choices=("GPU", "CPU"))
    parser.add_argument("--output", default="converted")
    args = parser.parse_args()

    data_splits = digit_splits(batch_size=64)
    reference_model = digit_net()
    eval_func = get_topk
    config = {
        "task_type": "classification",
        "optimization": "compression",
        "delta": args.delta,
        "level": 1,
        "device": args.device,
        "eval_key": "top-1",
        "eval_split": "test",
        "export": {
            "format": ["jit", "onnx"],
            "kwargs": {"root_path": args.output, "precision": "fp32", "resolutions": [(16, 24)]},
        },
        "full_trainer": {
            "epochs": 2,
            "eval_freq": 2,
            "optimizer": {"name": "Adam", "lr": 1e-3},
            "scheduler": {
                "factory": DefaultTorchNativeSchedulerFactory(
                    name="OneCycleLR", max_lr=1e-3, total_steps=200
                ),
                "interval": "iteration",
            },
            "early_stopping_patience": 5,
            "ema": {"decay_rate": 0.99, "period": 20},
        },
    }
    optimized_model = Engine(
        TorchFramework(),
        data_splits,
        reference_model,
        config,
        eval_func=eval_func,
        forward_pass=TorchForwardPass(model_input_pattern=(0, "_"), expecting_common_inputs=True),
    ).run(dryrun=args.dryrun)
