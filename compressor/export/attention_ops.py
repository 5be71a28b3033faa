"""Attention on any number of dimensions, for an exporter that knows four.

torch's exporter asserts (batch, heads, rows, features); windows and groups have one more, single
sequences one less.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

attention: Any = torch.ops.aten.scaled_dot_product_attention.default
DIMS = 4


def with_four_dimensions(program: ExportedProgram) -> ExportedProgram:
    """`program` with every attention on four dimensions; itself if they are."""
    sizes = (
        node.args[0].meta["val"].dim() for node in program.graph.nodes if node.target is attention
    )
    if all(size == DIMS for size in sizes):
        return program
    flat: ExportedProgram = program.run_decompositions({attention: attend})
    return flat


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    dropout: float = 0.0,
    is_causal: bool = False,
    **options: Any,
) -> Any:
    """`scaled_dot_product_attention` by itself on four dimensions.

    Args:
        query: (…, rows, features).
        key: (…, columns, features).
        value: (…, columns, made).
        mask: broadcasts to (…, rows, columns).
        dropout: as torch's.
        is_causal: as torch's.
        options: as torch's.
    """
    if query.dim() == DIMS:
        return NotImplemented
    shapes = (x.shape[:-2] for x in (query, key, value))
    leading = torch.broadcast_shapes(*shapes)  # type: ignore[no-untyped-call]

    def folded(x: Tensor) -> Tensor:
        whole = x.expand(*leading, *x.shape[-2:])
        return whole.unsqueeze(0) if query.dim() < DIMS else whole.flatten(0, query.dim() - DIMS)

    parts = [folded(x) for x in (query, key, value)]
    covered = None if mask is None else folded(mask)
    made = attention(*parts, covered, dropout, is_causal, **options)
    return made.reshape(*leading, query.shape[-2], value.shape[-1])
