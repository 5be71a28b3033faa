"""Quantization: layers stored, and where the runtime can, computed in few bits.

It acts in the exported file (Q/DQ nodes around the layers; see `export.qdq`): the torch model stays
float. What each format costs a layer in accuracy is simulated in torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn

from compressor.quantization.plan import find_format
from compressor.result import Choice
from compressor.structure import surgery
from compressor.techniques.base import TECHNIQUES, Stage, Technique, TechniqueContext
from compressor.training.card import Card


@TECHNIQUES.register
class Quantization(Technique):
    """Half of the bytes or less, and integer arithmetic where the runtime has kernels."""

    name = "quantization"
    stage = Stage.NUMBERS
    card = Card(
        summary="Stores layers in 4 to 16 bits, and computes in eight where it is faster.",
        source="Jacob et al. (2018), Quantization and training of neural networks for efficient "
        "integer-arithmetic-only inference",
        functional=None,
        use_when="The runtime has integer kernels for the layers, as ONNX Runtime has on x86.",
        avoid_when="Layers are depthwise or have fewer than 16 channels: int8 gains nothing there.",
        cost="A calibration on the subset; no training.",
    )

    def choices(self, model: nn.Module, context: TechniqueContext) -> Iterator[Choice]:
        """Every layer in every format that the target and the configuration allow."""
        del model
        for layer, formats in context.layer_formats().items():
            for name in formats:
                label = name.replace("_", " ")
                yield Choice(self.name, layer, {"format": name}, label=label, modules=(layer,))

    def apply(self, model: nn.Module, choices: Sequence[Choice], context: TechniqueContext) -> None:
        """Check that layers and formats are there; the exporter writes them."""
        del context
        for choice in choices:
            find_format(choice.setting["format"])
            surgery.get(model, choice.site)
