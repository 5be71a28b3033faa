"""Clamps with limits of two kinds, `x.clamp(0, 6.0)`, for an exporter that looks for one."""

from __future__ import annotations

from typing import Any

import torch
from torch.export import ExportedProgram

CLAMP: Any = torch.ops.aten.clamp.default


def even_limits(program: ExportedProgram) -> None:
    """Let both limits of a clamp be floats where one is, in place."""
    for node in program.graph.nodes:
        limits = node.args[1:]
        if node.target is CLAMP and any(isinstance(limit, float) for limit in limits):
            floats = (None if limit is None else float(limit) for limit in limits)
            node.args = (node.args[0], *floats)
