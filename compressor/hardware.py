"""What a figure was measured with: machine and versions, as every result carries them."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

LIBRARIES = (
    "compressor",
    "torch",
    "torchvision",
    "torch-pruning",
    "torchao",
    "onnx",
    "onnxruntime",
    "numpy",
)
INT8_FLAGS = ("avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm")


def describe_machine() -> dict[str, object]:
    """Processor, its int8 instructions, GPU, operating system, Python and library versions."""
    flags = cpu_flags()
    return {
        "machine": {
            "cpu": _cpu_name(),
            "cores": os.cpu_count(),
            "int8_instructions": [flag for flag in INT8_FLAGS if flag in flags],
            "gpu": _gpu_name(),
            "system": f"{platform.system()} {platform.machine()}",
        },
        "versions": {"python": platform.python_version(), **_library_versions()},
    }


def cpu_flags() -> frozenset[str]:
    """What the processor can do, as Linux names it; empty where it does not say."""
    for line in _cpuinfo():
        name, _, value = line.partition(":")
        if name.strip() in {"flags", "Features"}:
            return frozenset(value.split())
    return frozenset()


def _cpu_name() -> str:
    for line in _cpuinfo():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return platform.processor() or platform.machine()


def _gpu_name() -> str | None:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def _library_versions() -> dict[str, str]:
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found
