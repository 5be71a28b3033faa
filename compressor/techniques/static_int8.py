"""Static int8: weights and activations in eight bits, ranges fixed by calibration.

It acts in the exported file (Q/DQ nodes around the layers; see `export.qdq`): the torch model stays
float.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn

from compressor.result import Choice
from compressor.structure import surgery
from compressor.techniques.base import TECHNIQUES, Stage, Technique, TechniqueContext
from compressor.training.card import Card


@TECHNIQUES.register
class StaticInt8(Technique):
    """A quarter of the bytes, and integer arithmetic where the runtime has kernels for it."""

    name = "static_int8"
    stage = Stage.NUMBERS
    card = Card(
        summary="Stores and computes layers in eight bits, with ranges from calibration batches.",
        source="Jacob et al. (2018), Quantization and training of neural networks for efficient "
        "integer-arithmetic-only inference",
        functional=None,
        use_when="The runtime has integer kernels for the layers, as ONNX Runtime has on x86.",
        avoid_when="Layers are depthwise or have fewer than 16 channels: int8 gains nothing there.",
        cost="A calibration on the subset; no training.",
    )

    def choices(self, model: nn.Module, context: TechniqueContext) -> Iterator[Choice]:
        """Every layer that the target can run in int8."""
        del model
        for layer in context.runtime_layers():
            yield Choice(self.name, layer, {"bits": 8}, label="int8", modules=(layer,))

    def apply(self, model: nn.Module, choices: Sequence[Choice], context: TechniqueContext) -> None:
        """Check that the layers are there; the exporter writes them in int8."""
        del context
        for choice in choices:
            surgery.get(model, choice.site)
