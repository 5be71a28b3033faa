"""Cross-layer equalisation of a whole graph, in place; see `equalization` for two layers.

A chain of layers, such as the three of an inverted residual, is equalised pair by pair until the
scales no longer change (Nagel et al., 2019, section 4.1.2).
"""

from __future__ import annotations

from collections.abc import Collection

import torch

from compressor.quantization.corrections.channels import Pair, find_pairs, groups_of
from compressor.quantization.corrections.equalization import (
    equalize_pair,
    equalizing_scales,
    input_absmax,
    output_absmax,
)
from compressor.quantization.graph import QuantizationGraph

CLOSE = 1e-3  # of 1, where no scale is farther from it, the chains are equal
MOST_ROUNDS = 100  # a chain of n layers takes about n² of them


@torch.no_grad()
def equalize(
    graph: QuantizationGraph, layers: Collection[str] | None = None
) -> list[tuple[str, str]]:
    """Scale the channels between layers such that both have like ranges, in place.

    The graph computes what it did, but for rounding of float32. Observe ranges afterwards.

    Args:
        graph: of the model, whose parameters are changed.
        layers: to which pairs belong with one layer or both; None is all.

    Returns:
        The layers of each pair.

    Raises:
        ModelError: if a weight is not finite.
    """
    pairs = [
        pair
        for pair in find_pairs(graph)
        if layers is None or {pair.first.layer, pair.second.layer} & set(layers)
    ]
    paths = {
        path
        for pair in pairs
        for path in (pair.first.weight, pair.first.bias, pair.second.weight)
        if path is not None
    }
    # in double while it goes on: each round would lose a little
    tensors = {path: graph.tensor(path).double() for path in paths}
    for _ in range(MOST_ROUNDS):
        farthest = max((_equalize_once(pair, tensors) for pair in pairs), default=0.0)
        if farthest < CLOSE:
            break
    for path, tensor in tensors.items():
        graph.tensor(path).copy_(tensor)
    return [(pair.first.layer, pair.second.layer) for pair in pairs]


def _equalize_once(pair: Pair, tensors: dict[str, torch.Tensor]) -> float:
    """Equalize a pair; how far its scales were from 1."""
    first, second, groups = pair.first, pair.second, groups_of(pair.second)
    weights = tensors[first.weight], tensors[second.weight]
    scales = equalizing_scales(output_absmax(weights[0]), input_absmax(weights[1], groups))
    bias = None if first.bias is None else tensors[first.bias]
    equal = equalize_pair(weights[0], bias, weights[1], scales, groups=groups)
    tensors[first.weight], tensors[second.weight] = equal.first_weight, equal.second_weight
    if first.bias is not None and equal.first_bias is not None:
        tensors[first.bias] = equal.first_bias
    return float((scales - 1).abs().max())
