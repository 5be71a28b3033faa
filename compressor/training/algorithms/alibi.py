"""Attention that fades with distance, in place of positions (Press et al., 2022).

https://arxiv.org/abs/2108.12409. For models of transformers whose attention can be exchanged.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compressor.errors import ConfigError, ModelError
from compressor.optional import require
from compressor.structure import surgery
from compressor.structure.surgery import Edit
from compressor.training.algorithm import Algorithm
from compressor.training.card import Card
from compressor.training.events import Event
from compressor.training.state import State

POSITION_EMBEDDINGS = {"GPT2Model": "wpe", "BertEmbeddings": "position_embeddings"}
"""By the class that holds it, the attribute."""
ATTENTION, EAGER_ATTENTION = "alibi", "alibi_eager"  # as `model.set_attn_implementation` takes them


def alibi_slopes(heads: int, device: torch.device | str | None = None) -> Tensor:
    """How steeply the attention of each head fades: 2^(-8/n), 2^(-16/n), … for n = `heads`.

    If that is no power of two, n is the next lower one, and the other heads take every second
    slope of 2n, as in the paper's code.

    Returns:
        (heads,), float32.

    >>> alibi_slopes(4)
    tensor([0.2500, 0.0625, 0.0156, 0.0039])
    """
    whole = 2 ** int(math.log2(heads))
    exponents = torch.arange(1, whole + 1, device=device) * (8 / whole)
    between = (torch.arange(heads - whole, device=device) + 0.5) * (8 / whole)
    return torch.exp2(-torch.cat([exponents, between]))


def alibi_bias(query_positions: Tensor, key_length: int, heads: int) -> Tensor:
    """What is added to the scores: -slope * distance from query to key, on either side.

    Args:
        query_positions: (..., Q), places of the queries among the keys, 0 to `key_length` - 1.
        key_length: K.
        heads: H.

    Returns:
        (..., H, Q, K), float32.

    >>> alibi_bias(torch.tensor([2]), key_length=3, heads=1)
    tensor([[[-0.0078, -0.0039, -0.0000]]])
    """
    keys = torch.arange(key_length, device=query_positions.device)
    distance = (query_positions.unsqueeze(-1) - keys).abs()
    slopes = alibi_slopes(heads, query_positions.device)
    return -slopes.view(-1, 1, 1) * distance.unsqueeze(-3)


class NoPositions(nn.Module):
    """Stands for an embedding of positions, of which there may be any number: adds 0."""

    def forward(self, position_ids: Tensor) -> Tensor:
        """0, of shape (), which takes on the precision of what it is added to."""
        return torch.zeros((), device=position_ids.device)


def apply_alibi(
    model: nn.Module,
    max_sequence_length: int | None = None,
    position_embedding_attribute: str | None = None,
) -> Edit:
    """Take the position embeddings out of `model` and fade its attention with distance, in place.

    For GPT-2 and BERT, with any head, wherever they are inside `model`; for others, if you name the
    embedding. What the model computes changes at once: train it on, or from scratch. Encoders look
    at both sides, where attention fades alike. Done again, it changes nothing.

    `model` gets its own copy of the configuration, in which the attention is called "alibi"
    ("alibi_eager" if it was "eager", which can return its weights). `from_pretrained` knows nothing
    of it: apply it to a new model, and load the weights into that.

    Args:
        model: of transformers, or around one of its models.
        max_sequence_length: that the model then takes. None leaves it: GPT-2 has no limit without
            its embedding, BERT that of its embedding.
        position_embedding_attribute: name of the embedding among the modules of `model`, such as
            "transformer.wpe"; None finds that of GPT-2 and BERT.

    Returns:
        What happened to the parameters: those of the embedding are gone.

    Raises:
        MissingDependencyError: without transformers.
        ModelError: if there is no such model inside, or its attention cannot be exchanged.
        ConfigError: if `max_sequence_length` is not above 0.
    """
    if max_sequence_length is not None and max_sequence_length < 1:
        raise ConfigError(f"max_sequence_length={max_sequence_length} is none. Write 1 or more.")
    transformers = require("transformers", extra="transformers")
    bodies = [m for m in model.modules() if isinstance(m, transformers.PreTrainedModel)]
    embeddings = _embeddings(model, position_embedding_attribute)
    _check_model(model, bodies, embeddings)
    _register_attention()
    configs = {id(body.config): body.config for body in bodies}
    for config in configs.values():
        _exchange_config(model, config, max_sequence_length)
    for body in bodies:
        # A function makes `structure.describe` say that a file cannot hold this model.
        body.position_bias = alibi_bias
    edit = Edit()
    for name in embeddings:
        if not isinstance(surgery.get(model, name), NoPositions):
            edit = edit.then(surgery.replace(model, name, NoPositions()))
    if max_sequence_length is not None:
        edit = edit.then(_lengthen_buffers(model, max_sequence_length))
    return edit


class ALiBi(Algorithm):
    """Applies `apply_alibi` before training.

    Args:
        max_sequence_length: that the model then takes; None leaves it.
        position_embedding_attribute: name of the embedding; None finds that of GPT-2 and BERT.
    """

    events = frozenset({Event.SETUP})
    card = Card(
        summary="Replaces position embeddings by a penalty on the distance that attention spans.",
        source="Press et al. (2022), Train Short, Test Long: Attention with Linear Biases Enables "
        "Input Length Extrapolation",
        functional="apply_alibi",
        settings="`max_sequence_length`, for sequences longer than the model was made for.",
        use_when="A language model is trained on short sequences, to be used on longer ones.",
        avoid_when="A trained model is compressed or shortly fine-tuned: what it computes changes.",
        cost="A tensor (N, heads, queries, keys) in each layer, as attention without fused "
        "kernels has it; the parameters of the embedding are saved.",
    )

    def __init__(
        self,
        max_sequence_length: int | None = None,
        position_embedding_attribute: str | None = None,
    ) -> None:
        self.max_sequence_length = max_sequence_length
        self.position_embedding_attribute = position_embedding_attribute

    def on(self, event: Event, state: State) -> None:
        """Replace."""
        state.edit(
            lambda model: apply_alibi(
                model, self.max_sequence_length, self.position_embedding_attribute
            )
        )


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention in the form that transformers calls: (N, H, Q, D) to (N, Q, H, D)."""
    mask = _biased_mask(module, query, key, attention_mask)
    mixed = F.scaled_dot_product_attention(query, key, value, mask, dropout, scale=scaling)
    return mixed.transpose(1, 2).contiguous(), None


def attend_eagerly(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """As `attend`, with the weights (N, H, Q, K)."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = query @ key.transpose(-1, -2) * scale
    scores = scores + _biased_mask(module, query, key, attention_mask)
    weights = scores.softmax(dim=-1).to(value.dtype)
    weights = F.dropout(weights, dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


def _biased_mask(module: nn.Module, query: Tensor, key: Tensor, mask: Tensor | None) -> Tensor:
    """The bias, and the lowest number where a query may not look at a key: (N, H, Q, K)."""
    queries, keys = query.shape[2], key.shape[2]
    lowest = torch.finfo(query.dtype).min
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, lowest)
    positions = torch.arange(queries, device=query.device)
    if mask is not None and getattr(module, "is_causal", False):
        # A query is the last key that it sees. Counting would not do: a cache may be filled in
        # part, or longer than what it holds.
        places = torch.arange(keys, device=query.device)
        is_seen = mask > torch.finfo(mask.dtype).min / 2
        positions = torch.where(is_seen, places, 0).amax(dim=-1).squeeze(1)
    bias = alibi_bias(positions, keys, query.shape[1])
    if mask is not None:
        bias = bias + mask
    return bias.clamp_min(lowest).to(query.dtype)  # a row of -inf would be NaN


def _mask(*args: Any, **options: Any) -> Any:
    """The mask of eager attention, also where there is nothing to hide."""
    masking = require("transformers.masking_utils", extra="transformers")
    return masking.eager_mask(*args, **{**options, "allow_is_bidirectional_skip": False})


def _register_attention() -> None:
    modeling = require("transformers.modeling_utils", extra="transformers")
    masking = require("transformers.masking_utils", extra="transformers")
    for name, function in ((ATTENTION, attend), (EAGER_ATTENTION, attend_eagerly)):
        modeling.AttentionInterface.register(name, function)
        masking.AttentionMaskInterface.register(name, _mask)


def _embeddings(model: nn.Module, attribute: str | None) -> list[str]:
    """Names of the position embeddings, or of what took their place."""
    if attribute is not None:
        surgery.get(model, attribute)
        return [attribute]
    return [
        f"{name}.{POSITION_EMBEDDINGS[type(module).__name__]}".lstrip(".")
        for name, module in model.named_modules()
        if type(module).__name__ in POSITION_EMBEDDINGS
    ]


def _check_model(model: nn.Module, bodies: list[Any], embeddings: list[str]) -> None:
    if not bodies or not embeddings:
        raise ModelError(
            f"In the {type(model).__name__} there is no GPT-2 or BERT of transformers. "
            "For another of its models, give position_embedding_attribute."
        )
    for body in bodies:
        name, config = type(body).__name__, body.config
        if not getattr(body, "_supports_attention_backend", False):
            raise ModelError(
                f"The attention of {name} cannot be exchanged in this version of transformers. "
                "Update it, or use another model."
            )
        if getattr(config, "add_cross_attention", False) or config.is_encoder_decoder:
            raise ModelError(
                f"{name} attends to a second sequence, in which there is no distance. "
                "Use a model without cross-attention."
            )


def _exchange_config(model: nn.Module, config: Any, max_sequence_length: int | None) -> None:
    """Give the modules of `model` a configuration of their own: others may share the old one."""
    own = copy.deepcopy(config)
    if config._attn_implementation not in (ATTENTION, EAGER_ATTENTION):
        is_eager = config._attn_implementation == "eager"
        own._attn_implementation = EAGER_ATTENTION if is_eager else ATTENTION
    if max_sequence_length is not None:
        own.max_position_embeddings = max_sequence_length
    for module in model.modules():
        if getattr(module, "config", None) is config:
            module.config = own


def _lengthen_buffers(model: nn.Module, length: int) -> Edit:
    """BERT counts positions, and types of tokens, in buffers (1, length)."""
    edit = Edit()
    for name, module in list(model.named_modules()):
        if type(module).__name__ != "BertEmbeddings":
            continue
        for key, fill in (("position_ids", torch.arange(length)), ("token_type_ids", None)):
            old = getattr(module, key)
            values = torch.zeros(length) if fill is None else fill
            new = values.to(old.device, old.dtype).unsqueeze(0)
            edit = edit.then(surgery.set_tensor(model, f"{name}.{key}".lstrip("."), new))
    return edit
