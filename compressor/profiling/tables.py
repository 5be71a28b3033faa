"""Numbers dressed up and rows aligned, as plain text."""

from __future__ import annotations

from collections.abc import Sequence

PREFIXES = (("G", 1e9), ("M", 1e6), ("k", 1e3))


def with_unit(value: float, unit: str) -> str:
    """Three digits, a decimal prefix and the unit.

    >>> with_unit(1_823_456_789, "MACs"), with_unit(999, "B"), with_unit(25_600, "")
    ('1.82 GMACs', '999 B', '25.6 k')
    """
    for prefix, size in PREFIXES:
        if abs(value) >= 0.9995 * size:  # what would round to 1000 of the next smaller
            return f"{_three_digits(value / size)} {prefix}{unit}".rstrip()
    return f"{_three_digits(value)} {unit}".rstrip()


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


def _three_digits(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 99.95 or value == int(value) else f"{value:.3g}"
