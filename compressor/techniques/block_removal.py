"""Block removal: leave out a residual block; its input goes straight to what follows.

The one technique whose saving always shows in the clock: a layer that is gone takes no time.
Source: the residual stream's robustness to it, Veit et al. 2016 (1605.06431).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn

from compressor.result import Choice
from compressor.structure.blocks import residual_blocks
from compressor.structure.surgery import Skip, replace
from compressor.techniques.base import TECHNIQUES, Stage, Technique, TechniqueContext


@TECHNIQUES.register
class BlockRemoval(Technique):
    """Fewer layers, where the block's output has the shape of its input."""

    name = "block_removal"
    stage = Stage.DEPTH

    def choices(self, model: nn.Module, context: TechniqueContext) -> Iterator[Choice]:
        """For every residual block whose removal is shape-safe: remove it."""
        for block in residual_blocks(model, context.inputs):
            yield Choice(
                technique=self.name,
                site=block.name,
                setting={"removed": True},
                label="removed",
                modules=tuple(block.modules),
            )

    def apply(self, model: nn.Module, choices: Sequence[Choice], context: TechniqueContext) -> None:
        """Replace each chosen block by one that returns its input, in place."""
        del context
        for choice in choices:
            replace(model, choice.site, Skip())
