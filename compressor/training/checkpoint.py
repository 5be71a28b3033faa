"""Checkpoints: one file, whole or not there, checked before it is used, read without pickle's code.

A line with the SHA-256 of what follows, then a file of `torch.save`.
"""

from __future__ import annotations

import hashlib
import io
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from compressor.errors import CheckpointError
from compressor.files import write_bytes

MAGIC = b"compressor checkpoint 1 "
LATEST = "latest.ckpt"


def write_checkpoint(path: Path, state: Mapping[str, Any]) -> None:
    """Replace the file at `path`; a crash at any moment leaves the old one or the new one.

    Raises:
        CheckpointError: if `state` holds something that could not be read back.
        OSError: a full disk; the old file remains.
    """
    state = _without_numpy(state)
    check_plain(state, "")
    buffer = io.BytesIO()
    torch.save(state, buffer)
    body = buffer.getbuffer()
    header = MAGIC + hashlib.sha256(body).hexdigest().encode() + b"\n"
    write_bytes(path, header, body)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """What `write_checkpoint` wrote, with its tensors on the CPU.

    Raises:
        CheckpointError: if there is none, or it is truncated or altered.
    """
    return decode(read_bytes(path), path)


def read_bytes(path: Path) -> bytes:
    """The file at `path`.

    Raises:
        CheckpointError: if there is none.
    """
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise CheckpointError(f"There is no checkpoint at {path}. Check the path.") from error


def decode(content: bytes, path: Path) -> dict[str, Any]:
    """What a file of the bytes `content` holds, with its tensors on the CPU.

    Args:
        content: of the file.
        path: of the file, for messages.

    Raises:
        CheckpointError: if it is truncated or altered.
    """
    header, _, body = content.partition(b"\n")
    if not header.startswith(MAGIC):
        raise CheckpointError(f"{path} is not a checkpoint of this package. Name another file.")
    if hashlib.sha256(body).hexdigest().encode() != header.removeprefix(MAGIC):
        raise CheckpointError(
            f"{path} is truncated or was altered: its checksum does not fit its content. "
            "Delete it to train from the beginning."
        )
    try:
        state: dict[str, Any] = torch.load(io.BytesIO(body), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} holds an object that this version of torch does not read: {error}. "
            "Read it with the version that wrote it."
        ) from error
    return state


def _without_numpy(value: Any) -> Any:
    """`value` with numpy's numbers, such as a learning rate of np.float64, as Python's."""
    if isinstance(value, Mapping):
        return {_without_numpy(key): _without_numpy(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(_without_numpy, value))
    return value.item() if isinstance(value, np.generic) else value


def check_plain(value: Any, path: str) -> None:
    """Do nothing if `value` consists of tensors, numbers, strings and None in lists and dicts.

    Raises:
        CheckpointError: naming the place of what does not belong.
    """
    if isinstance(value, Mapping):
        for key, item in value.items():
            check_plain(item, f"{path}.{key}".lstrip("."))
    elif isinstance(value, (list, tuple)):
        for position, item in enumerate(value):
            check_plain(item, f"{path}[{position}]")
    elif value is not None and type(value) not in (bool, int, float, str, bytes):
        if not isinstance(value, Tensor):
            raise CheckpointError(
                f"{path or 'The state'} is a {type(value).__name__}, which a checkpoint cannot "
                "hold. Return tensors, numbers, strings, None, and lists and dicts of them."
            )
