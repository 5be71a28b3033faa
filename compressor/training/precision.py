"""Mixed precision: in which type a step computes, and how its gradients are kept from underflow."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, TypeAlias

import torch

from compressor.errors import ConfigError, suggest

Precision: TypeAlias = Literal["fp32", "bf16", "fp16"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def check_precision(precision: str) -> None:
    """Do nothing if `precision` is one.

    Raises:
        ConfigError: if it is none.
    """
    if precision not in DTYPES:
        raise ConfigError(f"There is no precision {precision!r}. {suggest(precision, DTYPES)}")


def make_autocast(precision: Precision, device: torch.device) -> AbstractContextManager[Any]:
    """A context that can be entered again and again, in which a step computes in `precision`."""
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, dtype=DTYPES[precision])


def reset_scaler(scaler: torch.amp.GradScaler) -> None:
    """Forget a step that was begun and not made; the scale stays."""
    if scaler.is_enabled() and scaler._scale is not None:
        scaler.update(scaler.get_scale())


def make_scaler(precision: Precision, device: torch.device) -> torch.amp.GradScaler:
    """Scales the loss in fp16, whose smallest number is 6e-8; does nothing in other types."""
    return torch.amp.GradScaler(device.type, enabled=precision == "fp16")
