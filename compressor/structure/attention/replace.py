"""Which attention modules are replaced by ours, and the replacing."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from compressor.errors import ModelError
from compressor.structure import surgery
from compressor.structure.attention.multihead import PrunableMultiheadAttention
from compressor.structure.attention.window import PrunableGridAttention, PrunableWindowAttention

# By name: torchvision takes a second to import, and a model that needs it has done so.
_BUILDERS: dict[str, Callable[[Any], nn.Module]] = {
    "torch.nn.modules.activation.MultiheadAttention": PrunableMultiheadAttention,
    "torchvision.models.swin_transformer.ShiftedWindowAttention": PrunableWindowAttention,
    "torchvision.models.swin_transformer.ShiftedWindowAttentionV2": PrunableWindowAttention,
    "torchvision.models.maxvit.RelativePositionalMultiHeadAttention": PrunableGridAttention,
}
_PARTS = (nn.Linear, NonDynamicallyQuantizableLinear, nn.Sequential, nn.ReLU)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def is_replaceable(module: nn.Module) -> bool:
    """Whether `make_prunable` takes it.

    `nn.MultiheadAttention` and the attention of torchvision's Swin and MaxViT, as their libraries
    made them: without hooks, parametrizations, other layers inside or a `forward` of their own.
    """
    return (
        _class_name(module) in _BUILDERS
        and all(type(part) in _PARTS for part in module.modules() if part is not module)
        and not any(getattr(part, hooks) for part in module.modules() for hooks in _HOOKS)
        and "forward" not in vars(module)
    )


def make_prunable(module: nn.Module) -> nn.Module:
    """A new module that computes what `module` does and can lose heads. It shares no tensor.

    Its children `q`, `k`, `v` and `out` are linear layers, whose widths alone say how many heads of
    `head_dim` entries there are. Dtype, device, mode and the parameters' `requires_grad` are those
    of `module`.

    Raises:
        ModelError: if `is_replaceable` says no.
    """
    if not is_replaceable(module):
        raise ModelError(
            f"No module that can lose heads stands for this {type(module).__name__}. "
            "Ask `is_replaceable` first; take off its hooks and parametrizations."
        )
    return _BUILDERS[_class_name(module)](module)


def replace_attention(model: nn.Module) -> tuple[str, ...]:
    """Put `make_prunable` in place of every `is_replaceable` module below the root of `model`.

    A module that hangs in several places is replaced in all of them. One that shares a parameter
    with another module stays, as the tie would be lost.

    Returns:
        The first name of each module that was replaced.
    """
    names: dict[int, list[str]] = defaultdict(list)
    tensors: dict[int, list[str]] = defaultdict(list)
    for name, module in model.named_modules(remove_duplicate=False):
        names[id(module)].append(name)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        tensors[id(parameter)].append(name)
    replaced = [
        (name, module)
        for name, module in model.named_modules()
        if name
        and is_replaceable(module)
        and all(_is_own(tensors[id(p)], names[id(module)]) for p in module.parameters())
    ]
    for name, module in replaced:
        surgery.replace(model, name, make_prunable(module))
    return tuple(name for name, _ in replaced)


def _class_name(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _is_own(tensor_names: Sequence[str], places: Sequence[str]) -> bool:
    """Whether a tensor hangs in a module that hangs in `places`, there once, and nowhere else."""
    prefixes = tuple(f"{place}." for place in places)
    return len(tensor_names) == len(places) and all(
        name.startswith(prefixes) for name in tensor_names
    )
