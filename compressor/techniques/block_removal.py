"""Block removal: leave out a residual block or branch; its input goes straight to what follows.

The one technique whose saving always shows in the clock: a layer that is gone takes no time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from compressor.result import Choice
from compressor.structure.blocks import ResidualBlock, StandIn, residual_blocks
from compressor.structure.surgery import replace
from compressor.techniques.base import TECHNIQUES, Stage, Technique, TechniqueContext
from compressor.training.card import Card


@TECHNIQUES.register
class BlockRemoval(Technique):
    """Fewer layers, where a block's output has the shape of its input."""

    name = "block_removal"
    stage = Stage.DEPTH
    card = Card(
        summary="Leaves out residual blocks, and attention or MLP of transformer layers.",
        source="Veit et al. (2016), Residual networks behave like ensembles of relatively shallow "
        "networks; ranked as by Men et al. (2024), ShortGPT",
        functional=None,
        use_when="The network is deep, latency counts, and kernels gain little from thin layers.",
        avoid_when="Each stage has one or two blocks, or there is no data to fine-tune on.",
        cost="A trace, and one call of the model for each block.",
    )

    def choices(self, model: nn.Module, context: TechniqueContext) -> Iterator[Choice]:
        """For every block whose removal is shape-safe: remove it; first those that do least."""
        blocks = residual_blocks(model, context.inputs)
        for block in sorted(blocks, key=lambda block: block.influence):
            yield Choice(
                technique=self.name,
                site=block.name,
                setting=_setting(block),
                label=f"removed; its influence is {block.influence:.3f}",
                modules=tuple(block.modules),
            )

    def apply(self, model: nn.Module, choices: Sequence[Choice], context: TechniqueContext) -> None:
        """Replace each chosen block by one that returns its input, or nothing to add, in place."""
        del context
        sites = [choice.site for choice in choices]
        for choice in choices:
            if not any(choice.site.startswith(f"{site}.") for site in sites):  # gone with it
                replace(model, choice.site, _stand_in(choice.setting))


def _setting(block: ResidualBlock) -> dict[str, Any]:
    """What a `StandIn` needs; nothing of it for a plain block."""
    setting: dict[str, Any] = {"removed": True}
    if block.is_zero:
        setting["is_zero"] = True
    if block.argument:
        setting["argument"] = block.argument
    if block.outputs:
        setting["outputs"] = block.outputs
    return setting


def _stand_in(setting: Any) -> StandIn:
    return StandIn(**{key: value for key, value in setting.items() if key != "removed"})
