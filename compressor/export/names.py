"""Plain names for all that is in a file: what Netron, profilers and error messages show.

A node is called by its module and its operation, "layer1.0.conv1/Conv"; what it computes
"layer1.0.conv1/Conv_output"; a constant by its path in the model, "layer1.0.conv1.weight_int8".
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

import onnx
from onnx import AttributeProto, GraphProto, NodeProto

CONVOLUTIONS = frozenset({"Conv", "ConvTranspose"})
QUANTIZE, DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"
UNNAMED = re.compile(r"val_\d+|constants\..*")  # by the exporter, and by us until now
PARTS = ("scale", "zero_point")  # second and third input of a quantizer


def name_plainly(proto: onnx.ModelProto, constants: Mapping[str, str] | None = None) -> None:
    """Name nodes, values and constants by the model's modules, in place.

    The names of inputs and outputs, and of what subgraphs read, stay.

    Args:
        proto: its nodes sorted, and named by their module: "layer1.0.conv1/anything".
        constants: path in the model of those whose name has lost it.
    """
    _Naming(proto.graph, constants or {}).run()
    del proto.graph.value_info[:]  # it speaks of old names


class _Naming:
    def __init__(self, graph: GraphProto, constants: Mapping[str, str]) -> None:
        self._graph = graph
        self._paths = constants
        fixed = {value.name for value in (*graph.input, *graph.output)}
        fixed.update(_names_in_subgraphs(graph))
        self._names = {name: name for name in fixed}
        self._taken = set(fixed)
        self._initializers = {tensor.name for tensor in graph.initializer}
        self._scopes = {value.name: value.name for value in graph.input}
        self._owner: dict[str, str] = {}  # of weights that are stored as integers

    def run(self) -> None:
        for name in self._initializers:
            if not UNNAMED.fullmatch(name):
                self._names[name] = name
                self._taken.add(name)
        for node in self._graph.node:
            scope = self._scope(node)
            self._name_constants(node, scope)
            if node.op_type == DEQUANTIZE and node.input[0] in self._initializers:
                self._owner[node.output[0]] = scope
            node.name = self._free(f"{scope}/{self._kind(node)}".removeprefix("/"))
            for number, result in enumerate(node.output):
                self._scopes[result] = scope
                several = f"_{number}" if len(node.output) > 1 else ""
                self._rename(result, f"{node.name}_output{several}")
            for number, name in enumerate(node.input):
                if name in self._initializers:
                    self._rename(name, f"{node.name}_input_{number}")
        for node in self._graph.node:
            node.input[:] = [self._names.get(name, name) for name in node.input]
            node.output[:] = [self._names.get(name, name) for name in node.output]
        for tensor in self._graph.initializer:
            tensor.name = self._names.get(tensor.name, tensor.name)

    def _scope(self, node: NodeProto) -> str:
        """The module that a node is of; of a quantizer that of what it quantizes."""
        if node.op_type in {QUANTIZE, DEQUANTIZE}:
            if node.input[0] in self._initializers:
                return self._path(node.input[1]).rpartition(".")[0]
            return str(self._scopes.get(node.input[0], ""))
        if node.op_type in CONVOLUTIONS:  # one that was fused with a norm has the norm's scope
            weight = node.input[1]
            is_stored = weight in self._initializers
            owner = self._path(weight).rpartition(".")[0] if is_stored else self._owner.get(weight)
            if owner:
                return owner
        return node.name.rpartition("/")[0]

    def _kind(self, node: NodeProto) -> str:
        """The operation, and of which constant, if it only reads one."""
        if node.op_type == DEQUANTIZE and node.input[0] in self._initializers:
            # by the scale: integers that are equal, as biases of zero, are stored once for all
            scale = self._path(node.input[1]).rpartition(".")[2]
            return f"{node.op_type}_{scale.removesuffix('_scale').removesuffix('_transposed')}"
        return str(node.op_type)

    def _name_constants(self, node: NodeProto, scope: str) -> None:
        """By their path in the model; those of an activation's quantizer by its module."""
        is_quantizer = node.op_type == QUANTIZE and node.input[0] not in self._initializers
        for number, name in enumerate(node.input):
            if name not in self._initializers:
                continue
            if is_quantizer and number:
                self._rename(name, f"{scope}.output_{PARTS[number - 1]}".removeprefix("."))
            elif name in self._paths:
                self._rename(name, self._paths[name])

    def _path(self, name: str) -> str:
        return self._paths.get(name, name)

    def _rename(self, name: str, wanted: str) -> None:
        """Take note of a new name, unless it has one."""
        if name and name not in self._names:
            self._names[name] = self._free(wanted)

    def _free(self, wanted: str) -> str:
        """`wanted`, or with the lowest number behind it that makes it the only one."""
        name, number = wanted, 0
        while name in self._taken:
            number += 1
            name = f"{wanted}_{number}"
        self._taken.add(name)
        return name


def _names_in_subgraphs(graph: GraphProto) -> Iterator[str]:
    """All names that the bodies of loops and branches use."""
    for node in graph.node:
        for entry in node.attribute:
            bodies = [entry.g] if entry.type == AttributeProto.GRAPH else list(entry.graphs)
            for body in bodies:
                for inner in body.node:
                    yield from (*inner.input, *inner.output)
                for value in (*body.input, *body.output, *body.initializer):
                    yield value.name
                yield from _names_in_subgraphs(body)
