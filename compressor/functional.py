"""Training methods as functions, for a loop of your own: `from compressor import functional as cf`.

In a `Trainer`, the classes of `compressor.training.algorithms` call them at the right moments.
"""

from __future__ import annotations

from compressor.training.algorithms.alibi import alibi_slopes, apply_alibi
from compressor.training.algorithms.augmix import augmix, augmix_image
from compressor.training.algorithms.batchnorm import reestimate_batchnorm
from compressor.training.algorithms.blurpool import apply_blurpool
from compressor.training.algorithms.channels_last import apply_channels_last
from compressor.training.algorithms.colout import colout_batch, colout_image
from compressor.training.algorithms.cutmix import cutmix, cutmix_batch
from compressor.training.algorithms.cutout import cutout_batch
from compressor.training.algorithms.distillation import distillation_loss
from compressor.training.algorithms.factorize import apply_factorization
from compressor.training.algorithms.gated_linear_units import apply_gated_linear_units
from compressor.training.algorithms.ghost_batchnorm import apply_ghost_batchnorm
from compressor.training.algorithms.gradient_clipping import clip_gradients
from compressor.training.algorithms.gradual_sparsity import (
    cubic_sparsity,
    magnitude_mask,
    nm_mask,
)
from compressor.training.algorithms.group_regularization import channel_shrinkage
from compressor.training.algorithms.gyro_dropout import advance_gyro_dropout, apply_gyro_dropout
from compressor.training.algorithms.label_smoothing import smooth_labels
from compressor.training.algorithms.layer_freezing import freeze_layers
from compressor.training.algorithms.low_precision_norms import (
    apply_low_precision_groupnorm,
    apply_low_precision_layernorm,
)
from compressor.training.algorithms.mixup import mixup_batch
from compressor.training.algorithms.progressive_resizing import resize_batch
from compressor.training.algorithms.randaugment import randaugment, randaugment_image
from compressor.training.algorithms.residual_branches import residual_branches
from compressor.training.algorithms.sam import sam_perturbation
from compressor.training.algorithms.selective_backprop import (
    select_using_loss,
    should_selective_backprop,
)
from compressor.training.algorithms.seq_length_warmup import set_batch_sequence_length
from compressor.training.algorithms.soft_targets import mix_targets, soft_targets
from compressor.training.algorithms.squeeze_excite import apply_squeeze_excite
from compressor.training.algorithms.stochastic_depth import apply_stochastic_depth
from compressor.training.algorithms.weight_average import update_average
from compressor.training.algorithms.weight_standardization import apply_weight_standardization

__all__ = [
    "advance_gyro_dropout",
    "alibi_slopes",
    "apply_alibi",
    "apply_blurpool",
    "apply_channels_last",
    "apply_factorization",
    "apply_gated_linear_units",
    "apply_ghost_batchnorm",
    "apply_gyro_dropout",
    "apply_low_precision_groupnorm",
    "apply_low_precision_layernorm",
    "apply_squeeze_excite",
    "apply_stochastic_depth",
    "apply_weight_standardization",
    "augmix",
    "augmix_image",
    "channel_shrinkage",
    "clip_gradients",
    "colout_batch",
    "colout_image",
    "cubic_sparsity",
    "cutmix",
    "cutmix_batch",
    "cutout_batch",
    "distillation_loss",
    "freeze_layers",
    "magnitude_mask",
    "mix_targets",
    "mixup_batch",
    "nm_mask",
    "randaugment",
    "randaugment_image",
    "reestimate_batchnorm",
    "residual_branches",
    "resize_batch",
    "sam_perturbation",
    "select_using_loss",
    "set_batch_sequence_length",
    "should_selective_backprop",
    "smooth_labels",
    "soft_targets",
    "update_average",
]
