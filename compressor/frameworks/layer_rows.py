"""What each layer costs before and after: the compressed model's layers, booked on the reference's.

A layer that has become a chain has its name still, and its parts are inside it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce

from compressor.evidence import LayerBill, LayerRow
from compressor.profiling.counts import Counts
from compressor.search.space import LayerChange, LayerCost, LayerState


def layer_rows(
    reference: Counts,
    compressed: Counts,
    latencies_ms: Mapping[str, tuple[float, float]],
    formats: Mapping[str, str],
) -> tuple[LayerRow, ...]:
    """A row for each layer of the reference, in its order.

    Args:
        reference: counted on one sample.
        compressed: likewise.
        latencies_ms: of a layer by name, before and after; of those that were measured.
        formats: of the layers that are quantized.
    """
    names = {layer.name for layer in reference.layers}
    params, macs = dict.fromkeys(names, 0), dict.fromkeys(names, 0)
    for layer in compressed.layers:
        owner = _owner(layer.name, names)
        if owner is not None:
            params[owner] += layer.params
            macs[owner] += layer.macs
    unknown = (None, None)
    rows = []
    for layer in reference.layers:
        name = layer.name
        before_ms, after_ms = latencies_ms.get(name, unknown)
        before = LayerBill(layer.params, layer.macs, before_ms)
        after = LayerBill(params[name], macs[name], after_ms)
        rows.append(LayerRow(name, layer.type, before, after, formats.get(name, "")))
    return tuple(rows)


def layer_latencies_ms(
    layers: Mapping[str, LayerState],
    changes: Sequence[Mapping[str, LayerChange]],
    cost: LayerCost,
) -> dict[str, tuple[float, float]]:
    """Milliseconds of each layer before and after; those that take none are left out.

    Args:
        layers: as they are in the reference.
        changes: of each choice that was made, by layer.
        cost: milliseconds of a layer in a state.
    """
    found = {}
    for name, state in layers.items():
        mine = [change[name] for change in changes if name in change]
        after = reduce(lambda state, change: change.applied_to(state), mine, state)
        before_ms = cost(name, state)
        if before_ms > 0:
            found[name] = (before_ms, cost(name, after))
    return found


def _owner(name: str, names: set[str]) -> str | None:
    """The nearest layer of the reference that `name` is, or is inside of."""
    while name not in names:
        if not name:
            return None
        name = name.rpartition(".")[0]
    return name
