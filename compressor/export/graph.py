"""An ONNX graph with the questions that its edges answer: who writes a value, who reads it."""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Mapping
from functools import cached_property

import onnx
from onnx import NodeProto, TensorProto, helper


class Graph:
    """A view of `proto`; after an edit make a new one."""

    def __init__(self, proto: onnx.ModelProto) -> None:
        """Look at `proto`."""
        self.proto = proto
        self.nodes = list(proto.graph.node)
        self.outputs = {value.name for value in proto.graph.output}

    @cached_property
    def constants(self) -> Mapping[str, TensorProto]:
        """Initializers by name."""
        return {tensor.name: tensor for tensor in self.proto.graph.initializer}

    @cached_property
    def producers(self) -> Mapping[str, NodeProto]:
        """The node that writes each computed value."""
        return {name: node for node in self.nodes for name in node.output}

    @cached_property
    def consumers(self) -> Mapping[str, list[NodeProto]]:
        """The nodes that read each value, once each."""
        found: dict[str, list[NodeProto]] = defaultdict(list)
        for node in self.nodes:
            for name in dict.fromkeys(node.input):
                found[name].append(node)
        return found

    def only_consumer(self, name: str) -> NodeProto | None:
        """The one node that reads the value, if nobody else does, nor the caller of the graph."""
        readers = self.consumers.get(name, [])
        return readers[0] if len(readers) == 1 and name not in self.outputs else None

    def activations(self, node: NodeProto) -> list[str]:
        """The node's inputs that are no constants."""
        return [name for name in node.input if name and name not in self.constants]


def attribute(node: NodeProto, name: str, default: int) -> int:
    """An integer attribute."""
    for entry in node.attribute:
        if entry.name == name:
            return int(helper.get_attribute_value(entry))
    return default


def sort_nodes(proto: onnx.ModelProto) -> None:
    """Put every node behind those that it reads from, in place; the order is else as it was."""
    nodes = list(proto.graph.node)
    writer = {name: i for i, node in enumerate(nodes) for name in node.output}
    waits = [{writer[name] for name in node.input if name in writer} for node in nodes]
    readers = defaultdict(list)
    for i, writers in enumerate(waits):
        for j in writers:
            readers[j].append(i)
    ready = [i for i, writers in enumerate(waits) if not writers]
    del proto.graph.node[:]
    while ready:
        i = heapq.heappop(ready)
        proto.graph.node.append(nodes[i])
        for j in readers[i]:
            waits[j].remove(i)
            if not waits[j]:
                heapq.heappush(ready, j)


def drop_unused_constants(proto: onnx.ModelProto) -> None:
    """Remove the initializers that nothing reads, in place."""
    used = {name for node in proto.graph.node for name in node.input}
    used |= {value.name for value in proto.graph.output}
    kept = [tensor for tensor in proto.graph.initializer if tensor.name in used]
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(kept)


def drop_dead(proto: onnx.ModelProto) -> None:
    """Remove nodes that nobody reads, in place."""
    read = {value.name for value in proto.graph.output}
    for node in reversed(list(proto.graph.node)):
        if read.isdisjoint(node.output):
            proto.graph.node.remove(node)
        else:
            read.update(node.input)
