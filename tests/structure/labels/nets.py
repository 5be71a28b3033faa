"""Small nets written in one line, and the masked model computed by hand."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from compressor.interfaces.inputs import ModelInputs, output_tensors
from compressor.structure.cutting import keep_many
from compressor.structure.groups import ChannelGroup, ChannelMap

Cuts = Sequence[tuple[ChannelGroup, Sequence[int]]]


class Net(nn.Module):
    """Layers and parameters by name, and the function that calls them."""

    def __init__(self, call: Callable[..., Any], **parts: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.call = call
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.call(self, *args, **kwargs)


def rows(*shape: int) -> ModelInputs:
    """Random numbers of this shape; equal shapes give equal numbers."""
    return ModelInputs((torch.randn(shape, generator=torch.Generator().manual_seed(0)),))


def tokens(count: int = 32) -> ModelInputs:
    """Two texts of five tokens."""
    return ModelInputs((torch.arange(10).reshape(2, 5) % count,))


def randomized(model: nn.Module, seed: int = 0) -> nn.Module:
    """`model` in float64 and eval mode, in place, with random values that hide no channel."""
    generator = torch.Generator().manual_seed(seed)
    model.double().eval()
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if tensor.is_floating_point():
                values = torch.rand(tensor.shape, generator=generator, dtype=tensor.dtype)
                fan_in = max(tensor[0].numel(), 1) if tensor.dim() > 1 else 1
                is_positive = tensor.dim() < 2 or name.endswith("running_var")
                width = math.sqrt(3 / fan_in)  # of a uniform distribution that keeps the scale
                tensor.copy_(values + 0.5 if is_positive else (2 * values - 1) * width)
    return model


def sizes(found: ChannelMap) -> dict[str, int]:
    """Number of channels of each group."""
    return {group.name: group.size for group in found.groups}


def named(found: ChannelMap, name: str) -> ChannelGroup:
    """The group called `name`."""
    return next(group for group in found.groups if group.name == name)


def masked_outputs(model: nn.Module, inputs: ModelInputs, cuts: Cuts) -> list[Tensor]:
    """What the whole model gives with zeros wherever a tensor would lose entries."""
    masked = copy.deepcopy(model)
    if any(not step.program for group, _ in cuts for step in group.prepared):
        keep_many(masked, [(group, range(group.size)) for group, _ in cuts])  # only ours for theirs
    tensors = {**dict(masked.named_parameters(remove_duplicate=False))}
    tensors |= dict(masked.named_buffers(remove_duplicate=False))
    with torch.no_grad():
        for group, kept in cuts:
            for member in group.members:
                if member.side == "out" and member.tensor.endswith("original1"):
                    continue  # a direction of zeros has no norm; its scale is zero already
                for channel in set(range(group.size)) - set(kept):
                    for entry in member.index[channel]:
                        tensors[member.tensor].select(member.dim, entry).zero_()
        return output_tensors(inputs.call(masked))


def pruned_outputs(model: nn.Module, inputs: ModelInputs, cuts: Cuts) -> list[Tensor]:
    """What a copy gives from which the channels are cut."""
    pruned = copy.deepcopy(model)
    keep_many(pruned, cuts)
    with torch.no_grad():
        return output_tensors(inputs.call(pruned))


def assert_same(outputs: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """Equal up to sums in another order."""
    for output, other in zip(outputs, expected, strict=True):
        torch.testing.assert_close(output, other, rtol=1e-9, atol=1e-9)


def assert_prunes_exactly(model: nn.Module, inputs: ModelInputs, found: ChannelMap) -> None:
    """Each group alone, then all at once: pruned equals masked, and differs from the whole."""
    probe, inputs = randomized(copy.deepcopy(model)), inputs.double()
    whole = masked_outputs(probe, inputs, [])
    assert found.groups
    cuts = [(group, range(1, group.size)) for group in found.groups]
    for trial in [*([cut] for cut in cuts), [(g, range(0, g.size, 2)) for g in found.groups]]:
        expected = masked_outputs(probe, inputs, trial)
        assert_same(pruned_outputs(probe, inputs, trial), expected)
    assert any(not torch.allclose(a, b) for a, b in zip(expected, whole, strict=True))
