"""Whether a chain saves, by times that are given."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import nn

from compressor.config import Config
from compressor.frameworks import reference_costs
from compressor.frameworks.reference_costs import ReferenceCosts
from compressor.interfaces.inputs import ModelInputs
from compressor.search.space import LayerState

CHAIN = ("svd", (8,))


def costs(techniques: tuple[str, ...], times_ms: dict[tuple[bool, bool], float]) -> ReferenceCosts:
    """Of a net with two layers, of which the first has a kernel in int8.

    Args:
        techniques: that are tried.
        times_ms: of a layer, by whether it is a chain and whether it is in int8.
    """
    unused = cast(Any, None)
    made = ReferenceCosts(
        nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32)),
        ModelInputs((torch.zeros(1, 32),)),
        Config(),
        unused,
        cast(Any, SimpleNamespace(static_layers=("0",))),
        techniques=techniques,
        folder=Path(),
        key="",
        latency_ms=unused,
        time_ms=unused,
    )

    def cost(name: str, state: LayerState) -> float:
        return times_ms[bool(state.form), state.format != ""]

    vars(made)["_latency"] = SimpleNamespace(cost=cost)
    return made


@pytest.mark.parametrize(
    ("whole_int8_ms", "chain_int8_ms", "saves"),
    [(3.0, 5.0, False), (3.0, 2.0, True), (8.0, 9.0, True)],
)
def test_a_chain_saves_where_its_fastest_form_is_faster_than_that_of_the_layer(
    whole_int8_ms: float, chain_int8_ms: float, saves: bool
) -> None:
    """In float it takes 6 ms of 10."""
    times_ms = {
        (False, False): 10.0,
        (False, True): whole_int8_ms,
        (True, False): 6.0,
        (True, True): chain_int8_ms,
    }
    both = costs(("low_rank", reference_costs.QUANTIZATION), times_ms)
    assert both.layer_saves("0", *CHAIN) == saves
    assert both.layer_saves("1", *CHAIN), "it has no kernel in int8"
    assert costs(("low_rank",), times_ms).layer_saves("0", *CHAIN), "int8 is not tried"
    assert not both.layer_saves("2", *CHAIN), "there is no such layer"
