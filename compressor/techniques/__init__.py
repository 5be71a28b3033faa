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
from compressor.techniques.quantization import Quantization
from compressor.techniques.sparsity import Sparsity

__all__ = [
    "TECHNIQUES",
    "BlockRemoval",
    "ChannelPruning",
    "Clustering",
    "Lost",
    "LowRank",
    "Quantization",
    "Sparsity",
    "Stage",
    "Technique",
    "TechniqueContext",
    "apply_plan",
]
