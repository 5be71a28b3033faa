"""`compressor demo`: the whole engine on a model and data that need no download."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from compressor.cli.digits import DigitsNet, digit_loaders
from compressor.cli.jobs import JobSpec
from compressor.cli.running import present
from compressor.errors import CheckpointError, StudyError
from compressor.files import write_bytes
from compressor.interfaces import Accuracy, Device, LossFunction, TorchForwardPass
from compressor.logs import set_verbosity
from compressor.progress import Progress
from compressor.seeding import isolated_rng

PEAK_LR = 0.1


class CrossEntropy(LossFunction):
    """Cross entropy of (images, labels)."""

    def __call__(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        """The mean over the batch."""
        device = self.device.torch_device
        images, labels = (tensor.to(device, non_blocking=True) for tensor in batch)
        return {"cross_entropy": F.cross_entropy(model(images), labels)}


def run_demo(run_dir: Path, *, seed: int, device: str, is_quick: bool) -> int:
    """Train the reference unless `run_dir` has it, compress it there and print what came out.

    Returns:
        The exit code.
    """
    started = time.monotonic()
    set_verbosity("info")
    Device.of(device).check_available()
    arguments = {"seed": seed, "device": device, "is_quick": is_quick}
    job = JobSpec(f"{__name__}:{make_job.__name__}", "demo", str(Path.cwd()), arguments)
    job.keep(run_dir)  # so that `compressor resume` goes on with it
    engine, _ = job.open(run_dir)
    engine.run()
    assert engine.result is not None
    return present(engine.result, run_dir, time.monotonic() - started, as_json=False)


def make_job(
    run_dir: Path, seed: int = 0, device: str = "cpu", is_quick: bool = False
) -> dict[str, Any]:
    """The demo's job; the reference is trained unless `run_dir` has it."""
    place = Device.of(device)
    data = digit_loaders()
    model = trained_reference(
        run_dir, data["train"], epochs=10 if is_quick else 25, seed=seed, device=place
    )
    return {
        "model": model,
        "data": data,
        "config": demo_config(run_dir, seed=seed, device=place, is_quick=is_quick),
        "forward_pass": TorchForwardPass(model_input_pattern=(0, "_")),
        "eval_func": Accuracy(),
        "loss_function_cls": CrossEntropy,
        "loss_function_kwargs": {},
    }


def demo_config(run_dir: Path, *, seed: int, device: Device, is_quick: bool) -> dict[str, Any]:
    """What the demo asks of the engine: the lowest latency within one point of accuracy."""
    on_gpu = device is Device.GPU
    sgd = {"name": "SGD", "lr": 0.05, "momentum": 0.9, "weight_decay": 5e-4, "nesterov": True}
    return {
        "delta": 1.0,
        "optimization": "latency",
        "eval_key": "accuracy",
        "device": device,
        "target": {
            "runtime": "eager" if on_gpu else "onnxruntime",
            "device": "cuda" if on_gpu else "cpu",
            "threads": 1,
            "batch_size": 1,
        },
        "full_trainer": {"optimizer": sgd, "epochs": 6 if is_quick else 20},
        "fine_tuner": {"loop_params": {"optimizer": sgd, "epochs": 1 if is_quick else 3}},
        "budget": {"minutes": 1.0 if is_quick else 2.5},
        "run_dir": str(run_dir),
        "seed": seed,
    }


def trained_reference(
    run_dir: Path,
    loader: DataLoader[tuple[Tensor, ...]],
    *,
    epochs: int,
    seed: int,
    device: Device,
) -> DigitsNet:
    """The reference on the CPU, trained now or read from `run_dir`.

    Raises:
        StudyError: if `run_dir` has a reference of another demo, or cannot be written.
        CheckpointError: if the saved reference is damaged.
    """
    path = run_dir / "reference.safetensors"
    origin = {"epochs": str(epochs), "seed": str(seed), "device": device.value}
    with isolated_rng(seed):
        model = DigitsNet()
        if path.exists():
            model.load_state_dict(_read_weights(path, origin))
            return model.eval()
        _make_folder(run_dir)
        train(model, loader, epochs=epochs, device=device.torch_device)
    _write_weights(path, model.cpu().state_dict(), origin)
    return model.eval()


def train(
    model: nn.Module,
    loader: DataLoader[tuple[Tensor, ...]],
    *,
    epochs: int,
    device: torch.device,
) -> None:
    """Train `model` in place by SGD with one cycle of the learning rate; leave it on `device`."""
    model.to(device).train()
    optimizer = torch.optim.SGD(
        model.parameters(), lr=PEAK_LR, momentum=0.9, weight_decay=5e-4, nesterov=True
    )
    steps = epochs * len(loader)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LR, total_steps=steps)
    with Progress() as progress, progress.task("training the reference", steps) as advance:
        for _ in range(epochs):
            for images, labels in loader:
                optimizer.zero_grad()
                loss = F.cross_entropy(model(images.to(device)), labels.to(device))
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                schedule.step()
                advance(note=f"loss {loss.item():.3f}")


def _make_folder(run_dir: Path) -> None:
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / ".writable").touch()
        (run_dir / ".writable").unlink()
    except OSError as error:
        raise StudyError(
            f"The run directory {run_dir} cannot be written: {error.strerror or error}. "
            "Give another one with --run-dir."
        ) from error


def _read_weights(path: Path, origin: Mapping[str, str]) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            found = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"The reference saved in {path} is damaged: {error}. "
            "Remove the folder, and the demo trains it again."
        ) from error
    if found != origin:
        raise StudyError(
            f"The reference in {path} is of another demo: {found} instead of {dict(origin)}. "
            "Give another --run-dir, or the options of that demo."
        )
    return weights


def _write_weights(path: Path, weights: dict[str, Tensor], origin: Mapping[str, str]) -> None:
    data = save(weights, metadata=dict(origin))
    try:
        write_bytes(path, data)
    except OSError as error:
        raise StudyError(
            f"The reference could not be saved to {path}: {error.strerror or error}. "
            "Free some space, or give another folder with --run-dir."
        ) from error
