"""Quantization-aware training: a model learns to be right with the numbers that integers can say.

Sources: Jacob et al. (2018), Quantization and training of neural networks for efficient integer
arithmetic-only inference; Esser et al. (2020), Learned step size quantization.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from types import MappingProxyType

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from compressor.distributed import current_context
from compressor.errors import ConfigError
from compressor.quantization.model import QuantizedModel, Quantizer
from compressor.quantization.operations import CLIPPING, aten
from compressor.structure.surgery import Edit
from compressor.training.algorithm import Algorithm
from compressor.training.algorithms.windows import refuse_window
from compressor.training.card import Card
from compressor.training.clock import DurationLike, Window
from compressor.training.events import Event
from compressor.training.state import State

# Of the logarithm: a scale that is 16 times what was calibrated, or a 16th, has run away.
MOST_GROWTH = math.log(16)
# In the balance of LSQ an activation's scale of 1/255 had gradients of 1,000, and 4-bit nets that
# SGD trained fell to chance; bounds of 0.03 to 0.3 did equally well.
MOST_GRADIENT = 0.1


class QuantizationAwareTraining(Algorithm):
    """Trains a `QuantizedModel`: its parameters through the rounding, and its scales.

    The model rounds from the first batch, with the ranges of its plan. In three stretches of time:

    - Until `observe_until` the ranges of activations follow the data: after each step they move
      towards the extremes of its batch. Zero points move with them, and then never again.
    - From then on the scales of activations are trained. Those of weights are from the first batch:
      a weight's range need not be observed, and a plan may have chosen it with more care.
    - From `freeze_from` on all scales stay, so that the weights settle on a grid that rests; so do
      the statistics of batch norms that the model has beside the graph. In the graph they are
      folded or fixed, and dropout is gone.

    Integers that end within a clip such as ReLU6 go on doing so, since a runtime then leaves the
    clip out. Scales are parameters "….growth" (see `step_size`) that the optimizer steps like all
    others; none moves faster in a step of SGD than by a tenth of the learning rate, of itself. It
    has no `window`.

    Train with `GradientClipping(1.0)`, since rounded nets without batch norms have gradients that
    run away: with distillation and a rate of 0.002 (SGD, momentum 0.9) ResNet-20 with 4-bit weights
    fell to chance, and with clipping it gained at 0.002 and at 0.01.

    Algorithms that change inputs, such as MixUp, also do while ranges are observed, which then are
    those of what the model is given: let them have a `window` from `observe_until` on, or none and
    `observe_until='0dur'`. Calibration, which comes before, sees plain batches.

    Prune before; what must stay zero is held by `HoldMasks`, whose layers are "graph.…" here.

    Args:
        observe_until: '0dur' leaves the ranges as they were calibrated.
        freeze_from: '1dur' trains the scales to the end.
        momentum: part of the way that a range moves after each batch, above 0 to 1.

    Raises:
        ConfigError: for values without a meaning.
    """

    events = frozenset({Event.SETUP, Event.BATCH_START, Event.BEFORE_STEP, Event.AFTER_STEP})
    # what is clipped is what is stepped; what is averaged is what the next batch has
    before = ("GradientClipping", "WeightAverage")
    conflicts = MappingProxyType(
        {
            "ProgressiveResizing": "cannot act in one fit: the graph and the ranges of a quantized "
            "model are those of one size. Train with small images before you quantize."
        }
    )
    card = Card(
        summary="Trains a model while it rounds as its quantized file will, and trains the scales.",
        source="Jacob et al. (2018), Quantization and training of neural networks for efficient "
        "integer arithmetic-only inference; Esser et al. (2020), Learned step size quantization",
        functional=None,
        use_when="Quantization after training loses too much: few bits, narrow or depthwise nets.",
        avoid_when="Rounding alone is within what may be lost: it takes minutes, and no labels.",
        cost="A batch takes about twice as long (ResNet-20 on a CPU), and memory for a copy of "
        "each activation that is rounded.",
    )

    def __init__(
        self,
        observe_until: DurationLike = "0.1dur",
        freeze_from: DurationLike = "0.9dur",
        *,
        momentum: float = 0.1,
    ) -> None:
        if not 0 < momentum <= 1:
            raise ConfigError(
                f"momentum={momentum} is no part of the way to a batch's range. Write above 0 to "
                "1, such as 0.1; observe_until='0dur' leaves the ranges as they are."
            )
        self.learning = Window.parse(observe_until, freeze_from)
        self.momentum = momentum
        self._quantizers: list[Quantizer] = []
        self._norms: list[nn.Module] = []
        self._growths: list[Tensor] = []
        self._limits: list[float] = []

    def on(self, event: Event, state: State) -> None:
        """Make the scales parameters; say who learns; follow ranges and keep scales in bounds."""
        if event is Event.SETUP:
            refuse_window(self, "`observe_until` and `freeze_from`", "the model rounds always")
            self.close()
            state.edit(self._prepare)
        elif event is Event.BATCH_START:
            self._bind(state.model)
            self._begin_batch(state)
        elif event is Event.BEFORE_STEP:
            gradients = [growth.grad for growth in self._growths if growth.grad is not None]
            if gradients:
                torch._foreach_clamp_min_(gradients, -MOST_GRADIENT)
                torch._foreach_clamp_max_(gradients, MOST_GRADIENT)
        else:
            self._end_batch(state)

    def rebind(self, edit: Edit, state: State) -> None:
        """Find quantizers and parameters anew."""
        self.close()

    def close(self) -> None:
        """Let all that was frozen require a gradient again."""
        for quantizer in self._quantizers:
            quantizer.is_following = False
        for growth in self._growths:
            growth.requires_grad_(True)
        self._quantizers, self._norms, self._growths, self._limits = [], [], [], []

    def _prepare(self, model: nn.Module) -> Edit:
        """Make scales parameters, in place."""
        quantizers = [quantizer for each in _quantized(model) for quantizer in _trained(each)]
        if not any(each.quantizers() for each in _quantized(model)):
            raise ConfigError(
                f"The {type(model).__name__} has no quantizers to train. Train what "
                f"`PostTraining.simulate` returns, or leave {self.key!r} out."
            )
        before = set(_parameter_names(model))
        for quantizer in quantizers:
            quantizer.learn_scale()
            if quantizer.key[0] == "a" and self.learning.start.value:
                quantizer.follow_range()
        return Edit(added=frozenset(_parameter_names(model)) - before)

    def _bind(self, model: nn.Module) -> None:
        """Find what is acted on; once a fit, and after an edit."""
        if self._quantizers:
            return
        self._norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
        for quantized in _quantized(model):
            clipped = _clipped_values(quantized)
            for quantizer in _trained(quantized):
                assert quantizer.growth is not None
                kind, name = quantizer.key
                self._quantizers.append(quantizer)
                self._growths.append(quantizer.growth)
                self._limits.append(0.0 if kind == "a" and name in clipped else MOST_GROWTH)

    def _begin_batch(self, state: State) -> None:
        clock, total = state.clock, state.max_duration
        is_observing = not clock.has_reached(self.learning.start, total)
        is_frozen = not is_observing and not self.learning.contains(clock, total)
        for quantizer, growth in zip(self._quantizers, self._growths, strict=True):
            quantizer.is_following = is_observing and quantizer.key[0] == "a"
            learns = not is_frozen and not quantizer.is_following
            if growth.requires_grad is not learns:
                growth.requires_grad_(learns)
                growth.grad = None  # momentum would step it on
        if is_frozen:
            for norm in self._norms:
                norm.eval()

    def _end_batch(self, state: State) -> None:
        following = [quantizer for quantizer in self._quantizers if quantizer.is_following]
        with torch.no_grad():
            for quantizer in following:
                # what overflowed is not what the model computes
                quantizer.take_range(0.0 if state.step_skipped else self.momentum)
            if self._growths:  # weights in floats of 16 bits have no scales
                torch._foreach_clamp_min_(self._growths, -MOST_GROWTH)
                torch._foreach_clamp_max_(self._growths, self._limits)
        if following:  # each process has seen other batches
            current_context().broadcast(
                [buffer for quantizer in following for buffer in quantizer.buffers()]
            )


def _quantized(model: nn.Module) -> Iterator[QuantizedModel]:
    """The quantized models in `model`, which may be one itself."""
    return (module for module in model.modules() if isinstance(module, QuantizedModel))


def _trained(model: QuantizedModel) -> list[Quantizer]:
    return [each for each in model.quantizers().values() if each.scheme.has_integers]


def _parameter_names(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_parameters(remove_duplicate=False)]


def _clipped_values(model: QuantizedModel) -> set[str]:
    """Names of the values that a clip has made, which has an upper end."""
    return {node.name for node in model.source.graph.nodes if _has_upper_end(node)}


def _has_upper_end(node: fx.Node) -> bool:
    if node.target in {aten.relu6.default, aten.hardtanh.default}:
        return True
    return node.target in CLIPPING and len(node.args) > 2 and node.args[2] is not None
