"""Which module each node of a file is of, said in the node's name: "layer1.0/node_relu"."""

from __future__ import annotations

import ast
from collections.abc import Callable
from typing import Any

from onnx import NodeProto
from torch import fx, nn

from compressor.quantization.graph import is_tensor
from compressor.quantization.graph_state import add_child
from compressor.quantization.operations import LSTM

OPERATIONS = "operations"
METADATA_KEY = "pkg.torch.onnx.name_scopes"


def keep_scopes(module: fx.GraphModule) -> None:
    """Let the operations of a graph run inside modules of their own scopes' names, in place.

    The exporter names the modules that it sees running, and in a graph there are none left.
    """
    holder = nn.Module()
    path = add_child(module, OPERATIONS, holder)
    for number, node in enumerate(list(module.graph.nodes)):
        stack = node.meta.get("nn_module_stack")
        if node.op != "call_function" or not stack or not (is_tensor(node) or node.target is LSTM):
            continue
        scope = [name for name, _ in stack.values()][-1]
        name = f"{number}:{scope.replace('.', '/')}"
        holder.add_module(name, _Operation(node.target))
        with module.graph.inserting_before(node):
            inside = module.graph.call_module(f"{path}.{name}", node.args, node.kwargs)
        inside.meta = node.meta
        node.replace_all_uses_with(inside)
        module.graph.erase_node(node)


class _Operation(nn.Module):
    def __init__(self, operation: Callable[..., Any]) -> None:
        super().__init__()
        self._operation = operation

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._operation(*args, **kwargs)


def scope_of(node: NodeProto) -> str:
    """The module that a node is of, from what the exporter noted; "" for the model itself."""
    for entry in node.metadata_props:
        if entry.key == METADATA_KEY:
            modules = ast.literal_eval(entry.value)[:-1]  # the last is the operation
            path = modules[-1].removeprefix("model").removeprefix(".") if modules else ""
            if path.startswith(OPERATIONS) and ":" in path:  # of `keep_scopes`
                path = path.partition(":")[2].replace("/", ".")
            return str(path)
    return ""
