"""Channel groups of a model, each verified: pruned equals masked, or the group is quarantined.

A group is offered only after a copy of the model without some of its channels gave the same output
as the whole model with those channels masked where they are consumed.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from compressor.errors import ModelError, SurgeryError, first_line
from compressor.interfaces.inputs import ModelInputs, output_tensors
from compressor.structure.dependency import candidate_groups
from compressor.structure.groups import ChannelGroup, ChannelMap, Member
from compressor.structure.layers import layer_axis
from compressor.structure.surgery import get, keep_channels, undone
from compressor.structure.trace import (
    FORWARD_FAILURES,
    copy_model,
    eval_mode,
    run,
)

TOLERANCE = 1e-9  # float64 leaves errors near 1e-15, summed in another order
VISIBLE = 1e-10  # a smaller change of the output would be rounding, and prove nothing
ROUNDING = 1e-13  # what float64 leaves in any case
CLARITY = 1e-3  # the error of the cut, as a fraction of the change that the cut makes
PROBE_SEED = 0  # of the perturbations and subsets: the same groups in every run


def find_groups(model: nn.Module, inputs: ModelInputs) -> ChannelMap:
    """All channel groups of `model`, verified. The model is not changed.

    Groups whose channels are the model's outputs are left out: there is nothing to prune.

    Args:
        model: on any device; the check runs on the CPU in float64.
        inputs: real ones, for one call; two samples of them are used.

    Raises:
        ModelError: if the model cannot be copied, or does not run on `inputs`.
    """
    probe, inputs, dense = _start(model, inputs)
    try:
        candidates = candidate_groups(probe, inputs)
    except FORWARD_FAILURES as error:
        reason = f"torch-pruning cannot read this model: {first_line(error)}"
        return ChannelMap((), (("", reason),))
    finally:
        probe.requires_grad_(False)
    groups: list[ChannelGroup] = []
    quarantined: list[tuple[str, str]] = []
    for candidate in candidates:
        if candidate.group is None:
            quarantined.append((candidate.name, candidate.reason))
            continue
        fault = _fault(probe, inputs, dense, candidate.group)
        if fault is None:
            groups.append(candidate.group)
        elif fault is not _IS_OUTPUT:
            quarantined.append((candidate.name, fault))
    return ChannelMap(tuple(groups), tuple(quarantined))


def verify_group(model: nn.Module, inputs: ModelInputs, group: ChannelGroup) -> str | None:
    """Why `group` cannot be pruned from `model`, in a sentence; None if it can. Changes nothing.

    Raises:
        ModelError: if the model cannot be copied, or does not run on `inputs`.
    """
    return _fault(*_start(model, inputs), group)


def make_probe(model: nn.Module) -> nn.Module:
    """A copy of `model` in float64 on which no channel hides: for checks only.

    A layer that starts at zero (the last norm of a block, a classifier) hides every error before
    it, one with equal entries hides permutations: both get random values, and so do the running
    statistics of the norms.
    """
    probe = copy_model(model).cpu().double().eval().requires_grad_(True)
    generator = torch.Generator().manual_seed(PROBE_SEED)

    def positive(like: Tensor) -> Tensor:
        return torch.rand(like.shape, generator=generator, dtype=like.dtype) + 0.5

    with torch.no_grad():
        for parameter in probe.parameters():
            is_constant = parameter.numel() > 1 and bool(
                (parameter == parameter.flatten()[0]).all()
            )
            if is_constant or not parameter.any():
                parameter.copy_(positive(parameter))
        for module in probe.modules():
            if isinstance(module, _NormBase) and module.running_mean is not None:
                assert module.running_var is not None
                module.running_mean += positive(module.running_mean) - 1
                module.running_var *= positive(module.running_var)
    return probe


_IS_OUTPUT = "Its channels are the model's outputs."


def _start(model: nn.Module, inputs: ModelInputs) -> tuple[nn.Module, ModelInputs, list[Tensor]]:
    """The probe of `model`, two samples for it, and its outputs before any cut."""
    probe, inputs = make_probe(model), inputs.to("cpu").with_batch(2).double()
    with torch.no_grad():
        run(probe, inputs)
    return probe, inputs, _outputs(probe, inputs)


def _outputs(model: nn.Module, inputs: ModelInputs) -> list[Tensor]:
    with eval_mode(model), torch.no_grad():
        outputs = output_tensors(inputs.call(model))
    if not outputs:
        raise ModelError(
            "The model returns no floating point tensor, so no change of it could be seen. "
            "Return the scores, not the classes."
        )
    return outputs


def _fault(
    probe: nn.Module, inputs: ModelInputs, dense: list[Tensor], group: ChannelGroup
) -> str | None:
    """The masked-dense check of `group` on two subsets of its channels."""
    if group.size < 2:
        return "It has a single channel, so none can be removed."
    largest_effect = 0.0
    for kept in _subsets(group.size):
        cut = f"Without {group.size - len(kept)} of its {group.size} channels"
        try:
            with undone(probe):
                keep_channels(probe, group, kept)
                outputs = _outputs(probe, inputs)
        except SurgeryError as refusal:
            return str(refusal)
        except FORWARD_FAILURES as failure:
            return f"{cut} the model does not run: {first_line(failure)}"
        if [out.shape for out in outputs] != [out.shape for out in dense]:
            return _IS_OUTPUT
        masked = _masked_outputs(probe, inputs, group, kept)
        error, effect = _relative_error(outputs, masked), _relative_error(masked, dense)
        if not error <= min(TOLERANCE, max(CLARITY * effect, ROUNDING)):
            return f"{cut} the output is off by {error:.1e} of what masking them gives."
        largest_effect = max(largest_effect, effect)
    if largest_effect < VISIBLE:
        return f"Removing its channels changes the output by {effect:.0e}: that proves nothing."
    return None


def _subsets(size: int) -> list[list[int]]:
    """Two choices of channels to keep: about two thirds, and a single one."""
    order = torch.randperm(size, generator=torch.Generator().manual_seed(PROBE_SEED)).tolist()
    return [sorted(order[max(1, size // 3) :]), [order[0]]]


def _masked_outputs(
    probe: nn.Module, inputs: ModelInputs, group: ChannelGroup, kept: Sequence[int]
) -> list[Tensor]:
    """Outputs of the whole model when nobody reads the channels that are not kept."""
    saved: list[tuple[Tensor, Tensor]] = []
    pruned = sorted(set(range(group.size)) - set(kept))
    try:
        for member in group.consumers:
            for weight, dim in _weights(probe, member):
                entries = [entry for channel in pruned for entry in member.index[channel]]
                saved.append((weight, weight.detach().clone()))
                with torch.no_grad():
                    weight.index_fill_(dim, torch.tensor(entries, dtype=torch.long), 0.0)
        return _outputs(probe, inputs)
    finally:
        for weight, values in reversed(saved):
            with torch.no_grad():
                weight.copy_(values)


def _weights(model: nn.Module, member: Member) -> list[tuple[Any, int]]:
    layer = get(model, member.module)
    return [(getattr(layer, key), dim) for key, dim in layer_axis(layer, member.side).tensors]


def _relative_error(outputs: list[Tensor], expected: list[Tensor]) -> float:
    """Largest difference, as a fraction of the largest value of the same output."""
    worst = 0.0
    for output, target in zip(outputs, expected, strict=True):
        if not target.numel():
            continue
        scale = target.abs().max().item() or 1.0
        error = ((output - target).abs().max() / scale).item()
        worst = max(worst, error if error == error else inf)
    return worst


__all__ = ["ChannelGroup", "ChannelMap", "Member", "find_groups", "make_probe", "verify_group"]
