"""What layers cost before and after, booked on the layers of the reference."""

from __future__ import annotations

import torch
from torch import nn

from compressor.frameworks.layer_rows import layer_latencies_ms, layer_rows
from compressor.interfaces.inputs import ModelInputs
from compressor.profiling.counts import count
from compressor.search.space import LayerChange, LayerState

INPUTS = ModelInputs((torch.zeros(1, 8),))


class Chain(nn.Module):
    """What a layer may have become."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 2, bias=False)
        self.last = nn.Linear(2, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.last(self.first(x))
        return out


def test_parts_of_a_chain_are_booked_on_the_layer_that_it_stands_for() -> None:
    reference = count(nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4)), INPUTS)
    compressed = count(nn.Sequential(Chain(), nn.ReLU(), nn.Linear(6, 4)), INPUTS)
    first, last = layer_rows(reference, compressed, {"0": (2.0, 1.0)}, {"2": "static_int8"})
    assert (first.name, first.reference.params, first.compressed.params) == ("0", 54, 34)
    assert (first.reference.macs, first.compressed.macs) == (48, 28)
    assert (first.reference.latency_ms, first.compressed.latency_ms) == (2.0, 1.0)
    assert last.compressed == last.reference
    assert (last.format, last.reference.latency_ms) == ("static_int8", None)


def test_a_layer_that_is_gone_costs_nothing() -> None:
    reference = count(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), INPUTS)
    compressed = count(nn.Sequential(nn.Linear(8, 8), nn.Identity()), INPUTS)
    rows = layer_rows(reference, compressed, {}, {})
    assert [row.compressed.macs for row in rows] == [64, 0]


def test_latencies_are_of_the_layer_with_all_changes_of_the_plan() -> None:
    def cost(name: str, state: LayerState) -> float:
        return 0.0 if name == "table" else float(state.inputs * state.outputs)

    layers = {name: LayerState(4, 4) for name in ("conv", "fc", "table")}
    changes = [{"conv": LayerChange(outputs=-2), "fc": LayerChange(inputs=-2)}]
    changes.append({"fc": LayerChange(outputs=-1)})
    assert layer_latencies_ms(layers, changes, cost) == {"conv": (16, 8), "fc": (16, 6)}
