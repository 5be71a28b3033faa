"""Where the compressed model will run: `make_target` reads it from the configuration."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from compressor.errors import ConfigError, suggest
from compressor.export.onnxruntime_model import OnnxRuntimeModel
from compressor.targets.base import Deployed, Target
from compressor.targets.eager import EagerTarget
from compressor.targets.inductor import InductorTarget
from compressor.targets.onnxruntime import OnnxRuntimeTarget

if TYPE_CHECKING:
    from compressor.config import TargetConfig

__all__ = [
    "Deployed",
    "EagerTarget",
    "InductorTarget",
    "OnnxRuntimeModel",
    "OnnxRuntimeTarget",
    "Target",
    "make_target",
]

TARGETS: dict[str, type[Target]] = {
    target.name: target for target in (OnnxRuntimeTarget, EagerTarget, InductorTarget)
}


def make_target(config: TargetConfig, *, cache_path: Path | None = None) -> Target:
    """The target that `config` describes.

    Args:
        config: runtime, device, threads and batch_size.
        cache_path: where the target keeps the latencies of layers.

    Raises:
        ConfigError: if the runtime is unknown or does not run on the device.
        DeviceError: if this machine does not have the device.
    """
    if config.runtime not in TARGETS:
        raise ConfigError(
            f"There is no target runtime {config.runtime!r}. {suggest(config.runtime, TARGETS)}"
        )
    target = TARGETS[config.runtime]
    return target(config.device, config.threads, config.batch_size, cache_path)
