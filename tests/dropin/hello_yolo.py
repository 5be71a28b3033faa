"""Detection on a grid: loaders that know their classes, no `eval_key`, a loop of the user's own."""

import argparse

from external_training import YoloTrainingLoop, train
from yolo_parts import YOLOEval, YOLOLoss, YOLONativeOptimizerFactory, eval_nothing, pretrained_yolo
from zoo import grid_splits

from compressor import (
    DefaultTorchNativeSchedulerFactory,
    Engine,
    TorchForwardPass,
    TorchFramework,
)

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("-d", "--delta", type=float, default=0.02)
    parser.add_argument("-o", "--optimization", default="compression")
    parser.add_argument("--deepsearch", action="store_true")
    parser.add_argument("--dryrun", action="store_true")
    parser.add_argument("--horovod", action="store_true")
    parser.add_argument("--device", default="GPU", choices=("GPU", "CPU"))
    parser.add_argument("--external_training_loop", action="store_true")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--ft_epochs", type=int, default=1)
    parser.add_argument("--lr", type=float, default=0.02)
    args = parser.parse_args()

    data_splits = grid_splits(batch_size=32)
    num_classes = data_splits["train"].dataset.num_classes
    img_size = data_splits["train"].dataset._img_size
    loss_kwargs = {"num_classes": num_classes, "img_size": img_size}
    reference_model = pretrained_yolo(num_classes, img_size)
    eval_func = eval_nothing if args.dryrun else YOLOEval()
    config = {
        "task_type": "object_detection",
        "optimization": args.optimization,
        "delta": args.delta,
        "deepsearch": args.deepsearch,
        "device": args.device,
        "use_horovod": args.horovod,
        "full_trainer": {
            "epochs": args.epochs,
            "eval_freq": 2,
            "early_stopping_patience": 20,
            "loop_test": args.dryrun,
            "ema": True,
            "optimizer": YOLONativeOptimizerFactory(lr=args.lr),
            "scheduler": {
                "factory": DefaultTorchNativeSchedulerFactory(
                    name="CosineAnnealingLR", T_max=args.epochs
                ),
                "triggers": {"after_epoch": True},
                "eval_based": False,
            },
        },
        "fine_tuner": {
            "loop_params": {"epochs": args.ft_epochs, "loop_test": args.dryrun},
        },
    }
    if args.external_training_loop:
        own = argparse.Namespace(
            loader=data_splits["train"],
            compute_loss=YOLOLoss(**loss_kwargs),
            num_epochs=args.epochs,
            ft_epochs=args.ft_epochs,
            lr0=args.lr,
            noval=False,
        )
        config["external_training_loop"] = YoloTrainingLoop(train, own)
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
