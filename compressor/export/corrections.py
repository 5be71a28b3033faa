"""Corrections of a model that is quantized after training, by name and in the order that helps.

Each changes the float parameters, and smoothing what layers read, such that plain rounding gives
the corrected result: the plan knows nothing of it. First what keeps the function (equalization,
smoothing), then the ranges of activations, then the rounding and biases of the model with them.
"""

from __future__ import annotations

import copy
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from typing import Literal

import torch

from compressor.errors import ConfigError, suggest
from compressor.export.post_training import PostTraining
from compressor.quantization.corrections.biases import correct_biases
from compressor.quantization.corrections.learned import Method, round_weights
from compressor.quantization.corrections.pairs import equalize
from compressor.quantization.corrections.smoothed import smooth_graph
from compressor.quantization.corrections.walking import cut
from compressor.quantization.plan import Formats

Correction = Literal["equalization", "smoothing", "gptq", "adaround", "bias"]
CORRECTIONS: tuple[Correction, ...] = (
    "equalization",
    "smoothing",
    "gptq",
    "adaround",
    "bias",
)
KEEPING = frozenset({"equalization", "smoothing"})  # they keep the function
ROUNDING: tuple[Method, ...] = ("gptq", "adaround")
# With 4 bits the two together were best in each of three networks (docs/quantization.md); with 8
# and int8 activations no accuracy was gained.
BY_DEFAULT: tuple[Correction, ...] = ("gptq", "bias")
FEW_BITS = 8  # fewer than these
SAMPLES = 128
SECONDS = 300.0


@dataclass(frozen=True)
class CorrectionReport:
    """What was done.

    Attributes:
        equalized: pairs of layers.
        smoothed: alpha by the name of the value.
        rounded: "gptq" or "adaround" by layer.
        left: layers that the time was not enough for.
        biased: layers whose bias was corrected.
    """

    equalized: tuple[tuple[str, str], ...] = ()
    smoothed: dict[str, float] = field(default_factory=dict)
    rounded: dict[str, Method] = field(default_factory=dict)
    left: tuple[str, ...] = ()
    biased: tuple[str, ...] = ()


def correct(
    quantizer: PostTraining,
    formats: Formats,
    corrections: Collection[str],
    *,
    samples: int = SAMPLES,
    seconds: float = SECONDS,
    generator: torch.Generator | None = None,
) -> CorrectionReport:
    """Correct the model of `quantizer` for `formats`, in place.

    It is for these formats: in others the model may be worse than uncorrected. Where "smoothing"
    multiplies, the graph has parameters of its own; see `PostTraining.shares_parameters`.

    Args:
        quantizer: with calibration, unless the correction is "equalization".
        formats: of the layers that will be quantized.
        corrections: some of `CORRECTIONS`, in any order: "equalization" of the ranges between two
            layers; "smoothing" of what linear layers read; rounding by "gptq", or "adaround", or
            both: AdaRound where there are groups; "bias", for the mean error of each channel.
        samples: of the calibration, that corrections look at.
        seconds: for the rounding.
        generator: on the CPU; None is one with seed 0.

    Raises:
        ConfigError: for a correction that does not exist; the message has the nearest.
        DataError: if there is nothing to calibrate on, or a value is not finite.
        ModelError: if a layer does not exist.
    """
    wanted = check_corrections(corrections)
    generator = generator or torch.Generator().manual_seed(0)
    graph = quantizer.graph
    graph.products_of(formats)
    # before ranges are observed: an iterator can be read once
    parts = cut(graph, quantizer.samples(samples)) if wanted - {"equalization"} else []
    if wanted & KEEPING:
        quantizer.forget_ranges()
    report = CorrectionReport()
    if "equalization" in wanted:
        report = replace(report, equalized=tuple(equalize(graph, formats)))
    if "smoothing" in wanted:
        smoothed = smooth_graph(
            graph,
            formats,
            parts,
            activation=quantizer.activation,
            runtime=quantizer.runtime,
        )
        report = replace(report, smoothed=smoothed)
    methods = [method for method in ROUNDING if method in wanted]
    if not methods and "bias" not in wanted:
        return report
    plan = quantizer.plan(formats)  # before the weights change: the ranges are the float model's
    reference = copy.deepcopy(graph.module)
    if methods:
        rounding = round_weights(
            graph,
            plan,
            reference,
            parts,
            methods,
            generator=generator,
            seconds=seconds,
        )
        plan = rounding.plan
        quantizer.weights.update(plan.weights)
        report = replace(report, rounded=rounding.methods, left=rounding.left)
    if "bias" in wanted:
        report = replace(report, biased=tuple(correct_biases(graph, plan, reference, parts)))
    return report


def default_corrections(formats: Formats) -> tuple[Correction, ...]:
    """`BY_DEFAULT` if one of the weights has less than 8 bits, else none.

    >>> from compressor.quantization.plan import STATIC_INT8, WEIGHT_INT4
    >>> default_corrections({"head": STATIC_INT8}), default_corrections({"head": WEIGHT_INT4})
    ((), ('gptq', 'bias'))
    """
    has_few = any(form.weight.bits < FEW_BITS for form in formats.values())
    return BY_DEFAULT if has_few else ()


def check_corrections(corrections: Collection[str]) -> frozenset[str]:
    """The names as a set.

    Raises:
        ConfigError: for an unknown one, or a string in place of a list.
    """
    if isinstance(corrections, str):
        raise ConfigError(
            f"corrections={corrections!r} is not a list. Write it in brackets: [{corrections!r}]."
        )
    for name in corrections:
        if name not in CORRECTIONS:
            raise ConfigError(
                f"The correction {name!r} is unknown. {suggest(str(name), CORRECTIONS)}"
            )
    return frozenset(corrections)
