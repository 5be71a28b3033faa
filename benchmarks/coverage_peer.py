"""What `benchmarks.coverage` finds out about torch-pruning alone, driven as its README says.

`BasePruner` with magnitude importance and 30 % of every layer, the last layers left out. Its result
is compared with the whole model whose removed channels nobody makes and nobody reads. A layer norm
that lost entries has other statistics, so there the two differ by design.
"""

from __future__ import annotations

import time
import warnings
from collections import defaultdict
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn

from benchmarks.coverage_checks import (
    EQUAL,
    PRUNED_FRACTION,
    attempt,
    make,
    output_channels,
    outputs_of,
    relative_error,
)
from benchmarks.coverage_models import Case
from benchmarks.limits import Report
from compressor.interfaces.inputs import ModelInputs, output_tensors
from compressor.structure.trace import copy_model

Removed = dict[tuple[str, str], set[int]]  # (module, "in" or "out") -> entries of the whole model
NORMS = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.LayerNorm, nn.InstanceNorm2d)
# the last layers of torchvision's detectors
HEADS = ("cls_logits", "bbox_pred", "cls_score", "bbox_reg", "bbox_ctrness", "mask_fcn_logits")
HEADS += ("kps_score_lowres", "head.classification_head", "head.regression_head")


def check_peer(case: Case, seed: int, report: Report) -> None:
    """Everything about torch-pruning; reported as soon as it is known."""
    report(stage="building the model")
    model, inputs = make(case, seed)
    model, inputs = model.double(), inputs.double()
    whole = copy_model(model)
    report(stage="pruning")
    began = time.perf_counter()
    removed = prune(model, inputs)
    report(peer_seconds=time.perf_counter() - began)
    report(peer_removed=sum(map(len, removed.values())))
    report(stage="running the pruned model")
    runs = attempt("peer_runs", lambda: outputs_of(model, inputs) is not None)
    report(**runs)
    if runs["peer_runs"]:
        report(**attempt("peer_equal", lambda: equals_masked(model, whole, inputs, removed)))


def prune(model: nn.Module, inputs: ModelInputs) -> Removed:
    """Prune `model` in place and say what went, in entries of the whole model."""
    names = {module: name for name, module in model.named_modules()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pruner = tp.pruner.BasePruner(
            model,
            inputs,
            importance=tp.importance.GroupMagnitudeImportance(),
            pruning_ratio=PRUNED_FRACTION,
            ignored_layers=last_layers(model, inputs),
            forward_fn=lambda module, given: given.call(module),
            output_transform=lambda outputs: [t for t in output_tensors(outputs) if t.grad_fn],
        )
        left: dict[tuple[str, str], list[int]] = {}
        sizes: dict[tuple[str, str], int] = {}
        for group in pruner.step(interactive=True):
            for dependency, indices in group:
                module = dependency.target.module
                if module not in names:
                    continue
                is_out = pruner.DG.is_out_channel_pruning_fn(dependency.handler)
                side = (names[module], "out" if is_out else "in")
                size = (pruner.DG.get_out_channels if is_out else pruner.DG.get_in_channels)(module)
                now = left.setdefault(side, list(range(size)))
                sizes.setdefault(side, size)
                gone = set(indices)
                left[side] = [entry for i, entry in enumerate(now) if i not in gone]
            group.prune()
    return {side: set(range(sizes[side])) - set(entries) for side, entries in left.items()}


def last_layers(model: nn.Module, inputs: ModelInputs) -> list[nn.Module]:
    """The layers as wide as an output of the model, and the heads of a detector."""
    widths = {size for tensor in outputs_of(model, inputs) for size in tensor.shape[1:]}
    layers = [m for m in model.modules() if output_channels(m) in widths]
    layers = layers[-3:] if len(layers) > 3 else layers
    return layers + [m for name, m in model.named_modules() if name.endswith(HEADS)]


def equals_masked(
    pruned: nn.Module, whole: nn.Module, inputs: ModelInputs, removed: Removed
) -> bool | str:
    mask(whole, removed)
    error = relative_error(outputs_of(pruned, inputs), outputs_of(whole, inputs))
    return error <= EQUAL or f"off by {error:.1e} of the masked model"


@torch.no_grad()
def mask(model: nn.Module, removed: Removed) -> None:
    """Zero what makes and what reads the removed channels, in place."""
    by_module: dict[str, dict[str, set[int]]] = defaultdict(dict)
    for (name, side), entries in removed.items():
        by_module[name][side] = entries
    for name, sides in by_module.items():
        module: Any = model.get_submodule(name)
        for side, entries in sides.items():
            for tensor, dim in tensors_of(module, side):
                if tensor is not None and max(entries, default=0) < tensor.shape[dim]:
                    tensor.index_fill_(dim, torch.tensor(sorted(entries)).long(), 0)


def tensors_of(module: Any, side: str) -> list[tuple[Tensor | None, int]]:
    """The tensors of a layer that hold its channels of one side, with the dimension."""
    if isinstance(module, NORMS):
        return [(module.weight, 0), (module.bias, 0)]
    if not isinstance(getattr(module, "weight", None), Tensor) or module.weight.dim() < 2:
        return []
    out = 1 if isinstance(module, nn.modules.conv._ConvTransposeNd) else 0
    if side == "in":
        return [] if getattr(module, "groups", 1) > 1 else [(module.weight, 1 - out)]
    return [(module.weight, out), (getattr(module, "bias", None), 0)]
