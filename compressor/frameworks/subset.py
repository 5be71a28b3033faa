"""A small fixed sample of the training data: damage is measured and batch norms estimated on it.

It is drawn once, from the training split alone, under the run's seed: the judged split is not
looked at.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from compressor.interfaces.data import kept_generators, sample_count
from compressor.interfaces.inputs import ModelInputs, output_tensors, tensor_bytes
from compressor.seeding import isolated_rng

SAMPLES = 256
PART_BYTES = 256 * 2**20  # of the largest tensor in a pass over a part


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


def parts_of(subset: Subset, sample_bytes: int) -> tuple[ModelInputs, ...]:
    """The samples in as few calls as memory allows; as they came if they do not fit together.

    Args:
        subset: its own batches are known to fit into memory.
        sample_bytes: of the largest tensor that a call of one sample makes.
    """
    joined = _joined(subset.inputs)
    if joined is None:
        return subset.inputs
    own = max(inputs.batch_size for inputs in subset.inputs)
    return tuple(joined.parts(max(own, PART_BYTES // max(sample_bytes, 1))))


def _joined(inputs: Sequence[ModelInputs]) -> ModelInputs | None:
    """One call of all samples; None if they differ in more than their number."""
    if any(each.image_count is not None for each in inputs):
        return None
    flat = [pytree.tree_flatten((each.args, dict(each.kwargs))) for each in inputs]
    form = flat[0][1]
    if any(other != form for _, other in flat):
        return None
    leaves = []
    for values in zip(*(leaves for leaves, _ in flat), strict=True):
        joined = _join(values, [each.batch_size for each in inputs])
        if joined is None:
            return None
        leaves.append(joined[0])
    args, kwargs = pytree.tree_unflatten(leaves, form)
    return ModelInputs(args, kwargs)


def _join(values: Sequence[Any], sizes: Sequence[int]) -> tuple[Any] | None:
    """What stands for one leaf of several calls; None if nothing can."""
    if not isinstance(values[0], Tensor):
        return (values[0],) if all(value == values[0] for value in values) else None
    shapes = [tuple(value.shape[1:]) for value in values]
    has_samples = all(v.dim() and len(v) == size for v, size in zip(values, sizes, strict=True))
    if has_samples and len(set(shapes)) == 1:
        return (torch.cat(list(values)),)
    first = values[0]
    is_shared = all(v.shape == first.shape and torch.equal(v, first) for v in values)
    return (first,) if is_shared else None


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
