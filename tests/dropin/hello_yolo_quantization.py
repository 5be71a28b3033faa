"""Few bits alone: which layers, as rules or by their names."""

import argparse

from yolo_parts import YOLOEval, YOLOLoss, YOLONativeOptimizerFactory, eval_nothing, pretrained_yolo
from zoo import grid_splits

from compressor import Engine, TorchForwardPass, TorchFramework

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("-d", "--delta", type=float, default=0.02)
    parser.add_argument("--dryrun", action="store_true")
    parser.add_argument("--device", default="GPU", choices=("GPU", "CPU"))
    parser.add_argument("--conv11", action="store_true")
    parser.add_argument("--skip_layers", nargs="*", default=None)
    parser.add_argument("--skip_layers_ratio", type=float, default=0.0)
    parser.add_argument("--layers", nargs="*", default=None, help="in two bits")
    args = parser.parse_args()

    data_splits = grid_splits(batch_size=32)
    loss_kwargs = {
        "num_classes": data_splits["train"].dataset.num_classes,
        "img_size": data_splits["train"].dataset._img_size,
    }
    reference_model = pretrained_yolo(*loss_kwargs.values())
    eval_func = eval_nothing if args.dryrun else YOLOEval()
    if args.layers:
        custom = {"layers": {name: {"precision": 2} for name in args.layers}}
    else:
        custom = {
            "quantization_args": {
                "quantize_conv11": args.conv11,
                "quantize_group": False,
                "skip_layers": args.skip_layers,
                "skip_layers_ratio": args.skip_layers_ratio,
            }
        }
    config = {
        "task_type": "object_detection",
        "optimization": "quantization",
        "delta": args.delta,
        "device": args.device,
        "export": {"format": ["dlrt"]},
        "custom_compression": custom,
        "full_trainer": {
            "epochs": 1,
            "eval_key": "mAP",
            "eval_skip": 1,
            "optimizer": YOLONativeOptimizerFactory(lr=0.01),
        },
    }
    optimized_model = Engine(
        TorchFramework(),
        data=data_splits,
        model=reference_model,
        config=config,
        eval_func=eval_func,
        forward_pass=TorchForwardPass(model_input_pattern=(0, "_", "_", "_")),
        loss_function_cls=YOLOLoss,
        loss_function_kwargs=loss_kwargs,
    ).run(dryrun=args.dryrun)
