"""Keys of several generations of scripts; each line is one that was published."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, MultiplicativeLR

from compressor.config import Config, QuantizationArgs, SchedulerConfig
from compressor.errors import ConfigError
from compressor.interfaces import DefaultTorchNativeSchedulerFactory, Device, NativeSchedulerFactory


class MySchedulerFactory(NativeSchedulerFactory):
    def make(self, native_optimizer: Optimizer) -> LRScheduler:
        return MultiplicativeLR(native_optimizer, lr_lambda=lambda epoch: 0.95)


def scheduler_of(**scheduler: Any) -> SchedulerConfig:
    config = Config.from_dict({"full_trainer": {"scheduler": scheduler}})
    assert config.full_trainer.scheduler is not None
    return config.full_trainer.scheduler


STEP = {"name": "StepLR", "step_size": 10}


@pytest.mark.parametrize(
    ("said", "interval"),
    [
        ({}, None),
        ({"eval_based": False}, "epoch"),
        ({"eval_based": True}, "eval"),
        ({"interval": "epoch"}, "epoch"),
        ({"interval": "iteration"}, "iteration"),
        ({"interval": "eval"}, "eval"),
        ({"triggers": {"after_epoch": True}, "eval_based": False}, "epoch"),
        ({"triggers": {"after_epoch": False, "after_eval": True}}, "eval"),
        ({"triggers": {"after_iteration": True}, "eval_based": False}, "iteration"),
        ({"interval": "iteration", "eval_based": False}, "iteration"),
    ],
)
def test_when_a_scheduler_steps(said: dict[str, Any], interval: str | None) -> None:
    assert scheduler_of(factory=STEP, **said) == SchedulerConfig(STEP, interval)  # type: ignore


@pytest.mark.parametrize(
    "said",
    [
        {"interval": "epoch", "eval_based": True},
        {"interval": "iteration", "triggers": {"after_epoch": True}},
        {"triggers": {"after_epoch": True, "after_eval": True}},
    ],
)
def test_a_scheduler_that_steps_at_two_times_is_refused(said: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"that it steps per .* and per .*\. Keep one"):
        scheduler_of(factory=STEP, **said)


def test_a_scheduler_of_the_metric_cannot_step_per_epoch() -> None:
    plateau = {"name": "ReduceLROnPlateau", "mode": "max", "patience": 10, "factor": 0.2}
    assert scheduler_of(factory=plateau, eval_based=True).interval == "eval"
    with pytest.raises(ConfigError, match="ReduceLROnPlateau listens to the metric"):
        scheduler_of(factory=plateau, eval_based=False)


@pytest.mark.parametrize(
    "given",
    [
        {"factory": MySchedulerFactory()},
        {"factory": MySchedulerFactory, "triggers": {"after_epoch": True}, "eval_based": False},
        MySchedulerFactory(),
        MySchedulerFactory,
    ],
)
def test_a_scheduler_factory_may_be_an_instance_or_a_class(given: Any) -> None:
    scheduler = Config.from_dict({"full_trainer": {"scheduler": given}}).full_trainer.scheduler
    assert scheduler is not None
    assert isinstance(scheduler.factory, MySchedulerFactory)


def test_a_class_that_needs_arguments_is_refused() -> None:
    with pytest.raises(ConfigError, match="needs arguments"):
        scheduler_of(factory=DefaultTorchNativeSchedulerFactory)


@pytest.mark.parametrize(
    "given", [STEP, {"factory": STEP}, {"factory": {**STEP, "name": "steplr"}}]
)
def test_a_named_scheduler_may_stand_alone(given: Any) -> None:
    scheduler = Config.from_dict({"full_trainer": {"scheduler": given}}).full_trainer.scheduler
    assert scheduler is not None
    assert scheduler.factory == STEP


def test_a_name_alone_is_enough() -> None:
    trainer = {"scheduler": {"factory": "ExponentialLR"}, "optimizer": "Adam"}
    config = Config.from_dict({"full_trainer": trainer})
    assert config.full_trainer.optimizer == {"name": "Adam"}
    assert config.full_trainer.scheduler == SchedulerConfig({"name": "ExponentialLR"})
    short = Config.from_dict({"full_trainer": {"scheduler": "ExponentialLR"}})
    assert short.full_trainer.scheduler == config.full_trainer.scheduler


@pytest.mark.parametrize(
    ("export", "formats"),
    [
        ({"format": "onnx"}, ("onnx",)),
        ({"format": ["onnx"]}, ("onnx",)),
        ({"format": ["onnx", "jit"], "kwargs": {}}, ("onnx", "torchscript")),
        ({"format": None}, ("onnx", "exported_program", "torchscript")),
        ("onnx", ("onnx",)),
        (["pt2", "torch_export"], ("exported_program",)),
        ({"formats": ["ONNX", "torchscript"], "kwargs": None}, ("onnx", "torchscript")),
    ],
)
def test_every_way_to_name_formats(export: Any, formats: tuple[str, ...]) -> None:
    assert Config.from_dict({"export": export}).export.formats == formats


@pytest.mark.parametrize(
    ("given", "formats"), [("dlrt", ("onnx",)), ("tflite", ("onnx",)), ("pkl", ())]
)
def test_a_format_of_other_engines_says_what_is_written_instead(
    given: str, formats: tuple[str, ...]
) -> None:
    with pytest.warns(UserWarning, match=f"'{given}' is not written; you get") as caught:
        config = Config.from_dict({"export": {"format": [given]}})
    assert config.export.formats == formats
    assert len(caught) == 1
    assert caught[0].filename == __file__


def test_keywords_of_the_export() -> None:
    kwargs = {"root_path": "out", "precision": "fp16", "resolutions": [[32, 64]]}
    export = Config.from_dict({"export": {"format": "onnx", "kwargs": kwargs}}).export
    assert (export.root_path, export.precision) == ("out", "fp16")
    assert export.resolutions == ((32, 64),)


@pytest.mark.parametrize(
    "config", [{"onnx_precision": "fp16"}, {"onnx_precision": "fp16", "export": "onnx"}]
)
def test_the_precision_of_the_file_once_stood_at_the_top(config: dict[str, Any]) -> None:
    assert Config.from_dict(config).export.precision == "fp16"


def test_batch_norms_are_folded_in_any_case() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Config.from_dict({"bn_fusion": True})
    with pytest.warns(UserWarning, match="bn_fusion=False has no effect"):
        Config.from_dict({"bn_fusion": False})


@pytest.mark.parametrize("key", ["quant_args", "quantization_args"])
def test_positions_of_layers_arrive_as_text(key: str) -> None:
    given = {"quantize_conv11": True, "skip_layers": ["0", "3"], "skip_layers_ratio": "0.1"}
    custom = Config.from_dict({"custom_compression": {key: given}}).custom_compression
    assert custom is not None
    assert custom.quantization_args == QuantizationArgs(
        quantize_conv11=True, skip_layers=(0, 3), skip_layers_ratio=0.1
    )


def test_bits_of_single_layers() -> None:
    given = {"layers": {"features.0": {"precision": 2}}}
    custom = Config.from_dict({"custom_compression": given}).custom_compression
    assert custom is not None
    assert custom.layers["features.0"].precision == 2
    assert custom.quantization_args is None


def test_metric_and_split_once_stood_in_the_trainer() -> None:
    trainer = {"eval_key": "mykey", "eval_split": "val"}
    config = Config.from_dict({"full_trainer": trainer})
    assert (config.eval_key, config.eval_split) == ("mykey", "val")
    same = {"full_trainer": trainer, "fine_tuner": {"loop_params": trainer}, "eval_key": "mykey"}
    assert Config.from_dict(same).eval_key == "mykey"


def test_a_whole_published_configuration() -> None:
    config = Config.from_dict(
        {
            "deepsearch": False,
            "level": 2,
            "delta": 1,
            "device": "CPU",
            "use_horovod": False,
            "task_type": "object_detection",
            "export": {"format": ["onnx"], "kwargs": {"root_path": "out", "precision": "fp32"}},
            "full_trainer": {
                "epochs": 50,
                "eval_freq": 2,
                "eval_skip": 1,
                "eval_key": "mAP",
                "early_stopping_patience": 20,
                "loop_test": False,
                "optimizer": {"name": "SGD", "lr": 0.001, "momentum": 0.9, "weight_decay": 5e-4},
                "scheduler": {
                    "factory": DefaultTorchNativeSchedulerFactory("CosineAnnealingLR", T_max=50),
                    "triggers": {"after_epoch": True},
                    "eval_based": False,
                },
                "ema": {"decay_rate": 0.9999, "period": 2000},
            },
            "fine_tuner": {
                "loop_params": {"epochs": 1, "loop_test": False, "optimizer": {"lr": 0.001}}
            },
        }
    )
    assert config.device is Device.CPU
    assert config.eval_key == "mAP"
    assert config.full_trainer.early_stopping_patience == 20
    assert config.full_trainer.scheduler is not None
    assert config.full_trainer.scheduler.interval == "epoch"
    assert config.fine_tuner.optimizer == {
        "name": "SGD", "lr": 0.001, "momentum": 0.9, "weight_decay": 5e-4
    }  # fmt: skip
