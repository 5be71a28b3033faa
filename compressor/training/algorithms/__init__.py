"""Training methods, one file each: a pure function and a thin `Algorithm`."""

from compressor.training.algorithms.alibi import ALiBi
from compressor.training.algorithms.augmix import AugMix
from compressor.training.algorithms.batchnorm import BatchNormReestimation, reestimate_batchnorm
from compressor.training.algorithms.blurpool import BlurPool
from compressor.training.algorithms.channels_last import ChannelsLast
from compressor.training.algorithms.colout import ColOut
from compressor.training.algorithms.cutmix import CutMix
from compressor.training.algorithms.cutout import CutOut
from compressor.training.algorithms.distillation import (
    Distillation,
    attention_map,
    distillation_loss,
    feature_distance,
)
from compressor.training.algorithms.factorize import Factorize
from compressor.training.algorithms.gated_linear_units import GatedLinearUnits
from compressor.training.algorithms.ghost_batchnorm import GhostBatchNorm
from compressor.training.algorithms.gradient_clipping import GradientClipping, clip_gradients
from compressor.training.algorithms.gradual_pruning import GradualPruning
from compressor.training.algorithms.gradual_sparsity import (
    GradualSparsity,
    cubic_sparsity,
    magnitude_mask,
    nm_mask,
)
from compressor.training.algorithms.group_regularization import (
    GroupRegularization,
    channel_shrinkage,
)
from compressor.training.algorithms.gyro_dropout import GyroDropout
from compressor.training.algorithms.hold_masks import HoldMasks
from compressor.training.algorithms.label_smoothing import LabelSmoothing
from compressor.training.algorithms.layer_freezing import LayerFreezing, freeze_layers
from compressor.training.algorithms.low_precision_norms import (
    LowPrecisionGroupNorm,
    LowPrecisionLayerNorm,
)
from compressor.training.algorithms.mixup import MixUp
from compressor.training.algorithms.no_op_model import NoOpModel
from compressor.training.algorithms.progressive_resizing import ProgressiveResizing
from compressor.training.algorithms.randaugment import RandAugment
from compressor.training.algorithms.sam import SAM, sam_perturbation
from compressor.training.algorithms.selective_backprop import SelectiveBackprop
from compressor.training.algorithms.seq_length_warmup import SeqLengthWarmup
from compressor.training.algorithms.squeeze_excite import SqueezeExcite
from compressor.training.algorithms.stochastic_depth import StochasticDepth
from compressor.training.algorithms.weight_average import EMA, SWA, update_average
from compressor.training.algorithms.weight_clustering import WeightClustering, cluster_weights
from compressor.training.algorithms.weight_standardization import WeightStandardization

__all__ = [
    "EMA",
    "SAM",
    "SWA",
    "ALiBi",
    "AugMix",
    "BatchNormReestimation",
    "BlurPool",
    "ChannelsLast",
    "ColOut",
    "CutMix",
    "CutOut",
    "Distillation",
    "Factorize",
    "GatedLinearUnits",
    "GhostBatchNorm",
    "GradientClipping",
    "GradualPruning",
    "GradualSparsity",
    "GroupRegularization",
    "GyroDropout",
    "HoldMasks",
    "LabelSmoothing",
    "LayerFreezing",
    "LowPrecisionGroupNorm",
    "LowPrecisionLayerNorm",
    "MixUp",
    "NoOpModel",
    "ProgressiveResizing",
    "RandAugment",
    "SelectiveBackprop",
    "SeqLengthWarmup",
    "SqueezeExcite",
    "StochasticDepth",
    "WeightClustering",
    "WeightStandardization",
    "attention_map",
    "channel_shrinkage",
    "clip_gradients",
    "cluster_weights",
    "cubic_sparsity",
    "distillation_loss",
    "feature_distance",
    "freeze_layers",
    "magnitude_mask",
    "nm_mask",
    "reestimate_batchnorm",
    "sam_perturbation",
    "update_average",
]
