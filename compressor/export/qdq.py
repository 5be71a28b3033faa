"""A quantized model as an ONNX file with quantizers (Q/DQ), which a runtime fuses into kernels.

Activations are uint8 with a zero point, weights int8, symmetric, one scale per output channel, and
biases int32: on x86 the one combination of types that is faster than float. For TensorRT
activations are int8 without zero points, and biases float. The graph of the simulation is exported,
its quantizers exchanged for operations that ONNX has; so they sit in the file where they sat in the
model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from compressor.export.file_nodes import finish_nodes
from compressor.export.file_weights import read_four_bits, widen_weights
from compressor.export.graph import drop_unused_constants, sort_nodes
from compressor.export.names import name_plainly
from compressor.export.onnx import OPSET, make_onnx, save_onnx
from compressor.export.quantized_ops import (
    BLOCKS_OPSET,
    translations,
)
from compressor.export.recurrent import lstm_constants
from compressor.export.runtime_graph import check_loads, executed_graph
from compressor.export.scopes import keep_scopes
from compressor.export.tables import look_up, packing_offset, share_transposed, table_constants
from compressor.interfaces.inputs import ModelInputs
from compressor.quantization.affine import quantize
from compressor.quantization.dynamic import DynamicLSTM, DynamicQuantizer
from compressor.quantization.graph import is_computing, rank
from compressor.quantization.graph_state import add_child
from compressor.quantization.model import (
    BiasQuantizer,
    QuantizedModel,
    Quantizer,
    copy_graph,
)
from compressor.quantization.operations import CLIPPING, CONVOLUTIONS, EMBEDDING, LINEAR, LSTM
from compressor.quantization.scheme import torch_dtype

ops: Any = torch.ops.compressor
aten: Any = torch.ops.aten
# their weight is quantized unasked when they lie between integers; see `keep_float`
REQUANTIZED = CONVOLUTIONS | {
    LINEAR,
    aten.matmul.default,
    aten.conv_transpose1d.default,
    aten.conv_transpose2d.input,
    aten.conv_transpose3d.input,
}
CONSTANTS = "constants"


def export_quantized(model: QuantizedModel, inputs: ModelInputs, path: Path | str) -> Path:
    """Write `model` as one ONNX file that takes any batch size.

    Args:
        model: on the CPU; not changed.
        inputs: of one call.
        path: of the new file; the weights are inside.

    Raises:
        ExportError: if an operation has no translation, the file would be larger than 2 GB, or ONNX
            Runtime refuses it; then none, or the one before, is left.
    """
    form = _ExportForm(model)
    graph = form.build()
    opset = BLOCKS_OPSET if form.needs_blocks else OPSET
    proto = make_onnx(graph, inputs, translations=translations(opset), opset=opset)
    finish_nodes(proto)
    share_transposed(proto)
    if model.runtime == "onnxruntime":
        widen_weights(proto)
    read_four_bits(proto)
    sort_nodes(proto)
    drop_unused_constants(proto)
    name_plainly(proto, form.paths)
    return save_onnx(proto, path, check=check_loads)


def integer_kernels(path: Path | str) -> Counter[str]:
    """How often each operator, of whatever domain, is in the graph that ONNX Runtime executes."""
    return Counter(node.op_type for node in executed_graph(path).graph.node)


class _ExportForm:
    """A copy of the simulation whose quantizers are operations of ONNX and integers.

    Attributes:
        needs_blocks: whether the file needs 4 bits, or scales for blocks.
        paths: of the constants in the model, by their names in the graph.
    """

    def __init__(self, model: QuantizedModel) -> None:
        self._module, _ = copy_graph(model.graph)
        self._formats = model.formats
        self._runtime = model.runtime
        self._graph = self._module.graph
        self._constants = nn.Module()
        self._path = add_child(self._module, CONSTANTS, self._constants)
        self.needs_blocks = False
        self.paths: dict[str, str] = {}

    def build(self) -> fx.GraphModule:
        modules = dict(self._module.named_modules())
        for node in list(self._graph.nodes):
            if node.target in REQUANTIZED:
                self._write_product(node, modules)
            elif node.target is LSTM:
                self._write_recurrent_weights(node, modules)
            elif isinstance(modules.get(str(node.target)), DynamicLSTM):
                self._write_lstm(node, modules)
            elif node.target is EMBEDDING:
                self._write_table(node, modules)
            elif node.target is aten.avg_pool2d.default and not is_computing(node):
                self._keep_float(node)
        for node in list(self._graph.nodes):
            module = modules.get(str(node.target)) if node.op == "call_module" else None
            if isinstance(module, Quantizer):
                self._write_activation(node, module)
        keep_scopes(self._module)
        self._graph.eliminate_dead_code()
        self._module.delete_all_unused_submodules()
        self._graph.lint()
        self._module.recompile()
        return self._module

    def _write_product(self, node: fx.Node, modules: dict[str, nn.Module]) -> None:
        def through(position: int) -> tuple[fx.Node | None, nn.Module | None]:
            """The call of a quantizer that an argument comes from."""
            argument = node.args[position] if position < len(node.args) else None
            if not isinstance(argument, fx.Node) or argument.op != "call_module":
                return None, None
            return argument, modules[str(argument.target)]

        source, reads = through(0)
        rounded, weight = through(1)
        bias, inside = through(2)
        is_static = isinstance(weight, Quantizer) and self._is_static(rounded)
        if isinstance(reads, Quantizer) and not is_static:
            self._keep_float(node)
        is_matrix = node.target is LINEAR and rank(node) == 2
        is_apart = is_matrix and is_static and len(node.users) > 1 and _is_clipped(node)
        is_apart = is_apart and self._runtime == "onnxruntime"
        if isinstance(inside, BiasQuantizer):
            assert bias is not None
            write = self._float_bias if is_apart else self._integer_bias
            node.update_arg(2, write(bias, inside))
        if not isinstance(weight, Quantizer):
            return
        assert rounded is not None
        is_fused = is_static or not weight.scheme.has_integers  # a matrix's product with its bias
        if isinstance(reads, DynamicQuantizer):
            read = cast(fx.Node, source).args[0]
            self._replace_linear(node, read, rounded, weight, is_dynamic=True)
        elif node.target is LINEAR and (is_apart or not is_matrix or not is_fused):
            self._replace_linear(node, node.args[0], rounded, weight)
        else:
            node.update_arg(1, self._integers(node, rounded, weight))

    def _write_recurrent_weights(self, node: fx.Node, modules: dict[str, nn.Module]) -> None:
        """Of an LSTM that is computed in float."""
        factors = []
        for item in cast(Sequence[fx.Node], node.args[2]):
            weight = modules.get(str(item.target)) if item.op == "call_module" else None
            factors.append(
                self._integers(node, item, weight) if isinstance(weight, Quantizer) else item
            )
        node.update_arg(2, factors)

    def _write_lstm(self, node: fx.Node, modules: dict[str, nn.Module]) -> None:
        """One layer of an LSTM on integers."""
        *states, first = cast(Sequence[fx.Node], node.args[:4])
        matrices, biases = [], []
        for item in cast(Sequence[fx.Node], node.args[3:]):
            weight = modules.get(str(item.target)) if item.op == "call_module" else None
            if isinstance(weight, Quantizer):
                values, plan = self._tensor(str(item.all_input_nodes[0].target)), weight.plan()
                integers = quantize(values, plan.scale, plan.zero_point, plan.scheme)
                matrices.append((integers.to(torch.int8), plan.scale))
            else:
                biases.append(self._tensor(str(item.target)))
        path = str(first.all_input_nodes[0].target)
        with self._graph.inserting_before(node):
            constants = [
                self._constant(f"{path}_{name}", tensor)
                for name, tensor in lstm_constants(matrices, biases).items()
            ]
            result = self._call(ops.lstm.default, *states, *constants)
        node.replace_all_uses_with(result)
        self._graph.erase_node(node)

    def _write_table(self, node: fx.Node, modules: dict[str, nn.Module]) -> None:
        """The rows of a table in few bits."""
        rounded = cast(fx.Node, node.args[0])
        weight = modules.get(str(rounded.target)) if rounded.op == "call_module" else None
        if not isinstance(weight, Quantizer):
            return
        path = str(rounded.all_input_nodes[0].target)
        values = self._tensor(path)
        with self._graph.inserting_before(node):
            constants = [
                self._constant(f"{path}_{name}", tensor)
                for name, tensor in table_constants(values, weight.plan()).items()
            ]
            scheme = weight.scheme
            how = values.shape[1], scheme.block, packing_offset(scheme)
            result = self._call(look_up, node.args[1], *how, *constants)
        result.meta = node.meta
        node.replace_all_uses_with(result)
        self._graph.erase_node(node)

    def _keep_float(self, node: fx.Node) -> None:
        if self._runtime == "onnxruntime":
            with self._graph.inserting_before(node):
                node.update_arg(0, self._call(ops.keep_float.default, node.args[0]))

    def _is_static(self, rounded: fx.Node | None) -> bool:
        path = str(cast(fx.Node, cast(fx.Node, rounded).args[0]).target)
        return self._formats[path.rpartition(".")[0]].activations == "static"

    def _replace_linear(
        self,
        node: fx.Node,
        source: Any,
        rounded: fx.Node,
        weight: Quantizer,
        *,
        is_dynamic: bool = False,
    ) -> None:
        """As a product with the transposed weight, and a sum: what runtimes have kernels for."""
        bias = node.args[2] if len(node.args) > 2 else None
        with self._graph.inserting_before(node):
            if is_dynamic:
                integers, scale, zero_point = self._stored(rounded, weight, transposed=True)
                product = self._call(
                    ops.dynamic_product.default, source, integers, scale, zero_point
                )
            else:
                factor = self._integers(node, rounded, weight, transposed=True)
                product = self._call(aten.matmul.default, source, factor)
                product.meta = node.meta
            if is_dynamic or (self._is_static(rounded) and rank(node) != 2):
                result = product if bias is None else self._call(aten.add.Tensor, product, bias)
            else:
                result = self._add_apart(node, product, bias)
        result.meta = node.meta
        node.replace_all_uses_with(result)
        self._graph.erase_node(node)

    def _add_apart(self, node: fx.Node, product: fx.Node, bias: Any) -> fx.Node:
        """The sum; before a ReLU or a clip as a difference, which gives the same numbers.

        ONNX Runtime has no kernel of few bits for a product, or for a product and a sum as one
        Gemm, right before them: it dequantizes the weight in every call, 15 times as slow. Of
        integers it has one, if nothing else reads the sum.
        """
        if not _is_clipped(node) or (bias is not None and rank(node) != 2):
            return product if bias is None else self._call(aten.add.Tensor, product, bias)
        features = node.meta["val"].shape[-1]
        values = torch.zeros(features) if bias is None else self._tensor(str(bias.target))
        negative = self._constant(f"{node.name}_negative_bias", -values)
        return self._call(aten.sub.Tensor, product, negative)

    def _integers(
        self, before: fx.Node, rounded: fx.Node, weight: Quantizer, *, transposed: bool = False
    ) -> fx.Node:
        """The weight, dequantized from its stored integers; or from floats of 16 bits."""
        if not weight.scheme.has_integers:
            return self._floats(before, rounded, weight, transposed=transposed)
        axis, block = weight.scheme.axis, weight.scheme.block or 0
        if axis is not None and transposed:
            axis = 0 if block else 1
        elif block:
            axis = 1
        with self._graph.inserting_before(before):
            integers, *numbers = self._stored(rounded, weight, transposed=transposed)
            if weight.scheme.storage in {"int4", "uint4"}:
                integers = self._call(ops.four_bits.default, integers)
            axis = 1 if axis is None else axis
            return self._call(ops.dequantize.default, integers, *numbers, axis, block)

    def _floats(
        self, before: fx.Node, rounded: fx.Node, weight: Quantizer, *, transposed: bool
    ) -> fx.Node:
        """The weight, from its floats of 16 bits."""
        path = str(cast(fx.Node, rounded.args[0]).target)
        values = self._tensor(path).to(torch_dtype(weight.scheme))
        name = f"{path}_{'transposed_' if transposed else ''}{weight.scheme.storage}"
        with self._graph.inserting_before(before):
            stored = self._constant(name, values.T if transposed else values)
            return self._call(ops.widen.default, stored)

    def _stored(self, rounded: fx.Node, weight: Quantizer, *, transposed: bool) -> list[fx.Node]:
        """Integers, scale and zero point as constants of the graph."""
        path = str(cast(fx.Node, rounded.args[0]).target)
        plan = weight.plan()
        values = self._tensor(path)
        integers = quantize(values, plan.scale, plan.zero_point, plan.scheme)
        kind = torch_dtype(plan.scheme)
        scale, zero_point = plan.scale, plan.zero_point
        if transposed:
            integers = integers.T
            scale, zero_point = (
                item.T if item.dim() == 2 else item for item in (scale, zero_point)
            )
        self.needs_blocks |= plan.scheme.bits <= 4 or plan.scheme.block is not None
        suffix, way = plan.scheme.storage, "transposed_" if transposed else ""
        return [
            self._constant(f"{path}_{name}", tensor)
            for name, tensor in (
                (f"{way}{suffix}", integers.to(kind)),
                (f"{way}scale", scale),
                (f"{way}zero_point_{suffix}", zero_point.to(kind)),
            )
        ]

    def _integer_bias(self, call: fx.Node, quantizer: BiasQuantizer) -> fx.Node:
        path = str(cast(fx.Node, call.args[0]).target)
        scale = quantizer.scale.cpu()
        integers = quantizer.integers(self._tensor(path)).cpu()
        name = f"{path}_{call.name}"
        with self._graph.inserting_before(call):
            stored = [
                self._constant(f"{name}_{part}", tensor, f"{path}_{part}")
                for part, tensor in (
                    ("int32", integers),
                    ("scale", scale),
                    ("zero_point", torch.zeros_like(scale, dtype=torch.int32)),
                )
            ]
            return self._call(ops.dequantize.default, *stored, 0, 0)

    def _float_bias(self, call: fx.Node, quantizer: BiasQuantizer) -> fx.Node:
        """What the integers stand for."""
        path = str(cast(fx.Node, call.args[0]).target)
        values = quantizer.integers(self._tensor(path)).float() * quantizer.scale
        with self._graph.inserting_before(call):
            name = f"{path}_{call.name}_float"
            return self._constant(name, values.cpu(), f"{path}_float")

    def _write_activation(self, node: fx.Node, quantizer: Quantizer) -> None:
        source = cast(fx.Node, node.args[0])
        if source.op == "get_attr" or not node.users:
            return
        plan = quantizer.plan()
        name = str(node.target)
        with self._graph.inserting_before(node):
            result = self._call(
                ops.round_trip.default,
                source,
                self._constant(f"{name}_scale", plan.scale),
                self._constant(f"{name}_zero_point", plan.zero_point.to(torch_dtype(plan.scheme))),
            )
        node.replace_all_uses_with(result)

    def _tensor(self, path: str) -> Tensor:
        """A parameter or buffer, on the CPU."""
        value: Tensor = attrgetter(path)(self._module)
        return value.detach().cpu()

    def _constant(self, path: str, tensor: Tensor, shown: str = "") -> fx.Node:
        """A constant of the file; in a holder of its own, where no name of the model's is.

        Two paths may differ in "." and "_" alone: another tensor gets a number behind its name. In
        the file it is called `shown`, or by its path.
        """
        base = name = path.replace(".", "_")
        number, known = 0, self._constants._buffers
        while name in known and not _is_same(cast(Tensor, known[name]), tensor):
            number += 1
            name = f"{base}_{number}"
        if name not in known:
            self._constants.register_buffer(name, tensor.contiguous())
            self.paths[f"{self._path}.{name}"] = shown or path
        return self._graph.get_attr(f"{self._path}.{name}")

    def _call(self, operation: Any, *args: Any) -> fx.Node:
        return self._graph.call_function(operation, args)


def _is_clipped(node: fx.Node) -> bool:
    """Whether a ReLU or a clip is among what reads it."""
    return any(user.target in CLIPPING for user in node.users)


def _is_same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)
