"""Attention that can lose heads, in place of the modules whose widths are hard-wired."""

from compressor.structure.attention.replace import (
    is_replaceable,
    make_prunable,
    replace_attention,
)

__all__ = ["is_replaceable", "make_prunable", "replace_attention"]
