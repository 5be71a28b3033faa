"""Rows aligned as plain text."""

from __future__ import annotations

from collections.abc import Sequence


def align(rows: Sequence[Sequence[str]]) -> str:
    """Rows of equal length as lines; the first column to the left, the others to the right.

    >>> print(align([["layer", "MACs"], ["conv1", "294912"]]))
    layer    MACs
    conv1  294912
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )
