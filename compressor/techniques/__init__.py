"""The ways to compress, one file each; importing this registers them."""

from compressor.techniques.base import (
    TECHNIQUES,
    Lost,
    Stage,
    Technique,
    TechniqueContext,
    apply_plan,
)
from compressor.techniques.block_removal import BlockRemoval
from compressor.techniques.channel_pruning import ChannelPruning
from compressor.techniques.clustering import Clustering
from compressor.techniques.low_rank import LowRank
from compressor.techniques.sparsity import Sparsity
from compressor.techniques.static_int8 import StaticInt8

__all__ = [
    "TECHNIQUES",
    "BlockRemoval",
    "ChannelPruning",
    "Clustering",
    "Lost",
    "LowRank",
    "Sparsity",
    "Stage",
    "StaticInt8",
    "Technique",
    "TechniqueContext",
    "apply_plan",
]
