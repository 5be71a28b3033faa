"""A quantized model as an ONNX file with quantizers (Q/DQ), which a runtime fuses into kernels.

Activations are uint8 with a zero point, weights int8, symmetric, one scale per output channel, and
biases int32: on x86 the one combination of types that is faster than float. The graph of the
simulation is exported, its quantizers exchanged for operations that ONNX has; so they sit in the
file where they sat in the model.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from operator import attrgetter
from pathlib import Path
from typing import Any, cast

import onnx
import onnxruntime as ort
import torch
from torch import Tensor, fx, nn

from compressor.export.file_nodes import finish_nodes
from compressor.export.graph import drop_unused_constants, sort_nodes
from compressor.export.onnx import OPSET, make_onnx, save_onnx
from compressor.export.quantized_ops import (
    BLOCKS_OPSET,
    translations,
)
from compressor.interfaces.inputs import ModelInputs
from compressor.quantization.affine import quantize
from compressor.quantization.graph import CONVOLUTIONS, LINEAR, is_computing, rank
from compressor.quantization.model import (
    BiasQuantizer,
    DynamicQuantizer,
    QuantizedModel,
    Quantizer,
    copy_graph,
)
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
        ExportError: if an operation has no translation, or the file would be larger than 2 GB.
    """
    form = _ExportForm(model)
    graph = form.build()
    opset = BLOCKS_OPSET if form.needs_blocks else OPSET
    proto = make_onnx(graph, inputs, translations=translations(opset), opset=opset)
    finish_nodes(proto)
    sort_nodes(proto)
    drop_unused_constants(proto)
    return save_onnx(proto, path)


def integer_kernels(path: Path | str) -> Counter[str]:
    """How often each operator, of whatever domain, is in the graph that ONNX Runtime executes."""
    with tempfile.TemporaryDirectory() as folder:
        optimised = Path(folder) / "optimised.onnx"
        options = ort.SessionOptions()
        options.log_severity_level = 3  # it warns that the saved graph is for this machine only
        options.optimized_model_filepath = str(optimised)
        ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        proto = onnx.load(optimised)
    return Counter(node.op_type for node in proto.graph.node)


class _ExportForm:
    """A copy of the simulation whose quantizers are operations of ONNX and integers."""

    def __init__(self, model: QuantizedModel) -> None:
        self._module, _ = copy_graph(model.graph)
        self._formats = model.formats
        self._graph = self._module.graph
        self._constants = nn.Module()
        self._module.add_module(CONSTANTS, self._constants)
        self.needs_blocks = False

    def build(self) -> fx.GraphModule:
        modules = dict(self._module.named_modules())
        for node in list(self._graph.nodes):
            if node.target in REQUANTIZED:
                self._write_product(node, modules)
            elif node.target is aten.avg_pool2d.default and not is_computing(node):
                with self._graph.inserting_before(node):
                    node.update_arg(0, self._call(ops.keep_float.default, node.args[0]))
        for node in list(self._graph.nodes):
            module = modules.get(str(node.target)) if node.op == "call_module" else None
            if isinstance(module, Quantizer):
                self._write_activation(node, module)
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
            with self._graph.inserting_before(node):
                node.update_arg(0, self._call(ops.keep_float.default, node.args[0]))
        if isinstance(inside, BiasQuantizer):
            node.update_arg(2, self._integer_bias(cast(fx.Node, bias), inside))
        if not isinstance(weight, Quantizer):
            return
        assert rounded is not None
        if isinstance(reads, DynamicQuantizer):
            read = cast(fx.Node, source).args[0]
            self._replace_linear(node, read, rounded, weight, is_dynamic=True)
        elif node.target is LINEAR and (rank(node) != 2 or not is_static):
            self._replace_linear(node, node.args[0], rounded, weight)
        else:
            node.update_arg(1, self._integers(node, rounded, weight))

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
            result = product if bias is None else self._call(aten.add.Tensor, product, bias)
        node.replace_all_uses_with(result)
        self._graph.erase_node(node)

    def _integers(
        self, before: fx.Node, rounded: fx.Node, weight: Quantizer, *, transposed: bool = False
    ) -> fx.Node:
        """The weight, dequantized from its stored integers."""
        axis, block = weight.scheme.axis, weight.scheme.block or 0
        if axis is not None and transposed:
            axis = 0 if block else 1
        elif block:
            axis = 1
        with self._graph.inserting_before(before):
            stored = self._stored(rounded, weight, transposed=transposed)
            return self._call(ops.dequantize.default, *stored, 1 if axis is None else axis, block)

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
                self._constant(f"{name}_int32", integers),
                self._constant(f"{name}_scale", scale),
                self._constant(f"{name}_zero_point", torch.zeros_like(scale, dtype=torch.int32)),
            ]
            return self._call(ops.dequantize.default, *stored, 0, 0)

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

    def _constant(self, path: str, tensor: Tensor) -> fx.Node:
        """A constant of the file; in a holder of its own, where no name of the model's is."""
        name = path.replace(".", "_")
        self._constants.register_buffer(name, tensor.contiguous())
        return self._graph.get_attr(f"{CONSTANTS}.{name}")

    def _call(self, operation: Any, *args: Any) -> fx.Node:
        return self._graph.call_function(operation, args)
