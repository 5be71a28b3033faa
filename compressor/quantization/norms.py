"""Batch norms that are left in a graph as operations, folded into the product before them.

`structure.fusion` folds those that are modules of torch's own; classes that do more than the norm
(an activation function as well) keep theirs, and are folded here, in the graph alone.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from compressor.structure.fusion import fold_batchnorm, scale_and_shift

aten: Any = torch.ops.aten
NORM = aten._native_batch_norm_legit_no_training.default


def fold_norms(module: fx.GraphModule, products: frozenset[Any]) -> int:
    """Fold what can be folded, in place; the parameters that change are new ones.

    Args:
        module: a functional graph in evaluation mode.
        products: the operations whose weight and bias are constants in positions 1 and 2.

    Returns:
        How many were folded.
    """
    norms = [node for node in module.graph.nodes if node.target is NORM]
    folded = sum(_fold(module, node, products) for node in norms)
    module.graph.eliminate_dead_code()
    module.recompile()
    return folded


def _fold(module: fx.GraphModule, norm: fx.Node, products: frozenset[Any]) -> bool:
    product, weight, bias, mean, variance, _, eps = cast(tuple[Any, ...], norm.args)
    if not isinstance(product, fx.Node) or product.target not in products:
        return False
    layer_weight, layer_bias = cast(tuple[Any, ...], (*product.args[:3], None)[1:3])
    owned = [item for item in (layer_weight, layer_bias) if item is not None]
    if len(product.users) > 1 or not all(_is_own(item) for item in owned):
        return False
    if not all(_is_constant(item) for item in (weight, bias, mean, variance)):
        return False
    if product.target is aten.linear.default and product.meta["val"].dim() != 2:
        return False  # it normalises another dimension than the product makes
    scale, shift = scale_and_shift(
        None if weight is None else _value(module, weight),
        None if bias is None else _value(module, bias),
        _value(module, mean),
        _value(module, variance),
        eps,
    )
    path = str(layer_weight.target)
    folded = fold_batchnorm(
        _value(module, layer_weight).detach(),
        None if layer_bias is None else _value(module, layer_bias).detach(),
        scale,
        shift,
    )
    owner = module.get_submodule(path.rpartition(".")[0])
    bias_name = "bias" if layer_bias is None else str(layer_bias.target).rpartition(".")[2]
    while layer_bias is None and hasattr(owner, bias_name):
        bias_name += "_folded"  # the module has a bias of its own, for something else
    for name, value in zip((path.rpartition(".")[2], bias_name), folded, strict=True):
        owner._buffers.pop(name, None)
        owner.register_parameter(name, nn.Parameter(value))
    if layer_bias is None:
        _give_bias(module, product, f"{path.rpartition('.')[0]}.{bias_name}".lstrip("."))
    for part in list(norm.users):  # of three results only the first is read
        part.replace_all_uses_with(product)
        module.graph.erase_node(part)
    module.graph.erase_node(norm)
    return True


def _give_bias(module: fx.GraphModule, product: fx.Node, path: str) -> None:
    with module.graph.inserting_before(product):
        bias = module.graph.get_attr(path)
    bias.meta = {"val": module.get_parameter(path)}
    product.args = (*product.args[:2], bias, *product.args[3:])


def _is_constant(item: object) -> bool:
    return item is None or (isinstance(item, fx.Node) and item.op == "get_attr")


def _is_own(item: object) -> bool:
    """Whether it is a constant that nobody else reads."""
    return isinstance(item, fx.Node) and item.op == "get_attr" and len(item.users) == 1


def _value(module: fx.GraphModule, item: Any) -> Tensor:
    owner, _, name = str(item.target).rpartition(".")
    value: Tensor = getattr(module.get_submodule(owner), name)
    return value
