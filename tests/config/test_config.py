from __future__ import annotations

import dataclasses
import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Adam, Optimizer

from compressor.config import (
    BudgetConfig,
    Config,
    DistillationConfig,
    EmaConfig,
    ExecutorConfig,
    ExportConfig,
    TargetConfig,
    TrainerConfig,
)
from compressor.errors import ConfigError
from compressor.interfaces import (
    Device,
    ExternalTrainingLoop,
    NativeOptimizerFactory,
    make_optimizer,
)


class MyFactory(NativeOptimizerFactory):
    def make(self, native_model: nn.Module) -> Optimizer:
        return Adam(native_model.parameters(), lr=1e-4, betas=(0.9, 0.9))


def read(**config: Any) -> Config:
    return Config.from_dict(config)


def test_nothing_given_is_all_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert read() == Config()
    assert read().device is Device.CPU
    assert read().eval_key == "accuracy"


def test_the_gpu_is_the_default_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert read().device is Device.GPU
    assert read().target == TargetConfig(runtime="eager", device="cuda")


def test_the_mapping_is_not_changed() -> None:
    config = {
        "horovod": False,
        "full_trainer": {"eval_key": "miou", "optimizer": {"name": "SGD", "lr": "0.1"}},
        "fine_tuner": {"loop_params": {"epochs": 1}},
        "export": {"format": ["onnx"], "kwargs": {"precision": "fp16"}},
    }
    before = json.dumps(config)
    Config.from_dict(config)
    assert json.dumps(config) == before


def test_none_is_not_given() -> None:
    config = read(optimization=None, level=None, export=None, budget={"minutes": None})
    assert config == read()


def test_none_switches_off_where_it_means_that() -> None:
    config = read(
        full_trainer={"gradient_clip_norm": 2.0, "distillation": None},
        fine_tuner={"gradient_clip_norm": None},
    )
    assert config.full_trainer.gradient_clip_norm == 2.0
    assert config.fine_tuner.gradient_clip_norm is None
    assert config.full_trainer.distillation is None


def test_text_of_argparse_is_converted() -> None:
    config = read(
        delta="5e-1", level="2", deepsearch="False", device="cpu", seed="7", progress="no"
    )
    assert (config.delta, config.level, config.deepsearch, config.seed) == (0.5, 2, False, 7)
    assert config.progress is False


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"detla": 1}, "Unknown key 'detla' in the configuration. Did you mean 'delta'"),
        ({"full_trainer": {"epoch": 1}}, "'epoch' in full_trainer. Did you mean 'epochs'"),
        ({"fine_tuner": {"loop_params": {"epoch": 1}}}, "'epoch' in fine_tuner"),
        ({"budget": {"minute": 1}}, "'minute' in budget. Did you mean 'minutes'"),
        ({"target": {"thread": 1}}, "'thread' in target. Did you mean 'threads'"),
        ({"export": {"kwargs": {"root": "."}}}, "'root' in export. Did you mean 'root_path'"),
        ({"full_trainer": {"ema": {"decay": 1}}}, "in full_trainer.ema. Did you mean 'decay_rate'"),
        (
            {"custom_compression": {"quantization_args": {"skip_layer": 1}}},
            "in custom_compression.quantization_args. Did you mean 'skip_layers'",
        ),
        (
            {"custom_compression": {"layers": {"conv1": {"bits": 2}}}},
            "'bits' in custom_compression.layers.conv1. Known: precision",
        ),
        (
            {"full_trainer": {"optimizer": {"name": "SDG"}}},
            "no optimizer 'SDG'. Did you mean 'SGD'",
        ),
        (
            {"full_trainer": {"optimizer": {"name": "SGD", "momentm": 1}}},
            "The optimizer SGD takes no 'momentm'. Did you mean 'momentum'",
        ),
        (
            {"full_trainer": {"scheduler": {"factory": {"name": "StepLr2"}}}},
            "no scheduler 'StepLr2'. Did you mean 'StepLR'",
        ),
        ({"export": "onx"}, "no export format 'onx'. Did you mean 'onnx'"),
        ({"optimization": "latencies"}, "'latencies' is unknown. Did you mean 'latency'"),
        ({"task_type": "custom"}, "Did you mean '__custom__'"),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest(config: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Config.from_dict(config)
    assert message in str(caught.value)


@pytest.mark.parametrize("key", ["use_horovod", "horovod"])
def test_horovod_is_asked_for_in_both_spellings(key: str) -> None:
    assert Config.from_dict({key: True}).use_horovod
    assert not Config.from_dict({}).use_horovod


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"delta": 0}, "delta=0.0 is out of range"),
        ({"delta": -1}, "delta=-1.0"),
        ({"delta": float("nan")}, "delta=nan"),
        ({"delta": "inf"}, "delta=inf"),
        ({"delta": "one"}, "delta='one' is not a number"),
        ({"delta": True}, "delta=True is not a number"),
        ({"level": 4}, "level=4 is out of range. Write 1, 2 or 3"),
        ({"level": 1.5}, "level=1.5 is not a whole number"),
        ({"deepsearch": "maybe"}, "'maybe' is not a truth value"),
        ({"run_dir": 3}, "run_dir=3 is a int"),
        ({"device": "TPU"}, "no device 'TPU'"),
        ({"executor": "rays"}, "executor.kind='rays' is unknown. Did you mean 'ray'?"),
        ({"executor": 2}, "executor is 2. Write a mapping"),
        ({"executor": {"kind": "ray", "worker": 2}}, "Did you mean 'workers'?"),
        ({"executor": {"kind": "ray", "workers": 0}}, "executor.workers=0 is out of range"),
        (
            {"executor": {"kind": "ray", "resources": {"CPU": -1}}},
            "executor.resources.CPU=-1.0 is out of range",
        ),
        ({"executor": {"resources": {"CPU": 1}}}, "executor.kind is 'inline'"),
        ({"holdout": "test"}, "holdout='test' is a split that the search sees"),
        ({"holdout": "train"}, "holdout='train'"),
        ({"eval_split": "val", "holdout": "val"}, "holdout='val'"),
        ({"device": "CPU", "precision": "fp16"}, "on the GPU only, and device is CPU"),
        ({"target": {"runtime": "onnxruntime", "device": "cuda"}}, "runs on the CPU only"),
        ({"target": {"threads": 0}}, "target.threads=0"),
        ({"target": {"batch_size": 0}}, "target.batch_size=0"),
        ({"target": ["eager"]}, r"target is ['eager']. Write a mapping"),
        ({"budget": {"latency_ms": 2}}, "says nothing without the machine"),
        ({"budget": {"minutes": 0}}, "budget.minutes=0.0"),
        ({"budget": {"trials": -1}}, "budget.trials=-1"),
        ({"optimization": "quantization", "budget": {"macs": 9}}, "budget.macs=9 cannot be met"),
        ({"techniques": []}, "techniques is empty"),
        ({"external_training_loop": 3}, "external_training_loop is a int"),
        ({"eval_key": "a", "full_trainer": {"eval_key": "b"}}, "given twice, as 'a' and 'b'"),
        ({"eval_split": "a", "full_trainer": {"eval_split": "b"}}, "given twice, as 'a' and 'b'"),
        ({"onnx_precision": "fp16", "export": {"precision": "fp32"}}, "given twice"),
        ({"full_trainer": {"epochs": -1}}, "epochs=-1"),
        ({"full_trainer": {"eval_freq": 0}}, "eval_freq=0"),
        ({"full_trainer": {"eval_skip": -1}}, "eval_skip=-1"),
        ({"full_trainer": {"early_stopping_patience": 0}}, "early_stopping_patience=0"),
        ({"full_trainer": {"gradient_clip_norm": 0}}, "gradient_clip_norm=0.0"),
        ({"full_trainer": {"ema": {"decay_rate": 2}}}, "ema.decay_rate=2.0"),
        ({"full_trainer": {"ema": {"period": 0}}}, "ema.period=0"),
        ({"full_trainer": {"distillation": {"temperature": 0}}}, "distillation.temperature=0.0"),
        ({"full_trainer": {"distillation": {"weight": -1}}}, "distillation.weight=-1.0"),
        ({"full_trainer": {"distillation": {"weight": 0, "task_weight": 0}}}, "are both 0"),
        ({"full_trainer": {"optimizer": 3}}, "optimizer is a int without a make method"),
        ({"full_trainer": {"scheduler": {"eval_based": True}}}, "has no 'factory'"),
        ({"full_trainer": {"scheduler": {"factory": {"step_size": 1}}}}, "has no 'name'"),
        ({"export": {"resolutions": [(0, 8)]}}, "export.resolutions=(0, 8)"),
        ({"export": {"resolutions": [(8, 8, 8)]}}, "has 3 values. Write 2"),
        (
            {"custom_compression": {"quantization_args": {"skip_layers_ratio": 2}}},
            "skip_layers_ratio=2.0",
        ),
        ({"custom_compression": {"layers": {"a": {"precision": 0}}}}, "precision=0"),
        ({1: 2}, "The configuration is {1: 2}"),
    ],
)
def test_what_cannot_be_meant_is_refused_with_its_value(config: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Config.from_dict(config)
    assert message in str(caught.value)
    assert str(caught.value).endswith(".")


def test_direct_construction_is_checked_too() -> None:
    with pytest.raises(ConfigError, match="delta=-1"):
        dataclasses.replace(Config(), delta=-1.0)


def test_the_metric_of_other_tasks_has_no_default_name() -> None:
    assert read(task_type="segmentation").eval_key is None
    assert read(task_type="object_detection", full_trainer={"eval_key": "mAP"}).eval_key == "mAP"


@pytest.mark.parametrize(
    ("device", "target", "expected"),
    [
        ("CPU", {}, ("onnxruntime", "cpu")),
        ("GPU", {}, ("eager", "cuda")),
        ("GPU", {"runtime": "onnxruntime"}, ("onnxruntime", "cpu")),
        ("GPU", {"device": "cpu"}, ("onnxruntime", "cpu")),
        ("GPU", {"runtime": "inductor"}, ("inductor", "cuda")),
        ("CPU", {"runtime": "inductor"}, ("inductor", "cpu")),
        ("CPU", {"device": "GPU"}, ("eager", "cuda")),
        ("CPU", "eager", ("eager", "cpu")),
        ("CPU", TargetConfig("eager"), ("eager", "cpu")),
    ],
)
def test_runtime_and_device_of_the_target_follow_from_each_other(
    device: str, target: Any, expected: tuple[str, str]
) -> None:
    settled = read(device=device, target=target).target
    assert (settled.runtime, settled.device) == expected


def test_a_limit_on_latency_goes_with_a_target() -> None:
    config = read(budget={"latency_ms": "1.5", "size_bytes": "1e6"}, target={"threads": 2})
    assert config.budget == BudgetConfig(latency_ms=1.5, size_bytes=1_000_000)


def test_precision_is_settled_by_the_device() -> None:
    assert read(device="CPU").training_precision == "fp32"
    assert read(device="GPU").training_precision == "bf16"
    assert read(device="GPU", precision="FP16").training_precision == "fp16"


def test_the_fine_tuner_takes_a_tenth_of_the_learning_rate() -> None:
    config = read(full_trainer={"optimizer": {"name": "SGD", "lr": 0.5, "momentum": 0.9}})
    assert config.fine_tuner.optimizer == {
        "name": "SGD",
        "lr": pytest.approx(0.05),
        "momentum": 0.9,
    }


def test_a_fine_tuner_without_a_name_inherits_it() -> None:
    config = read(
        full_trainer={"optimizer": {"name": "SGD", "lr": 0.1, "momentum": 0.9}},
        fine_tuner={"loop_params": {"epochs": 2, "optimizer": {"lr": 0.003}}},
    )
    assert config.fine_tuner.optimizer == {"name": "SGD", "lr": 0.003, "momentum": 0.9}
    assert config.fine_tuner.epochs == 2
    assert config.full_trainer.epochs is None


def test_a_fine_tuner_with_another_optimizer_inherits_nothing_of_it() -> None:
    config = read(
        full_trainer={"optimizer": {"name": "SGD", "lr": 0.1, "momentum": 0.9}},
        fine_tuner={"optimizer": {"name": "Adam", "lr": 1e-3}},
    )
    assert config.fine_tuner.optimizer == {"name": "Adam", "lr": 1e-3}


def test_a_learning_rate_is_put_into_the_optimizer_of_a_factory() -> None:
    config = read(full_trainer={"optimizer": MyFactory()}, fine_tuner={"optimizer": {"lr": 0.25}})
    optimizer = make_optimizer(config.fine_tuner.optimizer, nn.Linear(1, 1), default_lr=1.0)
    assert optimizer.param_groups[0]["lr"] == 0.25
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.9)


def test_a_factory_may_be_given_as_its_class() -> None:
    config = read(full_trainer={"optimizer": MyFactory})
    assert isinstance(config.full_trainer.optimizer, MyFactory)
    assert isinstance(config.fine_tuner.optimizer, MyFactory)


def test_the_fine_tuner_distils_as_the_full_trainer_does() -> None:
    config = read(full_trainer={"distillation": False, "ema": True, "eval_freq": 3})
    assert config.fine_tuner == TrainerConfig(distillation=None, ema=EmaConfig(), eval_freq=3)
    own = read(full_trainer={"distillation": False}, fine_tuner={"distillation": {"weight": 0.5}})
    assert own.fine_tuner.distillation == DistillationConfig(weight=0.5)


def test_dataclasses_may_be_given_in_place_of_mappings() -> None:
    trainer = TrainerConfig(epochs=3)
    config = read(full_trainer=trainer, fine_tuner=trainer, export=ExportConfig(("onnx",)))
    assert config.full_trainer is trainer
    assert config.fine_tuner is trainer
    assert config.export.formats == ("onnx",)


def test_an_executor_is_a_word_or_a_mapping() -> None:
    assert read().executor == ExecutorConfig("inline", workers=1, resources={})
    assert read(executor="Ray").executor == ExecutorConfig("ray")
    several = {"kind": "ray", "workers": "2", "resources": {"CPU": 1, "GPU": "0.5"}}
    assert read(executor=several).executor == ExecutorConfig("ray", 2, {"CPU": 1.0, "GPU": 0.5})
    assert read(executor=ExecutorConfig(workers=3)).executor.workers == 3
    with pytest.raises(ConfigError, match="executor 'ray' makes each in one"):
        Config(use_horovod=True, executor=ExecutorConfig("ray"))


def test_an_external_loop_is_kept() -> None:
    loop = ExternalTrainingLoop(lambda model, args: model, Namespace(epochs=1))
    assert read(external_training_loop=loop).external_training_loop is loop


def test_json_names_the_classes_of_factories() -> None:
    config = read(
        full_trainer={"optimizer": MyFactory(), "scheduler": {"factory": {"name": "StepLR",
                      "step_size": 2}}},
        fine_tuner={"optimizer": {"lr": 0.5}},
        external_training_loop=ExternalTrainingLoop(print, {}),
        device="CPU",
    )  # fmt: skip
    values = json.loads(json.dumps(config.to_json(), allow_nan=False))
    assert values["full_trainer"]["optimizer"] == "MyFactory"
    assert values["full_trainer"]["scheduler"] == {
        "factory": {"name": "StepLR", "step_size": 2},
        "interval": None,
    }
    assert values["fine_tuner"]["optimizer"] == {"factory": "MyFactory", "lr": 0.5}
    assert values["external_training_loop"] == "ExternalTrainingLoop"
    assert values["device"] == "cpu"
    assert list(values) == [field.name for field in dataclasses.fields(Config)]


def test_json_of_a_plain_configuration_is_read_back() -> None:
    config = read(
        delta=0.5,
        full_trainer={"optimizer": {"name": "Adam", "lr": 0.1, "betas": [0.9, 0.9]}, "ema": True},
        export={"formats": "onnx", "resolutions": [(32, 64)]},
        custom_compression={"layers": {"conv1": {"precision": 4}}},
        techniques="channel_pruning,block_removal",
    )
    assert config.techniques == ("channel_pruning", "block_removal")
    assert Config.from_dict(config.to_json()) == config


def test_the_recipe_does_not_know_how_long_the_search_may_take() -> None:
    config = read(budget={"minutes": 1}, run_dir="a", progress=True)
    other = read(budget={"minutes": 9}, run_dir="b", progress=False, delta=2)
    assert config.recipe() == other.recipe()
    assert config.recipe() != read(seed=1).recipe()
    assert config.recipe() != read(full_trainer={"epochs": 3}).recipe()


def test_yaml_says_the_same_as_a_mapping(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(
        "delta: 1e-2\nfull_trainer:\n  optimizer: {name: SGD, lr: 1e-1}\n  epochs: 50\n"
        "export: {resolutions: [[32, 64]]}\n"
    )
    expected = read(
        delta=0.01,
        full_trainer={"optimizer": {"name": "SGD", "lr": 0.1}, "epochs": 50},
        export={"resolutions": [(32, 64)]},
    )
    assert Config.from_yaml(path) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "config.yaml' cannot be read: No such file"),
        ("a: [", "config.yaml' is not YAML"),
        ("- delta", "Write a mapping"),
        ("detla: 1", "Did you mean 'delta'"),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "config.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        Config.from_yaml(path)


def test_an_empty_file_is_all_defaults(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").touch()
    assert Config.from_yaml(tmp_path / "config.yaml") == read()
