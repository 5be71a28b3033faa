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
from math import prod
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from compressor.errors import ModelError, suggest
from compressor.quantization.norms import fold_norms

aten: Any = torch.ops.aten
CONVOLUTIONS = frozenset(
    {
        aten.conv1d.default,
        aten.conv2d.default,
        aten.conv3d.default,
        aten.conv1d.padding,
        aten.conv2d.padding,
        aten.conv3d.padding,
    }
)
LINEAR = aten.linear.default
CLIPPING = frozenset(
    {
        aten.relu.default,
        aten.relu6.default,
        aten.hardtanh.default,
        aten.clamp.default,
        aten.clamp_min.default,
    }
)
MOVING = frozenset(
    {
        aten.alias.default,
        aten.clone.default,
        aten.contiguous.default,
        aten.detach.default,
        aten.dropout.default,
        aten.expand.default,
        aten.flatten.using_ints,
        aten.max_pool1d.default,
        aten.max_pool2d.default,
        aten.max_pool3d.default,
        aten.permute.default,
        aten.reshape.default,
        aten.select.int,
        aten.slice.Tensor,
        aten.squeeze.dim,
        aten.squeeze.dims,
        aten.t.default,
        aten.transpose.int,
        aten.unflatten.int,
        aten.unsqueeze.default,
        aten.view.default,
    }
)
SPLITTING = frozenset(
    {
        aten.chunk.default,
        aten.split.Tensor,
        aten.split_with_sizes.default,
        aten.unbind.int,
    }
)
PADDING = frozenset({aten.pad.default, aten.constant_pad_nd.default})
# in the runtime they are one operation each, with an integer kernel
COMPUTING = frozenset(
    {
        aten.add.Tensor,
        aten.avg_pool2d.default,
        aten.cat.default,
        aten.leaky_relu.default,
        aten.mul.Tensor,
        aten.sigmoid.default,
    }
)
BINARY = frozenset({aten.add.Tensor, aten.mul.Tensor})


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
        """
        functional = program.run_decompositions({aten.silu.default: _silu, aten.mean.dim: _mean})
        options = inspect.signature(functional.module).parameters
        self.module: fx.GraphModule = functional.module(
            **({"check_guards": False} if "check_guards" in options else {})
        )
        fold_norms(self.module, CONVOLUTIONS | {LINEAR})
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

    def tensor(self, path: str) -> Tensor:
        """A parameter or buffer."""
        return self._tensors[path]

    def products_of(self, layers: Collection[str]) -> list[Product]:
        """The products of some layers.

        Raises:
            ModelError: if there is no such layer; the message has the nearest name.
        """
        for name in layers:
            if name not in self.layers:
                raise ModelError(
                    f"There is no convolution or linear layer {name!r} to quantize. "
                    f"{suggest(name, self.layers)}"
                )
        return [product for product in self.products if product.layer in layers]

    def sample_bytes(self) -> int:
        """Bytes of the largest value for one sample."""
        shapes = (node.meta["val"].shape for node in self.nodes if is_tensor(node))
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
        if len(paths) < len(constants) or self._tensors[paths[0]].dtype != torch.float32:
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


def _silu(x: Tensor) -> Tensor:
    """As runtimes without the operation have it."""
    return x * torch.sigmoid(x)


def _mean(
    x: Tensor, dim: list[int] | None, keepdim: bool = False, *, dtype: torch.dtype | None = None
) -> Any:
    """Of images over height and width as a pool, for which runtimes have an integer kernel."""
    if x.dim() != 4 or dtype is not None or not dim or sorted(i % 4 for i in dim) != [2, 3]:
        return NotImplemented
    pooled = aten.adaptive_avg_pool2d(x, [1, 1])
    return pooled if keepdim else pooled.flatten(1)


def _tensors(module: nn.Module) -> Mapping[str, Tensor]:
    named = dict(module.named_parameters(remove_duplicate=False))
    return named | dict(module.named_buffers(remove_duplicate=False))
