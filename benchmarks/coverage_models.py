"""The models of `benchmarks.coverage`: how each is made with random weights, and what it takes.

torchvision's classifiers, detectors and segmenters, all of them; one small variant of each family
of timm; tiny configurations of the encoders and decoders of Hugging Face. Nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from compressor.interfaces.inputs import ModelInputs

Kind = Literal["classifier", "detector", "segmenter", "timm", "transformers"]
BATCH = 2
VOCABULARY = 99
TOKENS = 12


@dataclass(frozen=True)
class Case:
    """A model of the list.

    Attributes:
        name: "torchvision/resnet18".
        build: a new instance in eval mode, with what one call of it takes.
        note: how it differs from what the library offers, so that it fits the machine.
    """

    name: str
    kind: Kind
    build: Callable[[], tuple[nn.Module, ModelInputs]]
    note: str = ""


def list_cases() -> list[Case]:
    """All models, the libraries in turn."""
    return [*torchvision_cases(), *timm_cases(), *transformers_cases()]


# ------------------------------------------------------------------------------------ torchvision

# pixels; the other classifiers take 64
PIXELS = {"inception_v3": 96, "maxvit_t": 224, "vit_h_14": 56}
# vit_h_14 and regnet_y_128gf have 0.6 billion parameters, and the checks hold several copies
SHORTENED = {"vit_l_16": 4, "vit_l_32": 4, "vit_h_14": 2}
REGNET_BLOCKS = 2  # of each stage of regnet_y_128gf
DETECTOR_OPTIONS = {
    "ssd": {"score_thresh": 0.0, "detections_per_img": 20, "topk_candidates": 20},
    "rcnn": {
        "box_score_thresh": 0.0,
        "box_detections_per_img": 10,
        "rpn_pre_nms_top_n_test": 20,
        "rpn_post_nms_top_n_test": 20,
        "min_size": 96,
        "max_size": 128,
    },
    "dense": {
        "score_thresh": 0.0,
        "detections_per_img": 20,
        "topk_candidates": 20,
        "min_size": 96,
        "max_size": 128,
    },
}


def torchvision_cases() -> list[Case]:
    """Every classification, detection and segmentation model that the library lists."""
    from torchvision import models
    from torchvision.models import detection, list_models, segmentation

    classifiers = [
        Case(f"torchvision/{name}", "classifier", partial(make_classifier, name), note_of(name))
        for name in list_models(module=models)
    ]
    detectors = [
        Case(f"torchvision/{name}", "detector", partial(make_detector, name))
        for name in list_models(module=detection)
    ]
    segmenters = [
        Case(f"torchvision/{name}", "segmenter", partial(make_segmenter, name))
        for name in list_models(module=segmentation)
    ]
    return classifiers + detectors + segmenters


def note_of(name: str) -> str:
    if name in SHORTENED:
        return f"{SHORTENED[name]} of its layers"
    return f"{REGNET_BLOCKS} blocks a stage" if name == "regnet_y_128gf" else ""


def make_classifier(name: str) -> tuple[nn.Module, ModelInputs]:
    from torchvision.models import get_model

    size = PIXELS.get(name, 64)
    options: dict[str, Any] = {"image_size": size} if name.startswith("vit_") else {}
    if name in ("googlenet", "inception_v3"):
        options["init_weights"] = False  # minutes, on one thread
    model = get_model(name, weights=None, **options)
    if name in SHORTENED:
        model.encoder.layers = model.encoder.layers[: SHORTENED[name]]
    if name == "regnet_y_128gf":
        stages = model.trunk_output
        for key, stage in stages.named_children():
            setattr(stages, key, nn.Sequential(*list(stage)[:REGNET_BLOCKS]))
    return model.eval(), images(size)


class FirstImage(nn.Module):
    """A detector as a function of a batch of images, of which it takes the first.

    torchvision's detectors take a list of images; a list has no batch to resize.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Tensor) -> dict[str, Tensor]:
        """Boxes, scores and whatever else is found in `batch[0]`."""
        found: dict[str, Tensor] = self.model([batch[0]])[0]
        return found


def make_detector(name: str) -> tuple[nn.Module, ModelInputs]:
    from torchvision.models import get_model

    kind = "ssd" if "ssd" in name else "rcnn" if "rcnn" in name else "dense"
    model = get_model(
        name,
        weights=None,
        weights_backbone=None,
        num_classes=2 if "keypoint" in name else 5,
        **DETECTOR_OPTIONS[kind],
    )
    return FirstImage(model).eval(), ModelInputs((torch.rand(BATCH, 3, 96, 96),))


def make_segmenter(name: str) -> tuple[nn.Module, ModelInputs]:
    from torchvision.models import get_model

    return get_model(name, weights=None, weights_backbone=None).eval(), images(64)


# ------------------------------------------------------------------------------------------- timm

# architecture -> pixels, and what is passed to `create_model`
TIMM: dict[str, tuple[int, dict[str, int]]] = {
    "beit_base_patch16_224": (64, {"depth": 3, "img_size": 64}),
    "eca_botnext26ts_256": (64, {"img_size": 64}),
    "lambda_resnet26t": (64, {"img_size": 64}),
    "halonet26t": (256, {"img_size": 256}),
    "mobileone_s0": (64, {"img_size": 64}),
    "repvgg_a0": (64, {"img_size": 64}),
    "gernet_s": (64, {"img_size": 64}),
    "cait_xxs24_224": (64, {"depth": 4, "img_size": 64}),
    "coat_tiny": (64, {"img_size": 64}),
    "coat_lite_tiny": (64, {"img_size": 64}),
    "convit_tiny": (64, {"depth": 11, "img_size": 64}),
    "convmixer_1024_20_ks9_p14": (64, {}),
    "convnext_atto": (64, {}),
    "convnextv2_atto": (64, {}),
    "cpubone_nano": (64, {}),
    "crossvit_tiny_240": (64, {}),
    "csatv2": (64, {}),
    "cs3darknet_s": (64, {}),
    "cspresnet50": (64, {}),
    "darknet17": (64, {}),
    "cspnext_tiny": (64, {}),
    "davit_tiny": (64, {}),
    "deit_tiny_distilled_patch16_224": (64, {"depth": 3, "img_size": 64}),
    "deit3_small_patch16_224": (64, {"depth": 3, "img_size": 64}),
    "densenetblur121d": (64, {}),
    "dla34": (64, {}),
    "dla46x_c": (64, {}),
    "dpn48b": (64, {}),
    "edgenext_xx_small": (64, {}),
    "efficientformer_l1": (224, {"img_size": 224}),
    "efficientformerv2_s0": (64, {"img_size": 64}),
    "efficientnet_lite0": (64, {}),
    "efficientnet_b0_gn": (64, {}),
    "mixnet_s": (64, {}),
    "mnasnet_small": (64, {}),
    "efficientnet_cc_b0_4e": (64, {}),
    "efficientvim_m1": (64, {}),
    "efficientvit_b0": (64, {}),
    "efficientvit_m0": (64, {"img_size": 64}),
    "eva02_tiny_patch14_224": (64, {"depth": 3, "img_size": 64}),
    "vit_small_patch16_dinov3": (64, {"depth": 3, "img_size": 64}),
    "fasternet_t0": (64, {}),
    "fastvit_t8": (64, {}),
    "focalnet_tiny_srf": (64, {}),
    "gcvit_xxtiny": (64, {"img_size": 64}),
    "gemma4_vit_167m": (64, {"depth": 2, "img_size": 64}),
    "ghostnet_050": (64, {}),
    "ghostnetv2_100": (64, {}),
    "ghostnetv3_050": (64, {}),
    "hardcorenas_a": (64, {}),
    "hgnetv2_b0": (64, {}),
    "hiera_tiny_224": (64, {"img_size": 64}),
    "sam2_hiera_tiny": (64, {}),
    "hrnet_w18_small": (64, {}),
    "iformer_t": (64, {}),
    "inception_next_atto": (64, {}),
    "inception_resnet_v2": (96, {}),
    "inception_v3": (96, {}),
    "inception_v4": (96, {}),
    "lcnetv2_small": (64, {}),
    "lcnet_050": (64, {}),
    "levit_128s": (64, {"img_size": 64}),
    "levit_conv_128s": (64, {"img_size": 64}),
    "lowformer_b0": (64, {}),
    "mambaout_femto": (64, {}),
    "maxvit_pico_rw_256": (64, {"img_size": 64}),
    "coatnet_pico_rw_224": (64, {"img_size": 64}),
    "poolformer_s12": (64, {}),
    "caformer_s18": (64, {}),
    "mixer_s32_224": (64, {"img_size": 64}),
    "gmlp_ti16_224": (64, {"img_size": 64}),
    "resmlp_12_224": (64, {"img_size": 64}),
    "mobilenetv3_small_050": (64, {}),
    "mobilenetv4_conv_small_035": (64, {}),
    "mobilenetv4_hybrid_medium_075": (64, {}),
    "mobilenetv5_base": (64, {}),
    "mobilevit_xxs": (64, {"img_size": 64}),
    "mobilevitv2_050": (64, {"img_size": 64}),
    "mvitv2_tiny": (64, {"img_size": 64}),
    "naflexvit_base_patch16_gap": (64, {"depth": 3, "img_size": 64}),
    "nasnetalarge": (64, {}),
    "nest_tiny": (64, {"img_size": 64}),
    "nextvit_small": (64, {}),
    "nf_resnet26": (64, {}),
    "nfnet_l0": (64, {}),
    "pit_xs_224": (64, {"img_size": 64}),
    "pnasnet5large": (64, {}),
    "pvt_v2_b0": (64, {}),
    "qwen3_vit_88m": (64, {"depth": 3, "img_size": 64}),
    "rdnet_tiny": (64, {}),
    "regnetx_002": (64, {}),
    "regnety_002": (64, {}),
    "repghostnet_050": (64, {}),
    "repvit_m0_9": (64, {"img_size": 64}),
    "res2net50_14w_8s": (64, {}),
    "resnest14d": (64, {}),
    "resnet10t": (64, {}),
    "ecaresnet26t": (64, {}),
    "resnetaa50": (64, {}),
    "resnetv2_18": (64, {}),
    "rexnet_100": (64, {}),
    "selecsls42": (64, {}),
    "legacy_seresnet18": (64, {}),
    "sequencer2d_s": (64, {"img_size": 64}),
    "shvit_s1": (64, {}),
    "skresnet18": (64, {}),
    "starnet_s050": (64, {}),
    "swiftformer_xs": (64, {"img_size": 64}),
    "swin_tiny_patch4_window7_224": (64, {"img_size": 64}),
    "swinv2_tiny_window8_256": (64, {"img_size": 64}),
    "swinv2_cr_tiny_224": (64, {"img_size": 64}),
    "tiny_vit_5m_224": (64, {}),
    "tnt_s_legacy_patch16_224": (64, {"depth": 3, "img_size": 64}),
    "tresnet_m": (64, {}),
    "twins_svt_small": (64, {"img_size": 64}),
    "twins_pcpvt_small": (64, {"img_size": 64}),
    "visformer_tiny": (64, {"img_size": 64}),
    "vit_tiny_patch16_224": (64, {"depth": 3, "img_size": 64}),
    "vit_tiny_r_s16_p8_224": (64, {"depth": 3, "img_size": 64}),
    "vit_relpos_small_patch16_224": (64, {"depth": 3, "img_size": 64}),
    "samvit_base_patch16_224": (64, {"depth": 3, "img_size": 64}),
    "vitamin_small_224": (64, {"img_size": 64}),
    "volo_d1_224": (64, {"img_size": 64}),
    "ese_vovnet19b_slim": (64, {}),
    "legacy_xception": (64, {}),
    "xception41": (64, {}),
    "xcit_nano_12_p16_224": (64, {"depth": 3, "img_size": 64}),
}


def timm_cases() -> list[Case]:
    return [
        Case(
            f"timm/{name}",
            "timm",
            partial(make_timm, name, size, options),
            ", ".join(f"{key}={value}" for key, value in options.items() if key != "img_size"),
        )
        for name, (size, options) in TIMM.items()
    ]


def make_timm(name: str, size: int, options: dict[str, int]) -> tuple[nn.Module, ModelInputs]:
    import timm

    return timm.create_model(name, pretrained=False, **options).eval(), images(size)


# ----------------------------------------------------------------------------------- transformers

WIDTHS = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "max_position_embeddings": 64,
}
DECODER = {**WIDTHS, "num_key_value_heads": 2, "use_cache": False}
VISION = {
    "image_size": 32,
    "patch_size": 8,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
Takes = Literal["tokens", "image", "sequences", "audio", "sound", "image and tokens"]

# class of the model -> class of its configuration, the configuration, what it takes
TRANSFORMERS: dict[str, tuple[str, dict[str, Any], Takes]] = {
    "BertForSequenceClassification": ("BertConfig", WIDTHS, "tokens"),
    "BertForMaskedLM": ("BertConfig", WIDTHS, "tokens"),
    "RobertaForSequenceClassification": ("RobertaConfig", WIDTHS, "tokens"),
    "DistilBertForSequenceClassification": (
        "DistilBertConfig",
        {"vocab_size": VOCABULARY, "dim": 64, "hidden_dim": 128, "n_layers": 2, "n_heads": 4},
        "tokens",
    ),
    "ElectraForSequenceClassification": (
        "ElectraConfig",
        {**WIDTHS, "embedding_size": 32},
        "tokens",
    ),
    "AlbertForSequenceClassification": ("AlbertConfig", {**WIDTHS, "embedding_size": 32}, "tokens"),
    "DebertaV2ForSequenceClassification": (
        "DebertaV2Config",
        {
            **WIDTHS,
            "relative_attention": True,
            "position_buckets": 8,
            "norm_rel_ebd": "layer_norm",
            "share_att_key": True,
            "pos_att_type": ["p2c", "c2p"],
        },
        "tokens",
    ),
    "MPNetForSequenceClassification": ("MPNetConfig", WIDTHS, "tokens"),
    "MobileBertForSequenceClassification": (
        "MobileBertConfig",
        {**WIDTHS, "embedding_size": 32, "intra_bottleneck_size": 32},
        "tokens",
    ),
    "SqueezeBertForSequenceClassification": (
        "SqueezeBertConfig",
        {**WIDTHS, "embedding_size": 64},
        "tokens",
    ),
    "ModernBertForSequenceClassification": (
        "ModernBertConfig",
        {**WIDTHS, **SPECIAL, "cls_token_id": 1, "sep_token_id": 2},
        "tokens",
    ),
    "XLNetForSequenceClassification": (
        "XLNetConfig",
        {"vocab_size": VOCABULARY, "d_model": 64, "n_layer": 2, "n_head": 4, "d_inner": 128},
        "tokens",
    ),
    "GPT2LMHeadModel": (
        "GPT2Config",
        {
            "vocab_size": VOCABULARY,
            "n_embd": 64,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 64,
            "use_cache": False,
        },
        "tokens",
    ),
    "GPTNeoXForCausalLM": ("GPTNeoXConfig", {**WIDTHS, "use_cache": False}, "tokens"),
    "OPTForCausalLM": (
        "OPTConfig",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 64,
            "word_embed_proj_dim": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "ffn_dim": 128,
            "max_position_embeddings": 64,
            "use_cache": False,
        },
        "tokens",
    ),
    "BloomForCausalLM": (
        "BloomConfig",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 64,
            "n_layer": 2,
            "n_head": 4,
            "use_cache": False,
        },
        "tokens",
    ),
    "LlamaForCausalLM": ("LlamaConfig", DECODER, "tokens"),
    "MistralForCausalLM": ("MistralConfig", DECODER, "tokens"),
    "Qwen2ForCausalLM": ("Qwen2Config", DECODER, "tokens"),
    "Qwen3ForCausalLM": ("Qwen3Config", {**DECODER, "head_dim": 16}, "tokens"),
    "GemmaForCausalLM": ("GemmaConfig", {**DECODER, "head_dim": 16}, "tokens"),
    "PhiForCausalLM": ("PhiConfig", {**WIDTHS, "use_cache": False}, "tokens"),
    "Phi3ForCausalLM": ("Phi3Config", {**DECODER, **SPECIAL}, "tokens"),
    "T5EncoderModel": (
        "T5Config",
        {"vocab_size": VOCABULARY, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2}
        | {"num_heads": 4, "use_cache": False},
        "tokens",
    ),
    "T5ForConditionalGeneration": (
        "T5Config",
        {"vocab_size": VOCABULARY, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2}
        | {"num_heads": 4, "use_cache": False},
        "sequences",
    ),
    "BartForConditionalGeneration": (
        "BartConfig",
        {
            "vocab_size": VOCABULARY,
            "d_model": 64,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 128,
            "decoder_ffn_dim": 128,
            "max_position_embeddings": 64,
            "use_cache": False,
        },
        "sequences",
    ),
    "WhisperForAudioClassification": (
        "WhisperConfig",
        {
            "vocab_size": VOCABULARY,
            "num_mel_bins": 16,
            "d_model": 64,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 128,
            "decoder_ffn_dim": 128,
            "max_source_positions": 20,
            "max_target_positions": 20,
            "pad_token_id": 0,
            "use_cache": False,
        },
        "audio",
    ),
    "Wav2Vec2ForSequenceClassification": (
        "Wav2Vec2Config",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 128,
            "conv_dim": (32, 32, 32),
            "conv_kernel": (10, 3, 3),
            "conv_stride": (5, 2, 2),
            "num_conv_pos_embeddings": 16,
            "num_conv_pos_embedding_groups": 4,
        },
        "sound",
    ),
    "CLIPModel": (
        "CLIPConfig",
        {"text_config": {**WIDTHS, **SPECIAL}, "vision_config": VISION, "projection_dim": 32},
        "image and tokens",
    ),
    "ViTForImageClassification": ("ViTConfig", VISION, "image"),
    "DeiTForImageClassification": ("DeiTConfig", VISION, "image"),
    "BeitForImageClassification": (
        "BeitConfig",
        {**VISION, "use_relative_position_bias": True},
        "image",
    ),
    "Dinov2ForImageClassification": ("Dinov2Config", VISION, "image"),
    "SwinForImageClassification": (
        "SwinConfig",
        {"image_size": 32, "patch_size": 4, "embed_dim": 32, "depths": [2, 2], "num_heads": [2, 4]}
        | {"window_size": 4},
        "image",
    ),
    "ConvNextForImageClassification": (
        "ConvNextConfig",
        {"image_size": 32, "hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 2, 1]},
        "image",
    ),
    "SegformerForSemanticSegmentation": (
        "SegformerConfig",
        {"hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 1, 1], "decoder_hidden_size": 64}
        | {"num_attention_heads": [1, 2, 3, 4]},
        "image",
    ),
    "ResNetForImageClassification": (
        "ResNetConfig",
        {"embedding_size": 16, "hidden_sizes": [32, 48], "depths": [2, 2]},
        "image",
    ),
    "MobileViTForImageClassification": (
        "MobileViTConfig",
        {"image_size": 64, "hidden_sizes": [32, 48, 64], "neck_hidden_sizes": [8] * 5 + [48] * 2},
        "image",
    ),
}


def transformers_cases() -> list[Case]:
    return [
        Case(f"transformers/{name}", "transformers", partial(make_transformer, name))
        for name in TRANSFORMERS
    ]


def make_transformer(name: str) -> tuple[nn.Module, ModelInputs]:
    import transformers

    config_class, options, takes = TRANSFORMERS[name]
    config = getattr(transformers, config_class)(**options)
    return getattr(transformers, name)(config).eval(), ModelInputs(kwargs=arguments(takes, config))


def arguments(takes: Takes, config: Any) -> dict[str, Any]:
    tokens = torch.randint(3, VOCABULARY, (BATCH, TOKENS))
    tokens[:, -1] = 2  # the end, which some models look for
    size = getattr(config, "image_size", 32)
    pixels = torch.randn(BATCH, 3, size, size)
    match takes:
        case "tokens":
            return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
        case "sequences":
            return {"input_ids": tokens, "decoder_input_ids": tokens.flip(1)}
        case "audio":
            return {"input_features": torch.randn(BATCH, config.num_mel_bins, 40)}
        case "sound":
            return {"input_values": torch.randn(BATCH, 2000)}
        case "image":
            return {"pixel_values": pixels}
        case _:
            return {
                "input_ids": tokens,
                "pixel_values": pixels,
                "attention_mask": torch.ones_like(tokens),
            }


def images(size: int) -> ModelInputs:
    return ModelInputs((torch.randn(BATCH, 3, size, size),))
