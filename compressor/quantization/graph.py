"""A model's graph as quantization sees it: products by a constant weight, and what lies between.

The graph is `torch.export`'s, without in-place operations, with its operations as the user wrote
them; it runs, and trains, on the model's own parameters. Batch norms are folded before.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from math import prod
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from compressor.errors import ModelError, suggest
from compressor.quantization.decompositions import DECOMPOSITIONS
from compressor.quantization.graph_state import check_names, graph_module, graph_state
from compressor.quantization.kinds import Kind
from compressor.quantization.norms import fold_norms
from compressor.quantization.operations import (
    BINARY,
    CLIPPING,
    COMPUTING,
    CONVOLUTIONS,
    LINEAR,
    LSTM,
    MOVING,
    PADDING,
    SPLITTING,
)
from compressor.quantization.recurrent import Recurrence, read_recurrence
from compressor.quantization.tables import Table, find_tables
from compressor.quantization.written_products import name_by_callers, write_as_linear
from compressor.structure.trace import quiet_lstm

aten: Any = torch.ops.aten
FLOAT = torch.float32


@dataclass(frozen=True)
class Product:
    """A convolution or linear layer with the operations that a runtime fuses into it.

    Attributes:
        layer: name of the module that owns the weight; a layer called twice is two products.
        node: the operation.
        weight: path of the parameter.
        bias: path of the parameter; None without one.
        source: what it reads.
        result: what its activation function writes, or itself.
    """

    layer: str
    node: fx.Node
    weight: str
    bias: str | None
    source: fx.Node
    result: fx.Node

    @property
    def is_convolution(self) -> bool:
        """Whether it is a convolution; else it is linear."""
        return self.node.target in CONVOLUTIONS

    @property
    def is_matrix(self) -> bool:
        """Whether it is linear on a matrix (N, in), for which runtimes have a product with bias."""
        return not self.is_convolution and rank(self.source) == 2

    @property
    def tail(self) -> tuple[fx.Node, ...]:
        """The fused activation function, if there is one."""
        return () if self.result is self.node else (self.result,)


class QuantizationGraph:
    """The graph of one program; it is read, and copied to put quantizers in."""

    def __init__(self, program: ExportedProgram) -> None:
        """Read `program`: of a model in evaluation mode, its batch norms folded where they can be.

        Those that are left are folded here: the parameters of these layers are not the model's.

        Raises:
            ModelError: if a module is called as what torch's graphs have, "graph" or "code".
        """
        check_names([*program.state_dict, *program.constants])
        with quiet_lstm():
            functional = program.run_decompositions(dict(DECOMPOSITIONS))
        options = inspect.signature(functional.module).parameters
        self.module: fx.GraphModule = functional.module(
            **({"check_guards": False} if "check_guards" in options else {})
        )
        self._shared = name_by_callers(self.module, CONVOLUTIONS | {LINEAR, LSTM})
        write_as_linear(self.module)
        fold_norms(self.module, CONVOLUTIONS | {LINEAR})
        self._tensors = _tensors(self.module)

    def __getstate__(self) -> dict[str, Any]:
        """For pickle."""
        return {"module": graph_state(self.module), "shared": self._shared}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """With the shapes of one sample."""
        self.module, self._shared = graph_module(state["module"]), state["shared"]
        self._tensors = _tensors(self.module)

    @property
    def nodes(self) -> list[fx.Node]:
        """In the order in which they run."""
        return list(self.module.graph.nodes)

    @cached_property
    def products(self) -> list[Product]:
        """All of them, in the order in which they run."""
        found = []
        for node in self.nodes:
            product = self._product(node)
            if product is not None:
                found.append(product)
        return found

    @cached_property
    def layers(self) -> list[str]:
        """Names of the layers with a product, in the order in which they first run."""
        return list(dict.fromkeys(product.layer for product in self.products))

    @cached_property
    def recurrences(self) -> list[Recurrence]:
        """The LSTMs, in the order in which they run."""
        found = (read_recurrence(node) for node in self.nodes)
        return [item for item in found if item and self._tensors[item.weights[0]].dtype == FLOAT]

    @cached_property
    def recurrent_layers(self) -> list[str]:
        """Names of the layers that are LSTMs, in the order in which they first run."""
        return list(dict.fromkeys(recurrence.layer for recurrence in self.recurrences))

    @cached_property
    def tables(self) -> list[Table]:
        """The embeddings, in the order in which they run."""
        return find_tables(self.nodes, self._tensors, [item.weight for item in self.products])

    @cached_property
    def sites(self) -> list[str]:
        """Names of all that can be quantized: layers, then LSTMs, then embeddings."""
        tables = (table.layer for table in self.tables)
        return list(dict.fromkeys([*self.layers, *self.recurrent_layers, *tables]))

    @property
    def kinds(self) -> Mapping[str, Kind]:
        """What each site is, in the order in which they first run; then embeddings."""
        names = {product.node: product.layer for product in self.products}
        names |= {recurrence.node: recurrence.layer for recurrence in self.recurrences}
        kinds: dict[str, Kind] = {table.layer: "table" for table in self.tables}
        kinds.update({recurrence.layer: "lstm" for recurrence in self.recurrences})
        kinds.update({product.layer: "linear" for product in self.products})
        kinds.update({item.layer: "convolution" for item in self.products if item.is_convolution})
        order = dict.fromkeys(names[node] for node in self.nodes if node in names)
        return {name: kinds[name] for name in [*order, *kinds]}

    @cached_property
    def names(self) -> Mapping[str, str]:
        """Every name of a site, and the one that it goes by here.

        Modules that share a weight are one layer.
        """
        found = {}
        owned: list[tuple[str, tuple[str, ...]]] = [
            (product.layer, (product.weight,)) for product in self.products
        ]
        owned += [(recurrence.layer, recurrence.weights) for recurrence in self.recurrences]
        owned += [(table.layer, (table.weight,)) for table in self.tables]
        for layer, weights in owned:
            for path in chain(*(self._shared.get(weight, ()) for weight in weights)):
                found[path.rpartition(".")[0]] = layer
        return found | {name: name for name in self.sites}

    def tensor(self, path: str) -> Tensor:
        """A parameter or buffer."""
        return self._tensors[path]

    def read_again(self) -> None:
        """See what an edit of `module` has changed; the products of before are no longer true."""
        self.module.graph.lint()
        self.module.recompile()
        self._tensors = _tensors(self.module)
        self.__dict__.pop("products", None)

    def products_of(self, layers: Collection[str]) -> list[Product]:
        """The products of some layers; of LSTMs and embeddings there is none.

        Raises:
            ModelError: if there is no such layer; the message has the nearest name.
        """
        for name in layers:
            if name not in self.sites:
                raise ModelError(
                    f"There is no layer {name!r} with a constant weight to quantize. "
                    f"{suggest(name, self.names)}"
                )
        return [product for product in self.products if product.layer in layers]

    def recurrences_of(self, layers: Collection[str]) -> list[Recurrence]:
        """The LSTMs among some layers."""
        return [item for item in self.recurrences if item.layer in layers]

    def tables_of(self, layers: Collection[str]) -> list[Table]:
        """The embeddings among some layers."""
        return [table for table in self.tables if table.layer in layers]

    def sample_bytes(self) -> int:
        """Bytes of the largest value for one sample; parameters are there anyway."""
        values = (node for node in self.nodes if is_tensor(node) and node.op != "get_attr")
        shapes = (node.meta["val"].shape for node in values)
        # a dimension that is no number is the batch
        entries = (prod(n for n in shape if isinstance(n, int)) for shape in shapes)
        return 4 * max(entries, default=1)

    def is_constant(self, node: fx.Node) -> bool:
        """Whether it is a parameter or a buffer."""
        return node.op == "get_attr"

    def _product(self, node: fx.Node) -> Product | None:
        if node.target not in CONVOLUTIONS and node.target is not LINEAR:
            return None
        source, weight, bias = (*node.args[:3], None)[:3]
        if not isinstance(source, fx.Node) or self.is_constant(source):
            return None
        constants = [item for item in (weight, bias) if isinstance(item, fx.Node)]
        paths = [str(item.target) for item in constants if item.op == "get_attr"]
        if len(paths) < len(constants) or self._tensors[paths[0]].dtype != FLOAT:
            return None
        return Product(
            layer=paths[0].rpartition(".")[0],
            node=node,
            weight=paths[0],
            bias=paths[1] if len(paths) > 1 else None,
            source=source,
            result=_result(node),
        )


def activations(node: fx.Node) -> list[fx.Node]:
    """The computed tensors that the node reads, once each; no parameters, no sizes.

    A part of a tensor that was split reads that tensor.
    """
    if node.target is operator.getitem and node.all_input_nodes[0].target in SPLITTING:
        return activations(node.all_input_nodes[0])
    return [item for item in node.all_input_nodes if item.op != "get_attr" and is_tensor(item)]


def is_tensor(node: fx.Node) -> bool:
    """Whether its value is one tensor of floating-point numbers."""
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.is_floating_point()


def rank(node: fx.Node) -> int:
    """Number of dimensions of its value."""
    return int(node.meta["val"].dim())


def is_clipping(node: fx.Node) -> bool:
    """Whether it is a ReLU or a clip from 0: what integers that begin at 0 do anyway."""
    if node.target in {aten.relu.default, aten.relu6.default}:
        return True
    return node.target in CLIPPING and len(node.args) > 1 and node.args[1] in (0, 0.0)


def is_moving(node: fx.Node) -> bool:
    """Whether every value of the result is one of its first input, or a zero."""
    if node.target in PADDING:
        return _pads_with_zeros(node)
    if node.target is operator.getitem:
        return bool(activations(node))
    return node.target in MOVING


def is_computing(node: fx.Node) -> bool:
    """Whether the runtime has an integer kernel for it, all inputs and the result quantized."""
    if node.target is aten.adaptive_avg_pool2d.default:
        return node.args[1] in ([1, 1], (1, 1))
    if node.target not in COMPUTING or node.kwargs:
        return False
    if node.target is aten.cat.default:
        return True
    if node.target is aten.avg_pool2d.default and any(node.args[4:]):
        return False  # ceil_mode: ONNX Runtime's integer pool is wrong; a divisor: ONNX has none
    read = node.args[:2] if node.target in BINARY else node.args[:1]
    return all(isinstance(item, fx.Node) for item in read)


def only_user(node: fx.Node) -> fx.Node | None:
    """The one node that reads it."""
    users = list(node.users)
    return users[0] if len(users) == 1 and users[0].op != "output" else None


def _result(node: fx.Node) -> fx.Node:
    behind = only_user(node)
    return behind if behind is not None and is_clipping(behind) else node


def _pads_with_zeros(node: fx.Node) -> bool:
    extra = [item for item in node.args[2:] if item is not None]
    return all(item in ("constant", 0, 0.0) for item in extra) and not node.kwargs.get("value")


def _tensors(module: nn.Module) -> Mapping[str, Tensor]:
    named = dict(module.named_parameters(remove_duplicate=False))
    return named | dict(module.named_buffers(remove_duplicate=False))
