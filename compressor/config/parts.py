"""The smaller parts of the configuration: target, budget, export, what the user fixed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from compressor.config.checks import check, is_finite
from compressor.config.reader import as_mapping, read
from compressor.errors import ConfigError
from compressor.interfaces.device import Device


@dataclass(frozen=True)
class TargetConfig:
    """Where the compressed model will run: latency and the final metric are measured there.

    Attributes:
        runtime: "onnxruntime", "eager" (torch) or "inductor" (torch.compile; with
            torchao installed, with linear layers in eight bits).
        device: "cpu" or "cuda".
        threads: of the CPU, for one call.
        batch_size: samples in one call.
    """

    runtime: Literal["onnxruntime", "eager", "inductor"] = "onnxruntime"
    device: Literal["cpu", "cuda"] = "cpu"
    threads: int = 1
    batch_size: int = 1

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        check("target.threads", self.threads, self.threads >= 1, "1 or more")
        check("target.batch_size", self.batch_size, self.batch_size >= 1, "1 or more")
        if self.runtime == "onnxruntime" and self.device == "cuda":
            raise ConfigError(
                "target.runtime='onnxruntime' runs on the CPU only, and target.device is 'cuda'. "
                "Write target={'runtime': 'eager', 'device': 'cuda'} or target.device='cpu'."
            )


@dataclass(frozen=True)
class BudgetConfig:
    """Limits of the run and of the compressed model; None is no limit.

    Attributes:
        minutes: that the whole run may take. A variant in progress is not cut short by them.
        trials: variants that are fine-tuned in the search, over all runs in one folder; up to two
            milder ones follow where none of them held, and the best are trained on.
        latency_ms: of one call on the target.
        size_bytes: of the file to deploy.
        macs: of one sample.
    """

    minutes: float | None = None
    trials: int | None = None
    latency_ms: float | None = None
    size_bytes: int | None = None
    macs: int | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            is_limit = value is None or (is_finite(value, 0) and value > 0)
            check(f"budget.{item.name}", value, is_limit, "a number above 0, or leave it out")


@dataclass(frozen=True)
class ExportConfig:
    """The files that are written beside the model's structure and weights.

    Attributes:
        formats: of "onnx", "exported_program" ("pt2"), "torchscript" ("jit").
        root_path: folder to write them to; None is `exports` in the run directory.
        precision: of a further float ONNX file, unless it is "fp32"; ONNX Runtime does not run
            "bf16" on a CPU.
        resolutions: (height, width) of further ONNX files with a fixed input size.
    """

    formats: tuple[Literal["onnx", "exported_program", "torchscript"], ...] = (
        "onnx",
        "exported_program",
        "torchscript",
    )
    root_path: str | None = None
    precision: Literal["fp32", "fp16", "bf16"] = "fp32"
    resolutions: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        for size in self.resolutions:
            check("export.resolutions", size, min(size) >= 1, "pairs (height, width) in pixels")


@dataclass(frozen=True)
class ExecutorConfig:
    """Who makes the variants. The search asks for `workers` of them at a time, whoever makes them.

    Attributes:
        kind: "inline", one after the other in this process, or "ray", each by a worker of Ray.
        workers: variants that are made side by side.
        resources: of one worker of Ray: {"CPU": threads, "GPU": fraction of one, ...}.
    """

    kind: Literal["inline", "ray"] = "inline"
    workers: int = 1
    resources: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        check("executor.workers", self.workers, self.workers >= 1, "1 or more")
        for name, amount in self.resources.items():
            check(f"executor.resources.{name}", amount, is_finite(amount, 0), "0 or more")
        if self.resources and self.kind == "inline":
            raise ConfigError(
                f"executor.resources={dict(self.resources)} is of the workers of Ray, and "
                "executor.kind is 'inline'. Write executor={'kind': 'ray', ...}, or leave it out."
            )


def read_executor(value: Any, where: str = "executor") -> ExecutorConfig:
    """An executor as its kind alone, or as a mapping.

    Raises:
        ConfigError: an unknown kind or key.

    >>> read_executor("ray").kind, read_executor({"kind": "ray", "workers": "4"}).workers
    ('ray', 4)
    """
    return read(ExecutorConfig, {"kind": value} if isinstance(value, str) else value, where)


@dataclass(frozen=True)
class QuantizationArgs:
    """Which layers may be quantized.

    Attributes:
        quantize_conv11: 1×1 convolutions.
        quantize_group: grouped convolutions.
        skip_layers: positions of layers, in the order they run, that stay float.
        skip_layers_ratio: fraction of the layers, counted from the first, that stay float.
    """

    quantize_conv11: bool = False
    quantize_group: bool = False
    skip_layers: tuple[int, ...] | None = None
    skip_layers_ratio: float = 0.0

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        ratio = self.skip_layers_ratio
        check("skip_layers_ratio", ratio, 0 <= ratio <= 1, "a fraction from 0 to 1")


@dataclass(frozen=True)
class LayerCompression:
    """What is asked of one layer.

    Attributes:
        precision: bits of its weights.
    """

    precision: int

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        check("precision", self.precision, 1 <= self.precision <= 32, "bits from 1 to 32")


@dataclass(frozen=True)
class CustomCompression:
    """What the user wants compressed how, where it shall not be searched.

    Attributes:
        quantization_args: None leaves every layer to the search.
        layers: by the names of `model.named_modules()`.
    """

    quantization_args: QuantizationArgs | None = None
    layers: Mapping[str, LayerCompression] = field(default_factory=dict)


def settle_target(target: object, device: Device) -> TargetConfig:
    """The target; runtime and device follow from each other, or from where the run trains.

    Raises:
        ConfigError: a runtime that the device does not have, an unknown key.
    """
    if isinstance(target, TargetConfig):
        return target
    if isinstance(target, str):
        target = {"runtime": target}
    given = {key: value for key, value in as_mapping(target, "target").items() if value is not None}
    runtime = str(given.get("runtime", "")).lower()
    if "device" in given:
        place = Device.of(given["device"])
    else:
        place = Device.CPU if runtime == "onnxruntime" else device
    given["device"] = place.torch_device.type
    given.setdefault("runtime", "eager" if place is Device.GPU else "onnxruntime")
    return read(TargetConfig, given, "target")
