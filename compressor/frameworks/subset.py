"""A small fixed sample of the training data: damage is measured and batch norms estimated on it.

It is drawn once, from the training split alone, under the run's seed: the judged split is not
looked at.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compressor.interfaces.data import kept_generators, sample_count
from compressor.interfaces.inputs import ModelInputs, output_tensors, tensor_bytes
from compressor.seeding import isolated_rng

SAMPLES = 256


@dataclass(frozen=True)
class Subset:
    """Batches as the loader gave them, and the calls of the model that they become (on the CPU)."""

    batches: tuple[Any, ...]
    inputs: tuple[ModelInputs, ...]

    @property
    def samples(self) -> int:
        """How many samples there are."""
        return sum(inputs.batch_size for inputs in self.inputs)

    def digest(self) -> str:
        """Of the inputs' bytes."""
        found = hashlib.sha256()
        for inputs in self.inputs:
            for tensor in inputs.tensors():
                found.update(tensor_bytes(tensor))
        return found.hexdigest()[:16]


def draw_subset(
    loader: Iterable[Any],
    to_inputs: Callable[[Any], ModelInputs],
    seed: int,
    samples: int = SAMPLES,
) -> Subset:
    """The first batches of `loader`, until there are `samples` samples; shuffling is seeded."""
    batches, count = [], 0
    with isolated_rng(seed), kept_generators(loader):
        for batch in loader:
            batches.append(batch)
            count += sample_count(batch)
            if count >= samples:
                break
    return Subset(tuple(batches), tuple(to_inputs(batch) for batch in batches))


def model_digest(model: nn.Module) -> str:
    """Of structure (module classes and names) and state."""
    found = hashlib.sha256()
    for name, module in model.named_modules():
        found.update(f"{name}:{type(module).__qualname__};".encode())
    for name, tensor in model.state_dict().items():
        found.update(f"{name}:{tuple(tensor.shape)}:{tensor.dtype};".encode())
        found.update(tensor_bytes(tensor))
    return found.hexdigest()[:16]


@torch.no_grad()
def outputs_on(
    model: Callable[..., Any], inputs: Iterable[ModelInputs], device: torch.device
) -> Iterator[list[Tensor]]:
    """The floating point outputs of each call, on the CPU in float32."""
    for call in inputs:
        tensors = output_tensors(call.to(device).call(model))
        yield [tensor.detach().float().cpu() for tensor in tensors]
