"""Weights of a whole graph rounded layer by layer, in place: GPTQ and AdaRound within a time.

Each layer sees what the layers before it, rounded already, give it. See `gptq` and `rounding` for
one layer.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Literal

import torch
from torch import Tensor, fx

from compressor.errors import DataError
from compressor.interfaces.inputs import ModelInputs
from compressor.quantization.corrections.channels import count_readers, groups_of
from compressor.quantization.corrections.gptq import accumulate_hessian, gptq
from compressor.quantization.corrections.rounding import adaptive_rounding
from compressor.quantization.corrections.walking import Walk, forward_of
from compressor.quantization.graph import Product, QuantizationGraph
from compressor.quantization.model import QuantizedModel, Quantizer
from compressor.quantization.plan import QuantizationPlan

Method = Literal["gptq", "adaround"]
# Inputs and targets of one layer, and the patches of a convolution at a time.
LAYER_BYTES, PATCH_BYTES = 256 * 2**20, 32 * 2**20
# Rows of a hessian for each of its columns: more of them hardly change it.
ROWS_PER_COLUMN = 8
LEAST_ROWS = 4096
MOST_COLUMNS = 8192  # a hessian of 512 MiB in double
LEAST_SECONDS = 0.05


@dataclass(frozen=True)
class RoundingReport:
    """What was rounded.

    Attributes:
        plan: with the scales of the rounded weights.
        methods: by layer.
        left: layers that the time was not enough for: they are rounded to nearest.
    """

    plan: QuantizationPlan
    methods: dict[str, Method]
    left: tuple[str, ...]


def round_weights(
    graph: QuantizationGraph,
    plan: QuantizationPlan,
    reference: fx.GraphModule,
    parts: Sequence[ModelInputs],
    methods: Collection[Method],
    *,
    generator: torch.Generator,
    seconds: float = 300.0,
    iterations: int = 1000,
    clock: Callable[[], float] = time.monotonic,
) -> RoundingReport:
    """Round the weights of `plan` such that the layers' outputs change little, in place.

    With both methods GPTQ rounds linear layers and dense convolutions, AdaRound those with groups;
    with one, that one rounds all that it can. On the samples no layer is farther from its float
    outputs than to nearest, given the same inputs (GPTQ) or those of the float model (AdaRound).
    Rounded to nearest with the scales of the result, the weights stay as they are.

    Args:
        graph: of the model, whose weights are changed.
        plan: the formats and numbers that the model will have.
        reference: a copy of `graph.module` with the weights of the float model.
        parts: calibration samples, as of `walking.cut`.
        methods: "gptq", "adaround" or both.
        generator: on the CPU; draws minibatches and positions of convolutions.
        seconds: for the whole model; it ends soon after, and the rest is rounded to nearest.
        iterations: of AdaRound in each layer; fewer if the time is short.
        clock: in seconds.

    Raises:
        DataError: if an input is not finite; the message names the layer.
    """
    end = clock() + seconds
    model = QuantizedModel(graph, plan)
    walks = Walk(reference, parts), Walk(model.graph, parts)
    quantizers = model.quantizers()
    chosen = _choose(graph, plan, methods)
    rounded: dict[str, Method] = {}
    for number, (product, method) in enumerate(chosen):
        begin = clock()
        if begin >= end:
            break
        layer_end = begin + (end - begin) / _turns(chosen[number:])
        quantizer = quantizers["w", product.weight]
        try:
            if method == "gptq":
                rows = _rows(product, graph, walks[1].inputs(product), len(parts), generator)
                weight = _by_gptq(graph.tensor(product.weight), rows, quantizer)
            else:
                pairs = zip(*(walk.inputs(product) for walk in walks), strict=True)
                inputs, targets = _sample(product, reference, pairs)
                weight = adaptive_rounding(
                    graph.tensor(product.weight),
                    None if product.bias is None else graph.tensor(product.bias).detach(),
                    quantizer.scale,
                    quantizer.zero_point,
                    quantizer.scheme,
                    inputs,
                    targets,
                    forward_of(product, tail=True),
                    generator=generator,
                    iterations=iterations,
                    seconds=max(layer_end - clock(), LEAST_SECONDS),
                    clock=clock,
                )
        except DataError as error:
            raise DataError(f"Layer {product.layer!r}: {error}") from error
        with torch.no_grad():
            graph.tensor(product.weight).copy_(weight)
        rounded[product.layer] = method
    left = tuple(product.layer for product, _ in chosen if product.layer not in rounded)
    return RoundingReport(replace(plan, weights=model.plan().weights), rounded, left)


def _choose(
    graph: QuantizationGraph, plan: QuantizationPlan, methods: Collection[Method]
) -> list[tuple[Product, Method]]:
    """The first product of each weight, and what it is rounded by."""
    chosen: dict[str, tuple[Product, Method]] = {}
    products = graph.products_of(plan.formats)
    for product in products:
        tensor = plan.weights.get(product.weight)
        if product.weight in chosen or tensor is None or not tensor.scheme.has_integers:
            continue
        if count_readers(graph, product.weight) > sum(p.weight == product.weight for p in products):
            continue  # an embedding looks its rows up as well
        columns = graph.tensor(product.weight)[0].numel()
        if "gptq" in methods and groups_of(product) == 1 and columns <= MOST_COLUMNS:
            chosen[product.weight] = product, "gptq"
        elif "adaround" in methods:
            chosen[product.weight] = product, "adaround"
    return list(chosen.values())


def _turns(chosen: Sequence[tuple[Product, Method]]) -> float:
    """The time that is left, in turns of the first: AdaRound takes what it gets, GPTQ little."""
    share = {"gptq": 0.1, "adaround": 1.0}
    return sum(share[method] for _, method in chosen) / share[chosen[0][1]]


def _by_gptq(weight: Tensor, rows: Iterator[Tensor], quantizer: Quantizer) -> Tensor:
    matrix = weight.detach().flatten(1)
    hessian = torch.zeros(matrix.shape[1], matrix.shape[1], device=matrix.device)
    for some in rows:
        accumulate_hessian(hessian, some)
    scheme = quantizer.scheme
    if scheme.block is not None:
        scheme = replace(scheme, block=scheme.block * weight[0, 0].numel())
        result = gptq(matrix, hessian, scheme)
        quantizer.scale.copy_(result.scale)
        quantizer.zero_point.copy_(result.zero_point)
    else:
        known = quantizer.scale, quantizer.zero_point
        result = gptq(matrix, hessian, scheme, scale=known[0], zero_point=known[1])
    return result.weight.view_as(weight).to(weight.dtype)


def _rows(
    product: Product,
    graph: QuantizationGraph,
    inputs: Iterable[Tensor],
    parts: int,
    generator: torch.Generator,
) -> Iterator[Tensor]:
    """What each row of the weight is multiplied by, (rows, columns): some, from all parts."""
    weight = graph.tensor(product.weight)
    columns = weight[0].numel()
    wanted = -(-max(LEAST_ROWS, ROWS_PER_COLUMN * columns) // parts)
    for part in inputs:
        if not product.is_convolution:
            rows = part.reshape(-1, columns)
            yield rows[_drawn(len(rows), wanted, generator)]
            continue
        values = product.node.meta["val"]
        positions = prod(values.shape[2:])
        size = max(1, PATCH_BYTES // (4 * columns * positions))
        pieces = torch.split(part, size)
        for piece in pieces:
            patches = _patches(product, piece, weight).movedim(1, -1).reshape(-1, columns)
            yield patches[_drawn(len(patches), -(-wanted // len(pieces)), generator)]


def _drawn(count: int, wanted: int, generator: torch.Generator) -> Tensor:
    """Which of `count` rows are taken; in order, all of them if there are few."""
    if count <= wanted:
        return torch.arange(count)
    return torch.randperm(count, generator=generator)[:wanted].sort().values


def _patches(product: Product, x: Tensor, weight: Tensor) -> Tensor:
    """(N, in * kernel, …): the convolution by each single entry of its kernel."""
    columns = weight[0].numel()
    single = torch.eye(columns, device=x.device).view(columns, *weight.shape[1:])
    return forward_of(product)(x, single, None)


def _sample(
    product: Product, reference: fx.GraphModule, pairs: Iterable[tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """What the layer reads, and what it should write, of as many samples as `LAYER_BYTES` hold."""
    forward = forward_of(product, tail=True)
    weight = reference.get_parameter(product.weight).detach()
    bias = None if product.bias is None else reference.get_parameter(product.bias).detach()
    inputs, targets, total = [], [], 0
    for expected, actual in pairs:  # to their end: then the walks need not go back
        if total > LAYER_BYTES:
            continue
        inputs.append(actual)
        targets.append(forward(expected, weight, bias))
        total += actual.nbytes + targets[-1].nbytes
    return torch.cat(inputs), torch.cat(targets)
