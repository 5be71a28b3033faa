"""Weight clustering: the weights of a layer share few values, so that a file needs few bits each.

A palette of 2**bits values a layer and an index a weight, see `structure.packing`. The model
computes in float as before. Source: Han et al. 2016, Deep compression (1510.00149).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn

from compressor.result import Choice
from compressor.structure.packing import stored_bits
from compressor.techniques.base import TECHNIQUES, Stage, Technique, TechniqueContext
from compressor.techniques.values import ROOT, compact_layers, layers_at, write_weight
from compressor.training.algorithm import Algorithm
from compressor.training.algorithms.weight_clustering import WeightClustering, cluster_weights
from compressor.training.card import Card

BITS = (8, 6, 4, 3, 2)  # of an index


@TECHNIQUES.register
class Clustering(Technique):
    """A quarter to a sixteenth of the bytes, where files are packed."""

    name = "clustering"
    stage = Stage.PALETTE
    card = Card(
        summary="Replaces the weights of a layer by the nearest of a few values, and trains those.",
        source="Han et al. (2016), Deep compression: Compressing deep neural networks with "
        "pruning, trained quantization and Huffman coding",
        functional=None,
        use_when="The file must be small, and the target computes in float.",
        avoid_when="The target should be faster: it computes with the values as before. Use int8.",
        cost="A sort of the weights and some dozen passes over their cumulative sums.",
    )

    def choices(self, model: nn.Module, context: TechniqueContext) -> Iterator[Choice]:
        """For every layer, palettes of 2 to 8 bits, where they and their indices are smaller."""
        for name, layer in compact_layers(self.name, model, context).items():
            size, full = layer.weight.numel(), 8 * layer.weight.element_size()
            for bits in BITS:
                stored = stored_bits(size, full, distinct=2**bits)
                if stored < full and size > 2**bits:
                    yield Choice(
                        technique=self.name,
                        site=name,
                        setting={"index_bits": bits, "stored_bits": round(stored, 3)},
                        label=f"{2**bits} values",
                        modules=(name,),
                    )

    def apply(self, model: nn.Module, choices: Sequence[Choice], context: TechniqueContext) -> None:
        """Put the weights on their palettes, in place; zeros stay zeros."""
        del context
        for choice in choices:
            for layer in layers_at(model, choice.site).values():
                values = cluster_weights(layer.weight, choice.setting["index_bits"])
                write_weight(model, layer.weight, values)

    def algorithms(self, choices: Sequence[Choice]) -> Sequence[Algorithm]:
        """What keeps equal weights equal in training."""
        bits = {choice.site: choice.setting["index_bits"] for choice in choices}
        if not bits:
            return ()
        return [WeightClustering(bits.get(ROOT, bits))]
