"""A model with quantizers: it computes what the quantized file computes, and can be trained."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from compressor.errors import ModelError
from compressor.quantization.affine import fake_quantize, parameters_of_range
from compressor.quantization.dynamic import DynamicLSTM, DynamicQuantizer
from compressor.quantization.graph import Product, QuantizationGraph
from compressor.quantization.graph_state import (
    add_child,
    compute_constants,
    graph_module,
    graph_state,
)
from compressor.quantization.placement import Placement
from compressor.quantization.plan import QuantizationPlan, TensorPlan, bias_scale, place_static
from compressor.quantization.recurrent import Recurrence, matrix_positions, unroll
from compressor.quantization.step_size import grown_scale, lsq_factor
from compressor.quantization.tables import Table

QUANTIZERS = "quantizers"


class Quantizer(nn.Module):
    """Rounds a tensor to the numbers that its integers can say.

    Attributes:
        scheme: of the integers.
        key: ("w", path of a weight) or ("a", name of an activation).
        step: a buffer: the scale, before training changes it.
        zero_point: a buffer, int32.
        growth: a parameter after `learn_scale`: logarithm of what the scale is multiplied by.
        extremes: a buffer (2,) after `follow_range`: least and greatest value, 0 among them, that
            passed in training mode since it was last set to 0.
        is_following: whether it notes them.
    """

    step: Tensor
    zero_point: Tensor
    growth: nn.Parameter | None
    extremes: Tensor
    moving_range: Tensor

    def __init__(self, plan: TensorPlan, key: tuple[str, str] = ("a", "")) -> None:
        """With the numbers of `plan`."""
        super().__init__()
        self.scheme = plan.scheme
        self.key = key
        self.register_buffer("step", plan.scale.clone())
        self.register_buffer("zero_point", plan.zero_point.clone())
        self.register_parameter("growth", None)
        self.is_following = False

    def forward(self, x: Tensor) -> Tensor:
        """`x` rounded, of its shape and dtype; computed in float32 at least."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        if self.is_following and self.training:
            self._note(wide.detach())
        return fake_quantize(wide, self._scale_for(x), self.zero_point, self.scheme).to(x.dtype)

    @property
    def scale(self) -> Tensor:
        """What it has now, without gradient."""
        return self.step if self.growth is None else self.step * self.growth.detach().exp()

    def learn_scale(self) -> None:
        """Let training change the scale (learned step size); once is enough."""
        if self.growth is None:
            self.growth = nn.Parameter(torch.zeros_like(self.step))

    def follow_range(self) -> None:
        """Be ready to follow the range of what passes; once is enough."""
        if "moving_range" not in self._buffers:
            ends = self.scheme.qmin - self.zero_point, self.scheme.qmax - self.zero_point
            self.register_buffer("moving_range", torch.stack(ends) * self.scale)
            self.register_buffer("extremes", torch.zeros_like(self.moving_range))

    def take_range(self, momentum: float) -> None:
        """Move the range towards the extremes that were noted, and forget them.

        Args:
            momentum: part of the way, 0 to 1; 0 or extremes that are not finite: it stays.
        """
        if momentum and self.extremes.any() and self.extremes.isfinite().all():
            self.moving_range.lerp_(self.extremes, momentum)
            low, high = self.moving_range
            step, zero_point = parameters_of_range(low, high, self.scheme)
            self.step.copy_(step)
            self.zero_point.copy_(zero_point)
        self.extremes.zero_()

    def plan(self) -> TensorPlan:
        """The numbers that it has now."""
        return TensorPlan(self.scheme, self.scale.cpu().clone(), self.zero_point.cpu().clone())

    def extra_repr(self) -> str:
        """The scheme."""
        return f"{self.scheme.to_json()}"

    def _note(self, x: Tensor) -> None:
        low, high = torch.aminmax(x)
        self.extremes[0].clamp_(max=low)
        self.extremes[1].clamp_(min=high)

    def _scale_for(self, x: Tensor) -> Tensor:
        if self.growth is None:
            return self.step
        owners = self.step.numel() if self.key[0] == "w" else len(x)
        factor = lsq_factor(x.numel() / owners, self.scheme.qmax)
        return grown_scale(self.step, self.growth, factor)


class BiasQuantizer(nn.Module):
    """Rounds a bias to whole steps of the products that it is added to, of 32 bits.

    Args:
        source: of what the product reads.
        weight: of what it is multiplied by.
    """

    def __init__(self, source: Quantizer, weight: Quantizer) -> None:
        super().__init__()
        self._factors = (source, weight)  # in a tuple: they are modules of the graph already

    @property
    def scale(self) -> Tensor:
        """The steps at present, () or (out,)."""
        source, weight = self._factors
        return source.scale * weight.scale

    def integers(self, bias: Tensor) -> Tensor:
        """`bias` (out,) in steps, int32."""
        ends = torch.iinfo(torch.int32)
        steps = (bias.detach().double() / self.scale.double()).round()
        return steps.clamp(ends.min, ends.max).to(torch.int32)

    def forward(self, bias: Tensor) -> Tensor:
        """`bias` (out,) rounded; the gradient passes."""
        rounded = self.integers(bias).to(bias.dtype)
        return bias + (rounded * self.scale - bias).detach()


class QuantizedModel(nn.Module):
    """A model as a plan says, called like the model.

    It holds the model's own parameters, by their names, below `graph`. Training it (its batch norms
    are folded) trains them through the rounding.
    """

    def __init__(self, graph: QuantizationGraph, plan: QuantizationPlan) -> None:
        """Put quantizers into a copy of the graph; the parameters are shared with it.

        Args:
            graph: of the model.
            plan: made for `graph`.

        Raises:
            ModelError: if a layer of the plan does not exist.
        """
        super().__init__()
        self.source = _Kept(graph)
        self.formats = dict(plan.formats)
        self.runtime = plan.runtime
        self.graph = _Builder(graph, plan).build()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the model returns."""
        return self.graph(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        """For pickle; a copy is made by `__deepcopy__`."""
        modules = {**self._modules, "graph": graph_state(self.graph)}
        return {**self.__dict__, "_modules": modules}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """With a graph of its own."""
        modules = {**state["_modules"], "graph": graph_module(state["_modules"]["graph"])}
        cast(Any, super()).__setstate__({**state, "_modules": modules})

    def __deepcopy__(self, memo: dict[int, Any]) -> QuantizedModel:
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied

    def frozen(self) -> fx.GraphModule:
        """A copy whose weights and biases are rounded once, not in every call: to evaluate with.

        It is a snapshot: make it anew after the parameters or the quantizers have changed.
        """
        module, _ = copy_graph(self.graph)
        compute_constants(module)
        return module.eval()

    def plan(self) -> QuantizationPlan:
        """The numbers that the quantizers have now."""
        quantizers = self.quantizers()
        return QuantizationPlan(
            self.formats,
            {key: quantizer.plan() for (kind, key), quantizer in quantizers.items() if kind == "w"},
            {key: quantizer.plan() for (kind, key), quantizer in quantizers.items() if kind == "a"},
            self.runtime,
        )

    def quantizers(self) -> Mapping[tuple[str, str], Quantizer]:
        """By ("w", path of a weight) or ("a", name of an activation)."""
        found = {}
        for module in self.graph.modules():
            if isinstance(module, Quantizer):
                found[module.key] = module
        return found


class _Kept:
    """Holds a graph without its modules becoming modules of the holder."""

    def __init__(self, graph: QuantizationGraph) -> None:
        self.graph = graph

    def __deepcopy__(self, memo: dict[int, Any]) -> _Kept:
        return self


class _Builder:
    """Copies a graph and puts the quantizers of a plan into the copy."""

    def __init__(self, graph: QuantizationGraph, plan: QuantizationPlan) -> None:
        self._source = graph
        self._plan = plan
        self._module, self._copied = copy_graph(graph.module)
        self._names: dict[tuple[str, str], str] = {}
        self._holder = nn.Module()
        self._path = add_child(self._module, QUANTIZERS, self._holder)

    def build(self) -> fx.GraphModule:
        placement = place_static(self._source, self._plan.formats, self._plan.runtime)
        for product in self._source.products_of(self._plan.formats):
            self._quantize_product(product, placement)
        for value in placement.scale_of:
            self._quantize_value(value, placement)
        for recurrence in self._source.recurrences_of(self._plan.formats):
            self._quantize_recurrence(recurrence)
        if self._plan.runtime != "tensorrt":
            for table in self._source.tables_of(self._plan.formats):
                self._quantize_table(table)
        self._module.graph.lint()
        self._module.recompile()
        return self._module

    def _quantize_product(self, product: Product, placement: Placement) -> None:
        node = self._copied[product.node]
        weight = self._plan.weights.get(product.weight)
        if weight is not None:
            self._insert(node, 1, self._shared("w", product.weight, weight))
        if weight is not None and bias_scale(product, self._plan, placement) is not None:
            origin = placement.scale_of[product.source].name
            factors = [
                self._module.get_submodule(self._shared(kind, key, plan))
                for kind, key, plan in (
                    ("a", origin, self._plan.activations[origin]),
                    ("w", product.weight, weight),
                )
            ]
            bias = BiasQuantizer(*cast(list[Quantizer], factors))
            self._insert(node, 2, self._add(f"bias_{product.node.name}", bias))
        if self._plan.formats[product.layer].activations == "dynamic":
            self._insert(node, 0, self._add(f"dynamic_{product.node.name}", DynamicQuantizer()))

    def _quantize_value(self, value: fx.Node, placement: Placement) -> None:
        """Put a quantizer behind the value, for those that shall read integers."""
        origin = placement.scale_of[value].name
        if origin not in self._plan.activations:
            raise ModelError(
                f"The plan has no range for the value {origin!r}. It was made for another model, "
                "or with another version of torch: make it anew."
            )
        name = self._shared("a", origin, self._plan.activations[origin])
        node = self._copied[value]
        readers = {self._copied[reader] for reader in placement.readers(value)}
        if not readers:
            return
        with self._module.graph.inserting_after(node):
            rounded = self._module.graph.call_module(name, (node,))
        rounded.meta = {"val": node.meta["val"]}
        node.replace_all_uses_with(rounded, delete_user_cb=lambda user: user in readers)

    def _quantize_recurrence(self, recurrence: Recurrence) -> None:
        node = self._copied[recurrence.node]
        factors = list(cast(Sequence[fx.Node], node.args[2]))
        for position, path in zip(matrix_positions(node), recurrence.weights, strict=True):
            if path in self._plan.weights:
                name = self._shared("w", path, self._plan.weights[path])
                factors[position] = self._through(name, factors[position], node)
        node.update_arg(2, factors)
        if self._plan.formats[recurrence.layer].activations == "dynamic":
            layer = DynamicLSTM(is_bidirectional=bool(node.args[7]))
            unroll(self._module.graph, node, self._add(f"dynamic_{node.name}", layer))

    def _quantize_table(self, table: Table) -> None:
        weight = self._plan.weights.get(table.weight)
        if weight is not None:
            name = self._shared("w", table.weight, weight)
            self._insert(self._copied[table.node], 0, name)

    def _insert(self, node: fx.Node, position: int, name: str) -> None:
        """Let an argument of the node go through a module."""
        argument = cast(fx.Node, node.args[position])
        node.update_arg(position, self._through(name, argument, node))

    def _through(self, name: str, value: fx.Node, reader: fx.Node) -> fx.Node:
        """What a module makes of a value, for its reader."""
        with self._module.graph.inserting_before(reader):
            rounded = self._module.graph.call_module(name, (value,))
        rounded.meta = {"val": value.meta.get("val")}
        return rounded

    def _shared(self, kind: str, key: str, plan: TensorPlan) -> str:
        """The path of the one quantizer of a tensor."""
        if (kind, key) not in self._names:
            quantizer = Quantizer(plan, (kind, key))
            self._names[kind, key] = self._add(key.replace(".", "_"), quantizer)
        return self._names[kind, key]

    def _add(self, name: str, module: nn.Module) -> str:
        return f"{self._path}.{add_child(self._holder, name, module)}"


def copy_graph(module: fx.GraphModule) -> tuple[fx.GraphModule, dict[fx.Node, fx.Node]]:
    """A graph module of its own that shares all tensors, and its nodes by those of `module`."""
    shared = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    copied = copy.deepcopy(module, shared)
    return copied, dict(zip(module.graph.nodes, copied.graph.nodes, strict=True))
