"""Training methods as functions, for a loop of your own: `from compressor import functional as cf`.

In a `Trainer`, the classes of `compressor.training.algorithms` call them at the right moments.
"""

from __future__ import annotations

from compressor.training.algorithms.alibi import alibi_slopes, apply_alibi
from compressor.training.algorithms.batchnorm import reestimate_batchnorm
from compressor.training.algorithms.blurpool import apply_blurpool
from compressor.training.algorithms.channels_last import apply_channels_last
from compressor.training.algorithms.cutmix import cutmix, cutmix_batch
from compressor.training.algorithms.distillation import distillation_loss
from compressor.training.algorithms.gradient_clipping import clip_gradients
from compressor.training.algorithms.gradual_sparsity import (
    cubic_sparsity,
    magnitude_mask,
    nm_mask,
)
from compressor.training.algorithms.group_regularization import channel_shrinkage
from compressor.training.algorithms.label_smoothing import smooth_labels
from compressor.training.algorithms.layer_freezing import freeze_layers
from compressor.training.algorithms.mixup import mixup_batch
from compressor.training.algorithms.progressive_resizing import resize_batch
from compressor.training.algorithms.randaugment import randaugment, randaugment_image
from compressor.training.algorithms.sam import sam_perturbation
from compressor.training.algorithms.soft_targets import mix_targets, soft_targets
from compressor.training.algorithms.weight_average import update_average

__all__ = [
    "alibi_slopes",
    "apply_alibi",
    "apply_blurpool",
    "apply_channels_last",
    "channel_shrinkage",
    "clip_gradients",
    "cubic_sparsity",
    "cutmix",
    "cutmix_batch",
    "distillation_loss",
    "freeze_layers",
    "magnitude_mask",
    "mix_targets",
    "mixup_batch",
    "nm_mask",
    "randaugment",
    "randaugment_image",
    "reestimate_batchnorm",
    "resize_batch",
    "sam_perturbation",
    "smooth_labels",
    "soft_targets",
    "update_average",
]
