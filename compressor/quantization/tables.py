"""Tables whose rows are looked up (embeddings): which a graph has, and how they are stored.

Nothing is multiplied by a table, so it is small in few bits, and no faster: only its weight has a
format. A table that is the weight of a linear layer as well (language models) has that one's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, fx

from compressor.quantization.operations import EMBEDDING
from compressor.quantization.scheme import WEIGHT

if TYPE_CHECKING:
    from compressor.quantization.plan import LayerFormat

PACKED_BITS = 4  # of integers that lie two in a byte


@dataclass(frozen=True)
class Table:
    """One look-up.

    Attributes:
        layer: name of the module that owns the table; one that is read twice is two of these.
        node: the operation.
        weight: path of the parameter (rows, columns).
    """

    layer: str
    node: fx.Node
    weight: str


def find_tables(
    nodes: Iterable[fx.Node], tensors: Mapping[str, Tensor], multiplied: Iterable[str]
) -> list[Table]:
    """The look-ups in constant tables, in the order in which they run.

    A table that something else reads as well is left out: the file would hold it twice.

    Args:
        nodes: of the graph, in order.
        tensors: its parameters and buffers.
        multiplied: paths of the weights of products, once for each.
    """
    tables, readers = [], Counter[str]()
    for node in nodes:
        if node.op == "get_attr":
            readers[str(node.target)] += len(node.users)
        matrix = node.args[0] if node.target is EMBEDDING else None
        if isinstance(matrix, fx.Node) and matrix.op == "get_attr":
            path = str(matrix.target)
            if tensors[path].dtype == torch.float32:
                tables.append(Table(path.rpartition(".")[0], node, path))
    known = Counter(multiplied) + Counter(table.weight for table in tables)
    return [table for table in tables if known[table.weight] == readers[table.weight]]


def table_format(form: LayerFormat) -> LayerFormat:
    """What a table is stored as where `form` is asked for.

    Integers of more than four bits are eight, with a scale for each row: they take as many bytes.

    >>> from compressor.quantization.plan import STATIC_INT8, WEIGHT_INT4
    >>> table_format(STATIC_INT8).activations, table_format(WEIGHT_INT4) == WEIGHT_INT4
    ('float', True)
    """
    has_eight = form.weight.has_integers and form.weight.bits > PACKED_BITS
    return replace(form, weight=WEIGHT if has_eight else form.weight, activations="float")
