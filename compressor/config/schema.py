"""The whole configuration: every option, its default, and what contradicts it."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Literal, cast

import torch
import yaml

from compressor.config.checks import check, is_finite
from compressor.config.parts import (
    BudgetConfig,
    CustomCompression,
    ExecutorConfig,
    ExportConfig,
    TargetConfig,
    read_executor,
    settle_target,
)
from compressor.config.reader import as_mapping, read
from compressor.config.spellings import modernize
from compressor.config.trainer import TrainerConfig, inherit
from compressor.errors import ConfigError
from compressor.interfaces.device import Device
from compressor.interfaces.optimizers import AdjustedOptimizerFactory

EVAL_KEYS = {"classification": "accuracy"}
# What decides, with a plan, how a variant turns out.
OUTCOME = (
    "seed",
    "device",
    "precision",
    "use_horovod",
    "full_trainer",
    "fine_tuner",
    "eval_split",
    "external_training_loop",
    "custom_compression",
    "target",
)


@dataclass(frozen=True)
class Config:
    """All that a run is asked to do. `from_dict` and `from_yaml` take every known spelling.

    Attributes:
        optimization: what shall be small: the file ("compression"), the time of a call on the
            target ("latency"), the arithmetic ("macs"), or the file by low-bit numbers alone
            ("quantization").
        also_optimize: what shall be small besides; each counts by its ratio to the reference's.
        delta: what the metric may lose, on its own scale: 1.0 is one point of a percentage, 0.01
            one of a fraction.
        level: 1 is one pass; 2 and 3 search longer.
        deepsearch: spend what is left of delta, slowly.
        device: where training and evaluation run; names of torch will do as well.
        use_horovod: train in the processes that horovodrun starts, on a GPU or a core each; the
            learning rate is multiplied by their number.
        task_type: decides the default `eval_key`, loss and evaluation.
        eval_key: which value of the evaluation's dict counts; None: "accuracy" of a classification,
            else the only one there is, or among several the one called mAP or mIoU.
        eval_split: split of the data that variants are judged on.
        metric_mode: "max" if more of the metric is better.
        full_trainer: how the finalists are trained.
        fine_tuner: how every variant is trained; what it does not say it takes from
            `full_trainer`, the learning rate divided by ten.
        export: which files are written.
        custom_compression: what you fixed, where it shall not be searched.
        external_training_loop: trains in place of the built-in trainer.
        target: default: "onnxruntime" on the CPU; with device GPU "eager" on CUDA.
        budget: limits of the run and of the model.
        techniques: names of those that may be used, such as "quantization"; None: all.
        importance: what ranks the channels of a group; see `structure.scores`.
        run_dir: folder of the run; None: `compressor_run` in the working directory.
        seed: of everything that is drawn.
        holdout: split that the result alone is measured on; None: `eval_split`.
        executor: who makes the variants: "inline", "ray", or {"kind", "workers", "resources"}.
        precision: of training; "auto" is bf16 on the GPU and fp32 on the CPU.
        progress: show bars; None: when stderr is a terminal.
    """

    optimization: Literal["compression", "latency", "macs", "quantization"] = "compression"
    also_optimize: tuple[Literal["compression", "latency", "macs"], ...] = ()
    delta: float = 1.0
    level: int = 1
    deepsearch: bool = False
    device: Device = field(default_factory=Device.best)
    use_horovod: bool = False
    task_type: Literal["classification", "object_detection", "segmentation", "__custom__"] = (
        "classification"
    )
    eval_key: str | None = None
    eval_split: str = "test"
    metric_mode: Literal["max", "min"] = "max"
    full_trainer: TrainerConfig = field(default_factory=TrainerConfig)
    fine_tuner: TrainerConfig = field(default_factory=TrainerConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    custom_compression: CustomCompression | None = None
    external_training_loop: object | None = None
    target: TargetConfig = field(default_factory=TargetConfig)
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    techniques: tuple[str, ...] | None = None
    importance: Literal[
        "taylor", "l1", "l2", "bn_scale", "lamp", "fpgm", "hessian", "activation"
    ] = "taylor"
    run_dir: str | None = None
    seed: int = 0
    holdout: str | None = None
    executor: ExecutorConfig = field(default=ExecutorConfig(), metadata={"read": read_executor})
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    progress: bool | None = None

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Config:
        """Read a mapping, which is not changed; text as argparse leaves it is converted.

        Raises:
            ConfigError: an unknown key (naming the nearest), a value out of range, a contradiction.

        >>> config = Config.from_dict({"delta": "0.5", "full_trainer": {"eval_key": "top1"}})
        >>> config.delta, config.eval_key
        (0.5, 'top1')
        >>> Config.from_dict({"detla": 1})
        Traceback (most recent call last):
        compressor.errors.ConfigError: Unknown key 'detla' in the configuration. \
Did you mean 'delta'? ...
        """
        values = modernize(as_mapping(config, ""))
        device = Device.of(values["device"]) if "device" in values else Device.best()
        full = read(TrainerConfig, values.get("full_trainer", {}), "full_trainer")
        budget = read(BudgetConfig, values.get("budget", {}), "budget")
        if budget.latency_ms is not None and "target" not in values:
            raise ConfigError(
                f"budget.latency_ms={budget.latency_ms} says nothing without the machine it "
                "is measured on. Add target={'runtime': 'onnxruntime', 'threads': 1}."
            )
        return read(
            cls,
            {
                **values,
                "device": device,
                "budget": budget,
                "full_trainer": full,
                "fine_tuner": inherit(values.get("fine_tuner", {}), full),
                "target": settle_target(values.get("target", {}), device),
            },
        )

    @classmethod
    def from_yaml(cls, path: str | os.PathLike[str]) -> Config:
        """Read a YAML file that holds what `from_dict` takes.

        Raises:
            ConfigError: also if the file cannot be read, or is not YAML.
        """
        try:
            with open(path, encoding="utf-8") as file:
                values = yaml.safe_load(file)
        except OSError as error:
            raise ConfigError(f"{os.fspath(path)!r} cannot be read: {error.strerror}.") from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ConfigError(f"{os.fspath(path)!r} is not YAML: {error}.") from error
        return cls.from_dict(values if values is not None else {})

    def __post_init__(self) -> None:
        """Settle the default metric; refuse what cannot be meant, and what contradicts itself."""
        if self.eval_key is None:
            object.__setattr__(self, "eval_key", EVAL_KEYS.get(self.task_type))
        is_drop = is_finite(self.delta, 0) and self.delta > 0
        check("delta", self.delta, is_drop, "how much the metric may lose, a number above 0")
        check("level", self.level, 1 <= self.level <= 3, "1, 2 or 3")
        if self.use_horovod and self.executor.kind == "ray":
            raise ConfigError(
                "use_horovod=True trains each variant in several processes, and executor 'ray' "
                "makes each in one. Write use_horovod=False, or executor='inline'."
            )
        if self.holdout in (self.eval_split, "train"):
            raise ConfigError(
                f"holdout={self.holdout!r} is a split that the search sees. "
                "Give a third split of your data, or leave holdout out."
            )
        if self.precision == "fp16" and self.device is Device.CPU:
            raise ConfigError(
                "precision='fp16' trains on the GPU only, and device is CPU. "
                "Write precision='auto', or device='GPU'."
            )
        if self.optimization == "quantization" and self.budget.macs is not None:
            raise ConfigError(
                f"budget.macs={self.budget.macs} cannot be met by optimization='quantization', "
                "which leaves the arithmetic as it is. Write optimization='macs'."
            )
        if self.techniques == ():
            raise ConfigError("techniques is empty. Name some, or leave it out to use all.")
        loop = self.external_training_loop
        if loop is not None and not callable(getattr(loop, "train", None)):
            raise ConfigError(
                f"external_training_loop is a {type(loop).__name__}. Give an ExternalTrainingLoop."
            )

    @property
    def training_precision(self) -> Literal["fp32", "bf16", "fp16"]:
        """`precision` with "auto" settled."""
        if self.precision != "auto":
            return self.precision
        return "bf16" if self.device is Device.GPU else "fp32"

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; a factory is the name of its class."""
        return cast("dict[str, Any]", _plain(self))

    def recipe(self) -> dict[str, Any]:
        """The part of `to_json` that, with a plan, decides how a variant turns out."""
        values = self.to_json()
        return {name: values[name] for name in OUTCOME}


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if dataclasses.is_dataclass(value):
        return {item.name: _plain(getattr(value, item.name)) for item in dataclasses.fields(value)}
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, AdjustedOptimizerFactory):
        return {"factory": _plain(value.factory), **_plain(value.options)}
    return getattr(value, "__qualname__", type(value).__qualname__)
