"""Training methods, one file each: a pure function and a thin `Algorithm`."""

from compressor.training.algorithms.batchnorm import BatchNormReestimation, reestimate_batchnorm
from compressor.training.algorithms.distillation import Distillation, distillation_loss
from compressor.training.algorithms.gradient_clipping import GradientClipping, clip_gradients
from compressor.training.algorithms.weight_average import WeightAverage, update_average

__all__ = [
    "BatchNormReestimation",
    "Distillation",
    "GradientClipping",
    "WeightAverage",
    "clip_gradients",
    "distillation_loss",
    "reestimate_batchnorm",
    "update_average",
]
