"""Figures as people read them: what costs are called, numbers with units, ratios in words."""

from __future__ import annotations

import math
from dataclasses import dataclass

PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
UNCHANGED = 0.005  # ratios so near to 1 are
DIGITS = 3


@dataclass(frozen=True)
class Resource:
    """What people call a cost.

    Attributes:
        name: of it.
        unit: "" is a bare number.
        better: what a model with less of it is; "fewer" wants `noun` behind it.
        worse: the opposite.
        noun: what there are fewer of; "" where `better` says it.
    """

    name: str
    unit: str
    better: str
    worse: str
    noun: str = ""


RESOURCES = {
    "latency_ms": Resource("latency", "ms", "faster", "slower"),
    "size_bytes": Resource("size", "B", "smaller", "larger"),
    "macs": Resource("MACs", "MACs", "fewer", "more", "MACs"),
    "params": Resource("parameters", "", "fewer", "more", "parameters"),
    "peak_memory_bytes": Resource("peak memory", "B", "less", "more", "memory"),
}


def name_of(resource: str) -> str:
    """What people call a cost; one that is not known by its own name.

    >>> name_of("size_bytes"), name_of("energy")
    ('size', 'energy')
    """
    return RESOURCES[resource].name if resource in RESOURCES else resource


def amount(resource: str, value: float | None) -> str:
    """A cost with its unit; "" where it is not known.

    >>> amount("size_bytes", 66_019), amount("latency_ms", 0.017629), amount("params", None)
    ('66.0 kB', '0.0176 ms', '')
    """
    if value is None or not math.isfinite(value):
        return ""
    if resource == "latency_ms":
        return f"{significant(value, DIGITS)} ms"
    return with_unit(value, RESOURCES[resource].unit if resource in RESOURCES else "")


def with_unit(value: float, unit: str) -> str:
    """Three digits, a decimal prefix and the unit; what needs no prefix is written as it is.

    >>> with_unit(1_823_456_789, "MACs"), with_unit(999, "B"), with_unit(999_950, "")
    ('1.82 GMACs', '999 B', '1.00 M')
    """
    for size, prefix in PREFIXES:
        if abs(value) >= 0.9995 * size:  # what would round to 1000 of the next smaller
            return f"{significant(value / size, DIGITS)} {prefix}{unit}".rstrip()
    return f"{value:.4g} {unit}".rstrip()


def gain_text(resource: str, ratio: float) -> str:
    """How much better a cost is, with its name: for a log line, or a list of several.

    Args:
        resource: of `RESOURCES`.
        ratio: reference / compressed.

    >>> gain_text("macs", 2.0), gain_text("size_bytes", 0.91), gain_text("latency_ms", 2.71)
    ('2.0x fewer MACs', '1.1x larger', '2.7x faster')
    """
    return f"{change_of(resource, ratio)} {RESOURCES[resource].noun}".rstrip()


def change_of(resource: str, ratio: float) -> str:
    """How much better a cost is, where its name is known already: a cell of a table.

    >>> change_of("macs", 2.0), change_of("params", 0.5)
    ('2.0x fewer', '2.0x more')
    """
    return ratio_text(ratio, RESOURCES[resource].better, RESOURCES[resource].worse)


def ratio_text(ratio: float, better: str, worse: str) -> str:
    """A ratio of reference / compressed in words.

    >>> ratio_text(3.142, "faster", "slower"), ratio_text(0.5, "smaller", "larger")
    ('3.1x faster', '2.0x larger')
    >>> ratio_text(1.001, "faster", "slower"), ratio_text(1.02, "faster", "slower")
    ('not faster', '1.02x faster')
    """
    if not math.isfinite(ratio) or ratio <= 0:
        return f"unknown times {better}"
    if abs(ratio - 1) < UNCHANGED:
        return f"not {better}"
    shown = max(ratio, 1 / ratio)
    decimals = 0 if shown >= 99.5 else 1 if shown >= 1.05 else 2
    return f"{shown:.{decimals}f}x {better if ratio >= 1 else worse}"


def significant(value: float, digits: int) -> str:
    """`value` to so many significant digits, without an exponent where that is readable.

    >>> significant(0.0017629, 2), significant(66.019, 3), significant(1234.5, 2)
    ('0.0018', '66.0', '1234')
    """
    if value == 0 or not math.isfinite(value):
        return f"{abs(value):g}"  # no -0
    rounded = float(f"{value:.{digits - 1}e}")  # 9.996 has a digit more before the point
    places = digits - 1 - math.floor(math.log10(abs(rounded)))
    if places < 0:
        return f"{value:.0f}"
    return f"{value:.{places}f}" if places <= 8 else f"{value:.{digits}g}"


def damage_text(damage: float) -> str:
    """A damage; "hopeless" where outputs were no numbers.

    >>> damage_text(0.01234), damage_text(math.inf)
    ('0.0123', 'hopeless')
    """
    return significant(damage, DIGITS) if math.isfinite(damage) else "hopeless"


def times(count: int, word: str = "time") -> str:
    """A count with its noun.

    >>> times(1), times(2, "thread")
    ('1 time', '2 threads')
    """
    return f"{count} {word}{'' if count == 1 else 's'}"
