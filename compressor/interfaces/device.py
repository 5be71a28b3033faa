"""Where a model is trained and evaluated."""

from __future__ import annotations

import os
from enum import Enum

import torch

from compressor.errors import ConfigError, DeviceError


class Device(Enum):
    """CPU or GPU; the name may be written in any case: `Device("gpu")`, `Device["Gpu"]`.

    >>> Device.of("cuda:0"), Device.of("cpu"), Device.of(torch.device("cpu")) is Device.CPU
    (<Device.GPU: 'gpu'>, <Device.CPU: 'cpu'>, True)
    """

    CPU = "cpu"
    GPU = "gpu"

    @classmethod
    def of(cls, value: Device | torch.device | str) -> Device:
        """The device that a user means by `value`: "GPU", "cuda", "cuda:0", a torch.device, ….

        In a process that torchrun started this is the GPU of the process, which may also be called
        by its number.

        Raises:
            ConfigError: if it means none, or a GPU that is not the first.
        """
        if isinstance(value, cls):
            return value
        word = str(value).strip().lower()
        if word == "cpu":
            return cls.CPU
        if word in ("gpu", "cuda", "cuda:0", f"cuda:{os.environ.get('LOCAL_RANK')}"):
            return cls.GPU
        number = word.removeprefix("cuda:")
        if word != number and number.isdecimal():
            raise ConfigError(
                f"device={str(value)!r} names one of several GPUs, and only the first that is "
                f"visible is used. Set CUDA_VISIBLE_DEVICES={number} in the environment and write "
                "'cuda'; or start one process for each GPU with torchrun."
            )
        raise ConfigError(f"There is no device {value!r}. Write 'CPU' or 'GPU'.")

    @classmethod
    def _missing_(cls, value: object) -> Device | None:
        return cls.of(value) if isinstance(value, (str, torch.device)) else None

    @classmethod
    def best(cls) -> Device:
        """GPU where CUDA is available, else CPU."""
        return cls.GPU if torch.cuda.is_available() else cls.CPU

    @property
    def torch_device(self) -> torch.device:
        """The same for torch."""
        return torch.device("cuda" if self is Device.GPU else "cpu")

    def check_available(self, written: object = None) -> None:
        """Do nothing if this machine has the device.

        Args:
            written: how the user spelled it, for the message; None if that is not known.

        Raises:
            DeviceError: if it is the GPU and torch finds none.
        """
        if self is Device.GPU and not torch.cuda.is_available():
            asked = "A GPU ('GPU', 'cuda')" if written is None else f"device={str(written)!r}"
            raise DeviceError(
                f"{asked} was asked for, and torch {torch.__version__} finds no CUDA device. "
                "Write device='CPU', or install a torch built for CUDA and its driver."
            )
