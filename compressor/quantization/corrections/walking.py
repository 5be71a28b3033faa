"""The inputs of one layer after another on a few samples, in bounded memory.

A walk goes through a graph once. It keeps what later operations read while that is little; else it
begins again where it was little. Weights may be changed while it goes: what depends on nothing but
them is computed when it is needed, and never kept.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from compressor.errors import DataError
from compressor.interfaces.inputs import ModelInputs
from compressor.quantization.graph import Product, QuantizationGraph
from compressor.quantization.graph_state import add_child
from compressor.quantization.model import copy_graph

# Of the values of all samples that are kept between two layers.
KEPT_BYTES = 256 * 2**20
# Of the largest value in one run.
PART_BYTES = 16 * 2**20

Values = Mapping[fx.Node, Any]
Forward = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def cut(graph: QuantizationGraph, batches: Iterable[ModelInputs]) -> list[ModelInputs]:
    """The samples of `batches` in parts so small that no value is larger than `PART_BYTES`.

    Raises:
        DataError: if there is none.
    """
    size = max(1, PART_BYTES // max(1, graph.sample_bytes()))
    parts = [part for batch in batches for part in batch.parts(size)]
    if not parts:
        raise DataError(
            "There is no calibration sample to correct with. Give at least one batch of training "
            "inputs as `calibration`."
        )
    return parts


def first_samples(batches: Iterable[ModelInputs], count: int) -> Iterator[ModelInputs]:
    """The first `count` samples of `batches`; no batch is drawn that is not needed."""
    batches = iter(batches)
    while count > 0:
        batch = next(batches, None)
        if batch is None:
            return
        yield batch.part(0, count)
        count -= batch.batch_size


def forward_of(product: Product, *, tail: bool = False) -> Forward:
    """The product as a function of its input, weight and bias; with `tail`, its ReLU as well."""
    node = product.node
    operation = cast(Callable[..., Tensor], node.target)

    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y = operation(x, weight, bias, *node.args[3:], **node.kwargs)
        for behind in product.tail if tail else ():
            y = cast(Callable[..., Tensor], behind.target)(y, *behind.args[1:], **behind.kwargs)
        return y

    return forward


class Walk:
    """Goes through a graph on some samples; layers are asked for in the order in which they run."""

    def __init__(
        self, module: fx.GraphModule, parts: Iterable[ModelInputs], *, kept_bytes: int = KEPT_BYTES
    ) -> None:
        """Begin with `parts`, as of `cut`, on the device of `module`; no gradient is kept."""
        self._module = module
        self._kept_bytes = kept_bytes
        self._nodes = list(module.graph.nodes)
        self._place = {node: place for place, node in enumerate(self._nodes)}
        self._named = {node.name: node for node in self._nodes}
        self._modules = dict(module.named_modules())
        self._constants = _constants(self._nodes)
        self._last = {
            node: max((self._place[user] for user in node.users), default=-1)
            for node in self._nodes
        }
        self._begin = 0
        self._values: list[Values] = enter(module, parts)

    def inputs(self, product: Product) -> Iterator[Tensor]:
        """What the product reads in this graph, part after part."""
        node = self._named[product.node.name]
        source = cast(fx.Node, node.args[0])
        end = self._place[node]
        assert self._begin <= end, "layers are asked for in order"
        kept: list[Values] | None = []
        total = 0
        for values in self._values:
            live = self._run(values, self._begin, end)
            yield cast(Tensor, live[source])
            if kept is not None:
                total += _size_bytes(live.values())
                kept = [*kept, live] if total <= self._kept_bytes else None
        if kept is not None:
            self._values, self._begin = kept, end

    @torch.no_grad()
    def _run(self, values: Values, begin: int, end: int) -> dict[fx.Node, Any]:
        """What is read at `end` or later, from what is read at `begin` or later."""
        live = dict(values)
        for place in range(begin, end):
            node = self._nodes[place]
            if node not in self._constants and node.op != "placeholder":
                live[node] = self._value(node, live)
            for read in (node, *node.all_input_nodes):
                if self._last[read] <= place:
                    live.pop(read, None)
        return live

    def _value(self, node: fx.Node, live: Values) -> Any:
        def known(read: fx.Node) -> Any:
            return live[read] if read in live else self._value(read, live)

        if node.op == "get_attr":
            owner, _, name = str(node.target).rpartition(".")
            return getattr(self._modules[owner], name)
        args = fx.map_arg(node.args, known)
        kwargs = fx.map_arg(node.kwargs, known)
        if node.op == "call_module":
            return self._modules[str(node.target)](*args, **kwargs)
        return cast(Callable[..., Any], node.target)(*args, **kwargs)


class _Entered(Exception):
    """Stops a graph that has taken its arguments."""


class _Door(nn.Module):
    """Takes all arguments of a graph, and stops it."""

    arguments: tuple[Any, ...] = ()

    def forward(self, *arguments: Any) -> None:
        self.arguments = arguments
        raise _Entered


def enter(module: fx.GraphModule, parts: Iterable[ModelInputs]) -> list[Values]:
    """The values of the placeholders when `module` is called with each of `parts`."""
    copied, _ = copy_graph(module)
    door = _Door()
    name = add_child(copied, "door", door)
    placeholders = [node for node in copied.graph.nodes if node.op == "placeholder"]
    with copied.graph.inserting_after(placeholders[-1]):
        copied.graph.call_module(name, tuple(placeholders))
    copied.recompile()
    originals = [node for node in module.graph.nodes if node.op == "placeholder"]
    values = []
    for part in parts:
        with contextlib.suppress(_Entered):
            part.call(copied)
        values.append(dict(zip(originals, door.arguments, strict=True)))
    return list(values)


def _constants(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """Parameters and buffers, and what is computed of nothing else."""
    found: set[fx.Node] = set()
    for node in nodes:
        is_made = node.op in {"call_function", "call_module"} and node.all_input_nodes
        if node.op == "get_attr" or (is_made and found.issuperset(node.all_input_nodes)):
            found.add(node)
    return found


def _size_bytes(values: Iterable[Any]) -> int:
    leaves = chain.from_iterable(
        value if isinstance(value, (tuple, list)) else (value,) for value in values
    )
    return sum(leaf.nbytes for leaf in leaves if isinstance(leaf, Tensor))
