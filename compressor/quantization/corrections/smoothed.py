"""SmoothQuant of a whole graph, in place; see `smoothing` for one layer."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx

from compressor.interfaces.inputs import ModelInputs
from compressor.quantization.corrections.channels import (
    channel_axis,
    count_readers,
    is_its_own,
    readers_of_channels,
)
from compressor.quantization.corrections.smoothing import (
    search_alpha,
    smooth,
    smoothing_scales,
)
from compressor.quantization.corrections.walking import Walk
from compressor.quantization.graph import Product, QuantizationGraph, rank
from compressor.quantization.plan import Formats
from compressor.quantization.scheme import ACTIVATION, Scheme

aten: Any = torch.ops.aten
PART_ROWS = 64  # of each part, that alpha is searched on


@dataclass(frozen=True)
class Smoothable:
    """Features that linear layers alone read, and what makes them.

    Attributes:
        name: of the value.
        paths: parameters whose rows are divided by the scales.
        readers: whose columns are multiplied by them.
    """

    name: str
    paths: tuple[str, ...]
    readers: tuple[Product, ...]


@torch.no_grad()
def smooth_graph(
    graph: QuantizationGraph,
    formats: Formats,
    parts: Sequence[ModelInputs],
    *,
    alpha: float | None = None,
    activation: Scheme = ACTIVATION,
) -> dict[str, float]:
    """Move outliers of what linear layers read into their weights, in place.

    Smoothed is what a layer norm with a weight, or another product, makes for linear layers alone,
    if one of them has quantized activations. After a residual branch that also reads the layer
    norm, as in BERT, nothing is. The graph computes what it did, but for rounding.

    Args:
        graph: of the model, whose parameters are changed.
        formats: of the layers that will be quantized.
        parts: calibration samples, as of `walking.cut`.
        alpha: 0 to 1, as of `smoothing_scales`; None searches the best of each place.
        activation: the scheme of activations.

    Returns:
        The alpha of each place that was smoothed, by the name of its value in the graph.

    Raises:
        ConfigError: if `alpha` is out of range.
        DataError: if the samples are not finite.
    """
    chosen: dict[str, float] = {}
    walk = Walk(copy.deepcopy(graph.module), parts)
    for place in find_smoothable(graph):
        weight_scheme = _scheme(place, formats)
        if weight_scheme is None:
            continue
        absmax, rows = _observed(walk.inputs(place.readers[0]))
        weights = [graph.tensor(reader.weight) for reader in place.readers]
        best = alpha
        if best is None:
            best = search_alpha(weights, rows, activation, weight_scheme)
        if best is None:
            continue
        scales = smoothing_scales(absmax, torch.cat(weights).abs().amax(0), best)
        for path in place.paths:
            rows_first = graph.tensor(path)
            rows_first.div_(scales.view(-1, *[1] * (rows_first.dim() - 1)))
        for weight in weights:
            weight.copy_(smooth(weight, scales))
        chosen[place.name] = best
    return chosen


def find_smoothable(graph: QuantizationGraph) -> list[Smoothable]:
    """Every place, in the order in which the first readers run."""
    products = {product.node: product for product in graph.products}
    order = {product.node: number for number, product in enumerate(graph.products)}
    places = []
    for node in graph.nodes:
        if node in products:
            product = products[node]
            paths = _paths(product) if is_its_own(graph, product) else None
            axis = channel_axis(product)
        else:
            paths, axis = _norm_paths(graph, node), -1
        if paths is None:
            continue
        readers = readers_of_channels(graph, node, axis % rank(node))
        if readers is None or any(
            reader.is_convolution or not _is_alone(graph, reader) for reader in readers
        ):
            continue
        readers.sort(key=lambda reader: order[reader.node])
        places.append(Smoothable(node.name, paths, tuple(readers)))
    return sorted(places, key=lambda place: order[place.readers[0].node])


def _paths(product: Product) -> tuple[str, ...]:
    return tuple(path for path in (product.weight, product.bias) if path is not None)


def _norm_paths(graph: QuantizationGraph, node: fx.Node) -> tuple[str, ...] | None:
    """Weight and bias of a layer norm over the last dimension, which nothing else has."""
    if node.target is not aten.layer_norm.default:
        return None
    _, shape, weight, bias = (*node.args[:4], None, None)[:4]
    if not isinstance(weight, fx.Node) or len(cast(list[int], shape)) != 1:
        return None
    nodes = [item for item in (weight, bias) if isinstance(item, fx.Node)]
    paths = tuple(str(item.target) for item in nodes)
    is_own = all(item.op == "get_attr" for item in nodes) and all(
        count_readers(graph, path) == 1 for path in paths
    )
    return paths if is_own else None


def _is_alone(graph: QuantizationGraph, reader: Product) -> bool:
    return count_readers(graph, reader.weight) == 1


def _scheme(place: Smoothable, formats: Formats) -> Scheme | None:
    """Of the weight of the first reader with quantized activations."""
    for reader in place.readers:
        form = formats.get(reader.layer)
        if form is not None and form.activations != "float":
            return form.weight
    return None


def _observed(parts: Iterator[Tensor]) -> tuple[Tensor, Tensor]:
    """The greatest magnitude of each feature, and some rows from all parts."""
    absmax: Tensor | None = None
    kept: list[Tensor] = []
    for part in parts:
        rows = part.reshape(-1, part.shape[-1])
        magnitudes = rows.abs()
        greatest = magnitudes.amax(0)
        absmax = greatest if absmax is None else torch.maximum(absmax, greatest)
        # and the row of the largest value, which gives the range
        kept += [rows[magnitudes.amax(1).argmax(), None], rows[:: -(-len(rows) // PART_ROWS)]]
    assert absmax is not None
    return absmax, torch.cat(kept)
