"""SmoothQuant of a whole graph, in place; see `smoothing` for one layer."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

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
from compressor.quantization.graph_state import add_child
from compressor.quantization.placement import Runtime
from compressor.quantization.plan import Formats, place_static
from compressor.quantization.scheme import ACTIVATION, Scheme

aten: Any = torch.ops.aten
ROWS = 512  # of all parts, that alpha is searched on
FACTORS = "smoothing"  # the module of a graph that holds what is multiplied by
# Of the squared error; to multiply costs a few percent of the time (d 384: 3 % for the two behind
# the norms of a block, 9 % for all four).
MULTIPLIED_FRACTION = 0.5


@dataclass(frozen=True)
class Smoothable:
    """Features that linear layers read.

    Attributes:
        name: of the value.
        paths: parameters that make it, whose rows are divided by the scales; none where something
            else makes or reads it as well: then the readers take a multiple of it.
        readers: whose columns are multiplied by the scales.
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
    runtime: Runtime = "onnxruntime",
) -> dict[str, float]:
    """Move outliers of what linear layers read into their weights, in place.

    Smoothed is what a layer norm with a weight, or another product, makes for linear layers alone,
    if one of them has quantized activations. Else, as behind a GELU, or where a residual branch
    reads the norm as well, such layers read the value times a constant, and their weights and
    biases in the graph are no longer the model's. That is done if it leaves less than
    `MULTIPLIED_FRACTION` of the squared error, and if the value is computed in float anyway. The
    graph computes what it did, but for rounding.

    Args:
        graph: of the model, whose parameters are changed.
        formats: of the layers that will be quantized.
        parts: calibration samples, as of `walking.cut`.
        alpha: 0 to 1, as of `smoothing_scales`; None searches the best of each place.
        activation: the scheme of activations.
        runtime: that the file is for: it says where quantizers sit.

    Returns:
        The alpha of each place that was smoothed, by the name of its value in the graph.

    Raises:
        ConfigError: if `alpha` is out of range.
        DataError: if the samples are not finite.
    """
    chosen: dict[str, float] = {}
    walk = Walk(copy.deepcopy(graph.module), parts)
    placement = place_static(graph, formats, runtime)
    for place in find_smoothable(graph):
        rounding = [reader for reader in place.readers if _is_rounding(reader, formats)]
        if not rounding or (not place.paths and placement.has_integers(rounding[0].source)):
            continue
        readers = place.readers if place.paths else rounding
        absmax, rows = _observed(walk.inputs(readers[0]), -(-ROWS // len(parts)))
        weights = [graph.tensor(reader.weight) for reader in readers]
        best = alpha
        if best is None:
            fraction = 1.0 if place.paths else MULTIPLIED_FRACTION
            scheme = formats[rounding[0].layer].weight
            best = search_alpha(weights, rows, activation, scheme, error_fraction=fraction)
        if best is None:
            continue
        scales = smoothing_scales(absmax, torch.cat(weights).abs().amax(0), best)
        if not place.paths:
            _give_own_parameters(graph, readers)
            _multiply_source(graph, readers, 1 / scales)
        for path in place.paths:
            rows_first = graph.tensor(path)
            rows_first.div_(scales.view(-1, *[1] * (rows_first.dim() - 1)))
        for reader in readers:
            weight = graph.tensor(reader.weight)
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
    taken = {reader.node for place in places for reader in place.readers}
    sources: dict[fx.Node, list[Product]] = defaultdict(list)
    for product in graph.products:
        if product.node not in taken and not product.is_convolution and _is_alone(graph, product):
            sources[product.source].append(product)
    places += [Smoothable(source.name, (), tuple(group)) for source, group in sources.items()]
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


def _give_own_parameters(graph: QuantizationGraph, readers: Iterable[Product]) -> None:
    """Let them have weights and biases in the graph that the model does not have, in place."""
    for reader in readers:
        for path in _paths(reader):
            owner, _, name = path.rpartition(".")
            module = graph.module.get_submodule(owner)
            module._buffers.pop(name, None)
            module.register_parameter(name, nn.Parameter(graph.tensor(path).detach().clone()))
    graph.read_again()


def _multiply_source(graph: QuantizationGraph, readers: Sequence[Product], factors: Tensor) -> None:
    """Let products with one source read it times `factors`, in place."""
    module, source = graph.module, readers[0].source
    holder = nn.Module()
    holder.register_buffer("factors", factors)
    path = add_child(module, FACTORS, holder)
    with module.graph.inserting_before(readers[0].node):
        constant = module.graph.get_attr(f"{path}.factors")
        scaled = module.graph.call_function(aten.mul.Tensor, (source, constant))
    constant.meta, scaled.meta = {"val": factors}, {"val": source.meta["val"]}
    for reader in readers:
        reader.node.replace_input_with(source, scaled)
    graph.read_again()


def _is_rounding(reader: Product, formats: Formats) -> bool:
    """Whether its activations are quantized."""
    return reader.layer in formats and formats[reader.layer].activations != "float"


def _is_alone(graph: QuantizationGraph, reader: Product) -> bool:
    return count_readers(graph, reader.weight) == 1


def _observed(parts: Iterator[Tensor], count: int) -> tuple[Tensor, Tensor]:
    """The greatest magnitude of each feature, and `count` rows of each part."""
    absmax: Tensor | None = None
    kept: list[Tensor] = []
    for part in parts:
        rows = part.reshape(-1, part.shape[-1])
        magnitudes = rows.abs()
        greatest = magnitudes.amax(0)
        absmax = greatest if absmax is None else torch.maximum(absmax, greatest)
        # and the row of the largest value, which gives the range
        kept += [rows[magnitudes.amax(1).argmax(), None], rows[:: -(-len(rows) // count)]]
    assert absmax is not None
    return absmax, torch.cat(kept)
