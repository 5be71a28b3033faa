"""Products by a constant matrix as linear operations, and each shared weight by one name.

x @ w, mm, addmm      w (in, out): the layers of GPT-2
x @ w.T               w (out, in): an embedding that is the last layer as well
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping
from operator import attrgetter
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from compressor.quantization.operations import LINEAR

aten: Any = torch.ops.aten
MATMULS = frozenset({aten.matmul.default, aten.mm.default})
ADDMM = aten.addmm.default


def name_by_callers(
    module: fx.GraphModule, operations: Collection[Any]
) -> Mapping[str, tuple[str, ...]]:
    """Call each shared parameter by the name that it has in the layer that uses it, in place.

    Args:
        module: a graph whose nodes say which module they were traced from.
        operations: of layers: what an embedding shares with a linear layer has that one's name.

    Returns:
        All names of each shared parameter, by the one that the graph has now.
    """
    paths: dict[int, list[str]] = defaultdict(list)
    for path, parameter in module.named_parameters(remove_duplicate=False):
        paths[id(parameter)].append(path)
    found = {}
    layers = [node for node in module.graph.nodes if node.target in operations]
    for node in module.graph.nodes:
        known = paths.get(id(_value(module, node)), []) if node.op == "get_attr" else []
        if len(known) > 1:
            owners = {path.rpartition(".")[0]: path for path in known}
            callers = (_caller(user) for user in layers if user in node.users)
            node.target = next((owners[name] for name in callers if name in owners), node.target)
            found[str(node.target)] = tuple(known)
    module.recompile()
    return found


def write_as_linear(module: fx.GraphModule) -> None:
    """Put linear operations for products by a parameter, in place.

    A parameter (in, out) that is used for nothing else becomes one (out, in) of the same name and
    in the same memory: what is written to one, the other has.
    """
    upright: dict[str, list[fx.Node]] = defaultdict(list)
    for node in list(module.graph.nodes):
        factor = _factor(module, node)
        if factor is None:
            continue
        if factor.op != "get_attr":
            _put_linear(module, node, factor.all_input_nodes[0])
        else:
            upright[str(factor.target)].append(node)
    for path, nodes in upright.items():
        matrices = module.graph.find_nodes(op="get_attr", target=path)
        if {user for matrix in matrices for user in matrix.users} == set(nodes):
            _transpose(module, path, matrices)
            for node in nodes:
                _put_linear(module, node, cast(fx.Node, _factor(module, node)))
    module.graph.eliminate_dead_code()
    module.recompile()


def _caller(node: fx.Node) -> str:
    """The module that the operation was traced in; a second call of one is marked by an @."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    return str(stack[-1][0]).partition("@")[0] if stack else ""


def _factor(module: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    """The parameter on the right of a product of matrices, or what swaps its two dimensions."""
    if node.kwargs or node.target not in MATMULS | {ADDMM}:
        return None
    *bias, source, factor = cast(tuple[fx.Node, ...], node.args)
    matrix = factor.all_input_nodes[0] if _is_swap(factor) else factor
    if source.meta["val"].dim() < 2 or not _is_parameter(module, matrix, dims=2):
        return None
    return factor if all(_is_parameter(module, item, dims=1) for item in bias) else None


def _is_parameter(module: fx.GraphModule, node: fx.Node, *, dims: int) -> bool:
    if node.op != "get_attr":
        return False
    value = _value(module, node)
    return isinstance(value, nn.Parameter) and value.dim() == dims


def _is_swap(node: fx.Node) -> bool:
    """Whether it exchanges the two dimensions of a matrix."""
    if node.target in {aten.t.default, aten.numpy_T.default}:
        return True
    if node.target is aten.transpose.int:
        first, second = cast(tuple[int, int], node.args[1:])
        return first % 2 != second % 2
    order = cast(list[int], node.args[1]) if node.target is aten.permute.default else []
    return [dim % 2 for dim in order] == [1, 0]


def _put_linear(module: fx.GraphModule, node: fx.Node, matrix: fx.Node) -> None:
    *bias, source, _ = node.args
    with module.graph.inserting_before(node):
        product = module.graph.call_function(LINEAR, (source, matrix, *bias))
    product.meta = dict(node.meta)
    node.replace_all_uses_with(product)
    module.graph.erase_node(node)


def _transpose(module: fx.GraphModule, path: str, matrices: Collection[fx.Node]) -> None:
    owner, _, name = path.rpartition(".")
    value = module.get_parameter(path)
    swapped = nn.Parameter(value.detach().t(), requires_grad=value.requires_grad)
    module.get_submodule(owner).register_parameter(name, swapped)
    for matrix in matrices:
        matrix.meta = {**matrix.meta, "val": swapped}


def _value(module: fx.GraphModule, node: fx.Node) -> Tensor:
    value: Tensor = attrgetter(str(node.target))(module)
    return value
