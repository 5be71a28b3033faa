"""Every older spelling of a configuration, rewritten as ours.

Scripts for engines of this kind were written against several generations of keys. They are all
understood here and nowhere else; behind this file there is one spelling.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import is_dataclass
from typing import Any

from compressor.config.reader import as_mapping, check_keys, convert
from compressor.errors import ConfigError, suggest
from compressor.interfaces.optimizers import (
    Interval,
    OptimizerSpec,
    SchedulerConfig,
    SchedulerSpec,
    check_optimizer,
)

FORMATS = {
    "onnx": "onnx",
    "exported_program": "exported_program",
    "pt2": "exported_program",
    "torch_export": "exported_program",
    "torch.export": "exported_program",
    "torchscript": "torchscript",
    "jit": "torchscript",
}
REPLACED_FORMATS = {
    "pkl": (None, "a structure file and safetensors weights, which need no pickle"),
    "tflite": ("onnx", "the int8 ONNX file"),
    "dlrt": ("onnx", "the int8 ONNX file"),
}
TRIGGERS: Mapping[str, Interval] = {
    "after_epoch": "epoch",
    "after_iteration": "iteration",
    "after_eval": "eval",
}
SCHEDULER_KEYS = ("factory", "interval", "eval_based", "triggers")


def modernize(config: Mapping[str, Any]) -> dict[str, Any]:
    """`config` in today's keys; unknown keys stay, for the reader to name.

    Raises:
        ConfigError: two spellings of one thing that disagree.

    >>> modernize({"full_trainer": {"eval_key": "miou"}, "export": {"format": "jit"}})
    {'full_trainer': {}, 'export': {'formats': ('torchscript',)}, 'eval_key': 'miou'}
    """
    config = {key: value for key, value in config.items() if value is not None}
    _move(config, "horovod", config, "use_horovod")
    if "bn_fusion" in config and not convert(config.pop("bn_fusion"), bool, "bn_fusion"):
        warnings.warn(
            "bn_fusion=False has no effect: batch norms are always folded into the exported file. "
            "The model that run() returns keeps them.",
            stacklevel=3,
        )
    if "export" in config and not is_dataclass(config["export"]):
        config["export"] = _modernize_export(config["export"])
    if "onnx_precision" in config:
        config["export"] = dict(as_mapping(config.get("export", {}), "export"))
        _move(config, "onnx_precision", config["export"], "precision")
    if isinstance(config.get("custom_compression"), Mapping):
        custom = dict(config["custom_compression"])
        _move(custom, "quant_args", custom, "quantization_args")
        config["custom_compression"] = custom
    for trainer in ("full_trainer", "fine_tuner"):
        if trainer in config and not is_dataclass(config[trainer]):
            config[trainer] = _modernize_trainer(config[trainer], trainer)
            _move(config[trainer], "eval_key", config, "eval_key", trainer)
            _move(config[trainer], "eval_split", config, "eval_split", trainer)
    return config


def read_optimizer(value: Any, where: str = "optimizer") -> OptimizerSpec | None:
    """An optimizer as {"name", ...}, as options without a name, or as a factory (or its class).

    Raises:
        ConfigError: if it is none of these, or torch has no such optimizer or option.
    """
    if value is None:
        return None
    if isinstance(value, str):
        value = {"name": value}
    if isinstance(value, Mapping):
        return check_optimizer({key: _number(item) for key, item in value.items()})
    factory: OptimizerSpec = _factory(value, where)
    return factory


def read_scheduler(value: Any, where: str = "scheduler") -> SchedulerConfig | None:
    """A scheduler as {"factory", "interval" | "eval_based" | "triggers"}, or as its factory alone.

    Raises:
        ConfigError: an unknown key, disagreeing keys, or a scheduler that torch does not have.
    """
    if value is None or isinstance(value, SchedulerConfig):
        return value
    if isinstance(value, str):
        value = {"name": value}
    if not isinstance(value, Mapping):
        return SchedulerConfig(_factory(value, where))
    if "name" in value and "factory" not in value:
        return SchedulerConfig({key: _number(item) for key, item in value.items()})
    check_keys(value, dict.fromkeys(SCHEDULER_KEYS), where)
    if value.get("factory") is None:
        raise ConfigError(
            f"{where}={dict(value)} has no 'factory'. "
            "Write {'factory': {'name': 'StepLR', 'step_size': 10}}."
        )
    factory: Any = value["factory"]
    spec: SchedulerSpec
    if isinstance(factory, str):
        spec = {"name": factory}
    elif isinstance(factory, Mapping):
        spec = {key: _number(item) for key, item in factory.items()}
    else:
        spec = _factory(factory, f"{where}.factory")
    return SchedulerConfig(spec, _read_interval(value, where))


def _read_interval(scheduler: Mapping[str, Any], where: str) -> Interval | None:
    said: dict[str, Interval] = {}
    if scheduler.get("interval") is not None:
        said["interval"] = convert(scheduler["interval"], Interval, f"{where}.interval")
    triggers = as_mapping(scheduler.get("triggers") or {}, f"{where}.triggers")
    check_keys(triggers, TRIGGERS, f"{where}.triggers")
    for key in triggers:
        if convert(triggers[key], bool, f"{where}.triggers.{key}"):
            said[key] = TRIGGERS[key]
    # eval_based=False only says that it does not listen to the metric.
    if convert(scheduler.get("eval_based") or False, bool, f"{where}.eval_based"):
        said["eval_based"] = "eval"
    elif scheduler.get("eval_based") is not None and not said:
        said["eval_based"] = "epoch"
    if len(set(said.values())) > 1:
        raise ConfigError(
            f"{where} says in {' and '.join(said)} that it steps per "
            f"{' and per '.join(said.values())}. Keep one: 'interval'."
        )
    return next(iter(said.values()), None)


def _modernize_export(value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):  # a format or several
        value = {"formats": value}
    export = dict(as_mapping(value, "export"))
    for key, item in as_mapping(export.pop("kwargs", None) or {}, "export.kwargs").items():
        export[key] = _agree(key, export.get(key), item)
    _move(export, "format", export, "formats")
    if export.get("formats") is not None:
        formats = convert(export["formats"], tuple[str, ...], "export.formats")
        export["formats"] = _modernize_formats(formats)
    return export


def _modernize_formats(formats: tuple[str, ...]) -> tuple[str, ...]:
    written: list[str | None] = []
    for given in formats:
        name = given.strip().lower()
        if name in REPLACED_FORMATS:
            instead, what = REPLACED_FORMATS[name]
            warnings.warn(
                f"The export format {given!r} is not written; you get {what} instead. "
                f"Take {given!r} out of export.formats to silence this.",
                stacklevel=5,
            )
            written.append(instead)
        elif name in FORMATS:
            written.append(FORMATS[name])
        else:
            raise ConfigError(f"There is no export format {given!r}. {suggest(name, FORMATS)}")
    return tuple(dict.fromkeys(name for name in written if name is not None))


def _modernize_trainer(value: Any, where: str) -> dict[str, Any]:
    trainer = dict(as_mapping(value, where))
    for key, item in as_mapping(trainer.pop("loop_params", None) or {}, where).items():
        trainer[key] = _agree(f"{where}.{key}", trainer.get(key), item)
    return trainer


def _move(
    source: dict[str, Any], old: str, target: dict[str, Any], new: str, where: str = ""
) -> None:
    """Move `source[old]` to `target[new]`, where the same value may be already."""
    if old in source:
        value = source.pop(old)
        if value is not None:
            name = f"{where}.{old}" if where else old
            target[new] = _agree(f"{name} and {new}", target.get(new), value)


def _agree(name: str, first: Any, second: Any) -> Any:
    if first is not None and second is not None and first != second:
        raise ConfigError(f"{name} is given twice, as {first!r} and {second!r}. Keep one of them.")
    return second if first is None else first


def _factory(value: Any, where: str) -> Any:
    """An instance of a factory that was given as such or as its class."""
    if isinstance(value, type):
        try:
            value = value()
        except TypeError as error:
            raise ConfigError(
                f"{where} is the class {value.__name__}, which needs arguments: {error}. "
                "Give an instance."
            ) from error
    if not callable(getattr(value, "make", None)):
        raise ConfigError(
            f"{where} is a {type(value).__name__} without a make method. "
            "Give {'name': ...} with a class of torch.optim, or a factory with make()."
        )
    return value


def _number(value: Any) -> Any:
    """`value`, or the number that it spells: YAML reads 1e-3 as text, and so does argparse."""
    if not isinstance(value, str):
        return value
    try:
        number = float(value)
    except ValueError:
        return value
    return int(value) if value.strip().lstrip("+-").isdigit() else number
