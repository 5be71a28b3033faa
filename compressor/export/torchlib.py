"""What ONNX Script knows of torch's operations, read once in a process and not at every export.

torch's exporter asks for the list each time, and the list is made by parsing the sources of some
500 functions: most of what the export of a small model takes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any


@contextmanager
def operations_read_once() -> Iterator[None]:
    """Exports inside share the list; where torch keeps it elsewhere, each makes its own."""
    from torch.onnx._internal.exporter import _registration

    source: Any = getattr(_registration, "onnxscript_apis", None)
    find = getattr(source, "get_torchlib_ops", None)
    if find is None:
        yield
        return
    source.get_torchlib_ops = lambda: list(_call_once(find))
    try:
        yield
    finally:
        source.get_torchlib_ops = find


@cache
def _call_once(find: Callable[[], list[Any]]) -> tuple[Any, ...]:
    return tuple(find())
