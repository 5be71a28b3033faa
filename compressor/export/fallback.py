"""Within delta: what changes least about a quantized model such that its metric holds in the file.

1. The model as it was asked for: one evaluation of its file.
2. Of other ranges (by "mse") and corrected biases, what brings the outputs nearest to those in
   float, on calibration samples alone: one evaluation.
3. Layers in float, those first whose quantizers do most damage, as few as suffice. That is found by
   bisection, and with all of them it is the float model: log2(layers) evaluations, rounded up, and
   an end.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Real
from pathlib import Path

import torch
from torch import Tensor, nn

from compressor.errors import ConfigError
from compressor.export.corrections import KEEPING, CorrectionReport
from compressor.export.onnxruntime_model import OnnxRuntimeModel
from compressor.export.post_training import PostTraining
from compressor.export.qdq import export_quantized
from compressor.interfaces.divergence import divergence
from compressor.interfaces.inputs import ModelInputs, output_tensors
from compressor.interfaces.metrics import check_delta
from compressor.logs import get_logger
from compressor.quantization.model import QuantizedModel
from compressor.quantization.observers import Method
from compressor.quantization.plan import Formats
from compressor.quantization.sensitivity import (
    Damages,
    Key,
    check_metric,
    layers_by_damage,
    quantizer_sensitivity,
)
from compressor.structure.trace import eval_mode

logger = get_logger(__name__)

Evaluate = Callable[[nn.Module], float]
Correct = Callable[[Formats, Collection[str]], CorrectionReport]
TOO_DEAR = "With it on integers the metric of the file is outside delta."
SENSED_SAMPLES = 32  # of the calibration, that damages are measured on


@dataclass(frozen=True)
class Fallback:
    """How the metric was held.

    Attributes:
        reference: the metric of the float model.
        value: of the file; with no layer quantized the reference.
        evaluations: of files.
        method: how ranges were found.
        corrections: that were made.
        damages: of each quantizer alone; empty if no layer had to be left in float.
    """

    reference: float
    value: float
    evaluations: int
    method: Method
    corrections: tuple[str, ...]
    damages: Damages = field(default_factory=dict, repr=False)


@dataclass(frozen=True)
class Setting:
    """How ranges are found, and what is corrected."""

    method: Method
    corrections: tuple[str, ...]


@dataclass(frozen=True)
class Wish:
    """A metric, larger is better, and the drop of it that is accepted."""

    evaluate: Evaluate
    delta: float


@dataclass(frozen=True)
class Attempt:
    """A quantized model, and how it was made.

    Attributes:
        module: right while its parameters are `tensors`.
        formats: of the layers that are quantized.
        setting: of ranges and corrections.
        report: what the corrections did.
        tensors: the parameters after the corrections, by name in the graph.
    """

    module: QuantizedModel
    formats: Formats
    setting: Setting
    report: CorrectionReport
    tensors: Mapping[str, Tensor] = field(repr=False)


def read_wish(evaluate: Evaluate | None, delta: float | None) -> Wish | None:
    """The two as one; None if neither is given.

    Raises:
        ConfigError: for one without the other, no function, or no number from 0 on.
    """
    if evaluate is None and delta is None:
        return None
    if evaluate is None or delta is None:
        given, missing = ("delta", "evaluate") if evaluate is None else ("evaluate", "delta")
        raise ConfigError(
            f"`{given}` needs `{missing}`. Give a function `evaluate(module) -> float`, larger for "
            "a better model, and `delta`, the drop of its value that you accept."
        )
    if not callable(evaluate):
        raise ConfigError(
            f"evaluate={evaluate!r} is no function. Give `evaluate(module) -> float`, larger for a "
            "better model."
        )
    if not isinstance(delta, Real) or not 0 <= delta < math.inf:
        raise ConfigError(
            f"delta={delta!r} is no drop of a metric. Write a number from 0 on, on the metric's "
            "own scale: 0.01 is one percentage point of a fraction."
        )
    return Wish(evaluate, delta)


def hold(
    quantizer: PostTraining,
    formats: Formats,
    setting: Setting,
    correct: Correct,
    wish: Wish,
    *,
    model: nn.Module,
    inputs: ModelInputs,
) -> tuple[Attempt, Fallback]:
    """Quantize such that the file's metric is at most `delta` below the model's.

    Args:
        quantizer: of the model; its parameters are those of the attempt afterwards.
        formats: of all layers that shall be quantized.
        setting: that was asked for.
        correct: corrects the quantizer's model for some formats, in place.
        wish: the metric and delta.
        model: in float; its mode is put back.
        inputs: of one call.

    Raises:
        ConfigError: for a delta that every model would keep.
        MetricError: if the metric is not a finite number.
    """
    with eval_mode(model), torch.no_grad():
        reference = check_metric(wish.evaluate(model))
    check_delta(wish.delta, "evaluate", reference, is_larger_better=True)
    keeping = [name for name in setting.corrections if name in KEEPING]
    kept = correct(formats, keeping)  # what keeps the function is done once, for all attempts
    trials = _Trials(quantizer, correct, inputs, wish.evaluate)
    least = reference - wish.delta
    damages: dict[Key, float] = {}
    attempt = trials.make(formats, setting)
    value = trials.judge(attempt)
    if value < least:
        nearest = trials.nearest(attempt)
        found = value if nearest is attempt else trials.judge(nearest)
        if found >= value:
            attempt, value = nearest, found
    if value < least:
        damages = trials.sense(attempt)
        order = layers_by_damage(_needs(quantizer, formats), damages)
        attempt, value = trials.bisect(attempt, order, reference, least)
    trials.restore(attempt.tensors)
    report = replace(attempt.report, equalized=kept.equalized, smoothed=kept.smoothed)
    how = attempt.setting
    fallback = Fallback(reference, value, trials.evaluations, how.method, how.corrections, damages)
    return replace(attempt, report=report), fallback


def reasons(formats: Formats, attempt: Attempt) -> dict[str, str]:
    """Why layers of `formats` are in float."""
    return {name: TOO_DEAR for name in formats if name not in attempt.formats}


class _Trials:
    """Makes quantized models, each of the same float model, and judges their files."""

    def __init__(
        self, quantizer: PostTraining, correct: Correct, inputs: ModelInputs, evaluate: Evaluate
    ) -> None:
        self.evaluations = 0
        self._quantizer = quantizer
        self._correct = correct
        self._inputs = inputs
        self._evaluate = evaluate
        self._samples = quantizer.samples(SENSED_SAMPLES)
        self._weights = dict(quantizer.weights)
        self._tensors = _copy(quantizer)
        self._outputs = self._run(quantizer.graph.module)

    def make(self, formats: Formats, setting: Setting) -> Attempt:
        """Quantize; the parameters are the attempt's until another is made."""
        self.restore(self._tensors)
        self._quantizer.weights = dict(self._weights)
        self._quantizer.method = setting.method
        names = [name for name in setting.corrections if name not in KEEPING]
        report = self._correct(formats, names) if formats else CorrectionReport()
        module = self._quantizer.simulate(formats).eval()
        return Attempt(module, formats, setting, report, _copy(self._quantizer))

    def judge(self, attempt: Attempt) -> float:
        """The metric of its file in ONNX Runtime."""
        self.evaluations += 1
        with tempfile.TemporaryDirectory() as folder:
            path = export_quantized(attempt.module, self._inputs, Path(folder) / "model.onnx")
            module = OnnxRuntimeModel(path, threads=torch.get_num_threads())
            with torch.no_grad():
                value = check_metric(self._evaluate(module))
        logger.info(
            "%d layers quantized, ranges by %s, corrections %s: %.6g",
            len(attempt.formats),
            attempt.setting.method,
            list(attempt.setting.corrections),
            value,
        )
        return value

    def nearest(self, attempt: Attempt) -> Attempt:
        """Of `attempt` and its variants, the one whose outputs are nearest to those in float."""
        best, least = attempt, self._distance(attempt)
        for setting in _variants(attempt):
            other = self.make(attempt.formats, setting)
            distance = self._distance(other)
            if distance < least:
                best, least = other, distance
        self.restore(best.tensors)
        return best

    def sense(self, attempt: Attempt) -> dict[Key, float]:
        """The damage of each quantizer, of weights as they are before corrections."""
        plain = self.make(attempt.formats, replace(attempt.setting, corrections=()))
        return quantizer_sensitivity(plain.module, self._samples)

    def bisect(
        self, attempt: Attempt, order: Sequence[str], reference: float, least: float
    ) -> tuple[Attempt, float]:
        """Leave the first layers of `order` in float, as few as hold."""
        low, high = 0, len(order)  # low fails, high holds
        best, value = None, reference
        while high - low > 1:
            middle = (low + high) // 2
            left = set(order[:middle])
            formats = {name: form for name, form in attempt.formats.items() if name not in left}
            candidate = self.make(formats, attempt.setting)
            found = self.judge(candidate)
            if found >= least:
                high, best, value = middle, candidate, found
            else:
                low = middle
        if best is None:
            logger.warning(
                "No layer is quantized: even one costs more than delta. Try other corrections, "
                "more calibration samples, or training through the rounding."
            )
            best = self.make({}, attempt.setting)
        return best, value

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Give the model these parameters, in place."""
        for name, tensor in self._quantizer.graph.module.named_parameters():
            tensor.copy_(tensors[name])

    def _distance(self, attempt: Attempt) -> float:
        """From the outputs in float; infinite if one is not finite."""
        found = divergence(self._run(attempt.module), self._outputs, is_classifier=False)
        return found if math.isfinite(found) else math.inf

    def _run(self, module: nn.Module) -> list[list[Tensor]]:
        with torch.no_grad():
            return [output_tensors(batch.call(module)) for batch in self._samples]


def _variants(attempt: Attempt) -> list[Setting]:
    """What is cheap and mostly helps; the ranges of activations matter where they are static."""
    method, corrections = attempt.setting.method, attempt.setting.corrections
    is_static = any(form.activations == "static" for form in attempt.formats.values())
    methods = dict.fromkeys([method, "mse"] if is_static else [method])
    lists = dict.fromkeys([corrections, tuple(dict.fromkeys([*corrections, "bias"]))])
    found = [Setting(method, names) for method in methods for names in lists]
    return [setting for setting in found if setting != attempt.setting]


def _needs(quantizer: PostTraining, formats: Formats) -> dict[str, set[Key]]:
    """The quantizers of each layer when no other is quantized."""
    needs = {}
    for name, form in formats.items():
        plan = quantizer.plan({name: form})
        weights, activations = set(plan.weights), set(plan.activations)
        if form.activations == "dynamic":
            activations |= {p.source.name for p in quantizer.graph.products_of([name])}
        needs[name] = {("w", path) for path in weights} | {("a", value) for value in activations}
    return needs


def _copy(quantizer: PostTraining) -> dict[str, Tensor]:
    parameters = quantizer.graph.module.named_parameters()
    return {name: parameter.detach().clone() for name, parameter in parameters}
