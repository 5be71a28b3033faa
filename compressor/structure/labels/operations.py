"""The names of operations, which of them are alike, and the registry of rules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

Rule = Callable[..., Any]
RULES: dict[str, Rule] = {}

MADE_NEW = frozenset("aten.new_zeros aten.new_ones aten.new_full aten.new_empty".split())
FACTORIES = MADE_NEW | frozenset(
    "aten.zeros aten.ones aten.full aten.empty aten.scalar_tensor aten.zeros_like aten.ones_like "
    "aten.full_like aten.empty_like".split()
)
# Elementwise, and not tagged so.
ELEMENTWISE = frozenset(
    "aten.hardswish aten.hardsigmoid aten.hardtanh aten.relu6 aten.fill aten.fill_ aten.clamp "
    "aten.masked_fill aten.where aten.lerp aten.rrelu aten.rrelu_with_noise aten.threshold "
    "aten.celu aten.selu aten.logical_not aten.nan_to_num aten.rsub aten.square aten.softplus "
    "aten.log_sigmoid aten.log_sigmoid_forward aten.addcmul aten.addcdiv aten.hardshrink "
    "aten.softshrink aten.floor_divide aten.remainder aten.true_divide aten.isnan aten.isinf "
    "aten.expand_as aten.glu_jvp aten.silu aten.mish aten.gelu".split()
)


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule for the operations called so, such as "aten.view".

    A rule takes the flow, the node, and the node's arguments with a `Value` for each tensor; it
    returns a `Value`, or a tuple of them.
    """

    def register(function: Rule) -> Rule:
        for name in names:
            assert name not in RULES, name
            RULES[name] = function
        return function

    return register


def operation(node: fx.Node) -> str:
    """`aten.add` for `aten.add.Tensor`."""
    packet = getattr(node.target, "overloadpacket", None)
    if packet is None:
        return getattr(node.target, "__name__", str(node.target))
    return str(packet).removeprefix("torch.ops.")


def is_pointwise(node: fx.Node) -> bool:
    """Whether every entry of the result depends on the entries at its place alone."""
    tags = getattr(node.target, "tags", ())
    is_elementwise = torch.Tag.pointwise in tags or operation(node) in ELEMENTWISE
    return is_elementwise and isinstance(node.meta.get("val"), Tensor)
