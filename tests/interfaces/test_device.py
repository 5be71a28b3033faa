from __future__ import annotations

from typing import Any

import pytest
import torch

from compressor.errors import ConfigError, DeviceError
from compressor.interfaces.device import Device


@pytest.mark.parametrize("value", ["GPU", "gpu", "cuda", "CUDA:0", torch.device("cuda", 0)])
def test_every_spelling_of_the_gpu(value: Any) -> None:
    assert Device.of(value) is Device.GPU
    assert Device(value) is Device.GPU


@pytest.mark.parametrize("value", ["CPU", "cpu", torch.device("cpu"), Device.CPU])
def test_every_spelling_of_the_cpu(value: Any) -> None:
    assert Device.of(value) is Device.CPU
    assert Device(value) is Device.CPU


@pytest.mark.parametrize("value", ["tpu", "cudas", "cuda:", "cuda:x", 0, None])
def test_another_device_is_refused(value: Any) -> None:
    with pytest.raises(ConfigError, match="Write 'CPU' or 'GPU'"):
        Device.of(value)


@pytest.mark.parametrize("value", ["cuda:1", torch.device("cuda", 1)])
def test_a_gpu_by_its_number_is_refused_with_the_way_to_choose_it(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"'cuda:1' .* Set CUDA_VISIBLE_DEVICES=1 .* 'cuda'; "):
        Device.of(value)


def test_under_torchrun_a_process_may_call_its_gpu_by_number(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert Device.of("cuda:1") is Device.GPU
    for other in ("cuda:2", "1"):
        with pytest.raises(ConfigError):
            Device.of(other)


def test_the_device_of_torch() -> None:
    assert Device.GPU.torch_device == torch.device("cuda")
    assert Device.CPU.torch_device == torch.device("cpu")


def test_a_missing_gpu_is_an_error_and_no_fallback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    Device.CPU.check_available()
    with pytest.raises(DeviceError, match=r"finds no CUDA device. Write device='CPU'"):
        Device.GPU.check_available()


def test_a_missing_gpu_is_named_as_it_was_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """It said device='GPU', which nobody had written."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DeviceError, match=r"^device='cuda:0' was asked for"):
        Device.GPU.check_available("cuda:0")
    with pytest.raises(DeviceError, match=r"^device='cuda:0' was asked for"):
        Device.GPU.check_available(torch.device("cuda:0"))
    with pytest.raises(DeviceError, match=r"^A GPU \('GPU', 'cuda'\) was asked for"):
        Device.GPU.check_available()
