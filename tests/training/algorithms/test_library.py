"""The methods that the library promises: each has a file, a class, a function and a card."""

from __future__ import annotations

import importlib

import pytest

from compressor import functional as cf
from compressor.training import algorithms
from compressor.training.card import Card

PROMISED = {
    "ALiBi": ("alibi", "apply_alibi"),
    "AugMix": ("augmix", "augmix_image"),
    "BlurPool": ("blurpool", "apply_blurpool"),
    "ChannelsLast": ("channels_last", "apply_channels_last"),
    "ColOut": ("colout", "colout_batch"),
    "CutMix": ("cutmix", "cutmix_batch"),
    "CutOut": ("cutout", "cutout_batch"),
    "Distillation": ("distillation", "distillation_loss"),
    "EMA": ("weight_average", "update_average"),
    "Factorize": ("factorize", "apply_factorization"),
    "GatedLinearUnits": ("gated_linear_units", "apply_gated_linear_units"),
    "GhostBatchNorm": ("ghost_batchnorm", "apply_ghost_batchnorm"),
    "GradientClipping": ("gradient_clipping", "clip_gradients"),
    "GyroDropout": ("gyro_dropout", "apply_gyro_dropout"),
    "LabelSmoothing": ("label_smoothing", "smooth_labels"),
    "LayerFreezing": ("layer_freezing", "freeze_layers"),
    "LowPrecisionGroupNorm": ("low_precision_norms", "apply_low_precision_groupnorm"),
    "LowPrecisionLayerNorm": ("low_precision_norms", "apply_low_precision_layernorm"),
    "MixUp": ("mixup", "mixup_batch"),
    "NoOpModel": ("no_op_model", None),  # a model, which has no function
    "ProgressiveResizing": ("progressive_resizing", "resize_batch"),
    "RandAugment": ("randaugment", "randaugment_image"),
    "SAM": ("sam", "sam_perturbation"),
    "SWA": ("weight_average", "update_average"),
    "SelectiveBackprop": ("selective_backprop", "select_using_loss"),
    "SeqLengthWarmup": ("seq_length_warmup", "set_batch_sequence_length"),
    "SqueezeExcite": ("squeeze_excite", "apply_squeeze_excite"),
    "StochasticDepth": ("stochastic_depth", "apply_stochastic_depth"),
    "WeightStandardization": ("weight_standardization", "apply_weight_standardization"),
}


@pytest.mark.parametrize("name", PROMISED)
def test_a_promised_method_has_a_file_a_function_and_a_card(name: str) -> None:
    file, function = PROMISED[name]
    method = getattr(algorithms, name)
    module = importlib.import_module(f"{algorithms.__name__}.{file}")
    assert method.__module__ == module.__name__
    card = method.card
    assert isinstance(card, Card)
    assert card.functional == function
    assert function is None or callable(getattr(cf, function))


@pytest.mark.parametrize("name", [n for n in algorithms.__all__ if n[0].isupper()])
def test_every_card_tells_of_the_settings(name: str) -> None:
    card = getattr(algorithms, name).card
    assert card.settings.endswith(".")


@pytest.mark.parametrize("name", ["randaugment", "cutmix", "apply_blurpool", "apply_alibi"])
def test_the_names_of_the_samples_are_there(name: str) -> None:
    """How they are called in the samples: tests/seeds/test_3_algorithms.py."""
    assert name in cf.__all__
