"""Short sequences first (Li, Zhang and He, 2022, https://arxiv.org/abs/2108.06084)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from compressor.errors import ConfigError, DataError
from compressor.interfaces.data import leaves, map_leaves
from compressor.training.algorithm import Algorithm
from compressor.training.card import Card
from compressor.training.events import Event
from compressor.training.state import State

MASK = "attention_mask"


def set_batch_sequence_length(
    batch: Any, length: int, truncate: bool = True, preserve_end_of_sequence: bool = False
) -> Any:
    """A batch whose sequences are at most `length` long; `batch` is not changed.

    Sequences are the tensors whose first two dimensions are those of the first one that has two or
    three dimensions; everything else stays as it is.

    Args:
        batch: tensors (N, L, ...) in any nesting of tuple, list and mapping.
        length: wanted, 1 or more.
        truncate: cut the end off. False cuts each sequence into as many as there are in it, which
            are samples of their own, and leaves the rest of it out.
        preserve_end_of_sequence: the last token, by the batch's "attention_mask", takes the last
            place of a sequence that is cut, in each tensor.

    Returns:
        Of the form of `batch`, with tensors (N, length, ...), or (N * (L // length), length, ...).

    Raises:
        ConfigError: if the options cannot be meant.
        DataError: if the batch has no sequences, no mask, or entries of samples that are cut up.

    >>> batch = {"input_ids": torch.arange(10).view(2, 5), "labels": torch.tensor([0, 1])}
    >>> set_batch_sequence_length(batch, 3)
    {'input_ids': tensor([[0, 1, 2],
            [5, 6, 7]]), 'labels': tensor([0, 1])}
    """
    _check_options(length, truncate, preserve_end_of_sequence)
    samples, whole = sequence_shape(batch)
    last = _last_places(batch) if preserve_end_of_sequence else None
    if length >= whole:
        return batch

    def shorten(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.dim():
            return leaf
        if leaf.shape[:2] != (samples, whole):
            if not truncate and len(leaf) == samples:
                raise DataError(
                    f"The batch has a tensor of shape {tuple(leaf.shape)} with an entry for each "
                    "sequence, which are to be cut up. Write truncate=True."
                )
            return leaf
        if not truncate:
            return leaf[:, : whole // length * length].reshape(-1, length, *leaf.shape[2:])
        return leaf[:, :length] if last is None else _with_end(leaf, length, last)

    return map_leaves(shorten, batch)


def sequence_shape(batch: Any) -> tuple[int, int]:
    """(N, L) of the first tensor (N, L) or (N, L, C).

    Raises:
        DataError: if there is none.
    """
    for leaf in leaves(batch):
        if isinstance(leaf, Tensor) and leaf.dim() in (2, 3):  # images are no sequences
            return leaf.shape[0], leaf.shape[1]
    raise DataError(
        f"The batch, a {type(batch).__name__}, has no sequences. Give tensors (N, L) or (N, L, C)."
    )


def warm_length(
    fraction: float, duration: float, minimum: int, maximum: int, step_size: int = 1
) -> int:
    """How long sequences are after a fraction of training: it grows linearly from the start.

    Args:
        fraction: of the whole training that has passed, 0 to 1.
        duration: fraction from which on the length is `maximum`.
        minimum: at the start.
        maximum: at the end.
        step_size: lengths before are `minimum` and so many more, in multiples.

    >>> [warm_length(moment, 0.4, 8, 32, step_size=8) for moment in (0.0, 0.1, 0.2, 0.3, 0.4)]
    [8, 8, 16, 24, 32]
    """
    if fraction >= duration or minimum >= maximum:
        return maximum
    grown = (maximum - minimum) * fraction / duration
    # 1e-9: 24 * 0.3 / 0.4 is below 18
    return minimum + int(grown / step_size + 1e-9) * step_size


class SeqLengthWarmup(Algorithm):
    """Trains on the beginnings of sequences first, at BATCH_START.

    Args:
        duration: fraction of the training after which sequences are whole, above 0 to 1.
        min_seq_length: at the start.
        max_seq_length: at the end, to which longer ones are cut until training ends; None leaves
            them as they come.
        step_size: by which lengths grow; multiples of 8 are fast on GPUs.
        truncate: cut the end off. False cuts sequences into several, so batches have more samples.
        preserve_end_of_sequence: the last token takes the last place of a sequence that is cut.

    Raises:
        ConfigError: an option out of range.
    """

    events = frozenset({Event.BATCH_START})
    before = ("SelectiveBackprop",)  # whose losses then cost less, and are of what is trained
    card = Card(
        summary="Trains a language model on short sequences first, which is faster and steadier.",
        source="Li, Zhang and He (2022), The Stability-Efficiency Dilemma: Investigating Sequence "
        "Length Warmup for Training GPT Models",
        functional="set_batch_sequence_length",
        settings="`duration`, the fraction of training until sequences are whole; "
        "`min_seq_length`.",
        use_when="A language model is trained from scratch with large batches or rates.",
        avoid_when="A trained model is fine-tuned; a target is one for the whole sequence; "
        "ranges for quantization are being learnt; together with torch.compile, which compiles "
        "anew for new lengths.",
        cost="Saves: a step costs about as much less as sequences are shorter. What is cut off is "
        "loaded and not trained on.",
    )

    def __init__(
        self,
        duration: float = 0.3,
        min_seq_length: int = 8,
        max_seq_length: int | None = None,
        step_size: int = 8,
        truncate: bool = True,
        preserve_end_of_sequence: bool = False,
    ) -> None:
        if not 0 < duration <= 1 or step_size < 1:
            raise ConfigError(
                f"duration={duration}, step_size={step_size} is no warm-up. Write a part of the "
                "training above 0, and steps of 1 or more."
            )
        if max_seq_length is not None and max_seq_length < min_seq_length:
            raise ConfigError(
                f"min_seq_length={min_seq_length} is above max_seq_length={max_seq_length}. "
                "Swap the two."
            )
        _check_options(min_seq_length, truncate, preserve_end_of_sequence)
        self.duration = duration
        self.min_seq_length = min_seq_length
        self.max_seq_length = max_seq_length
        self.step_size = step_size
        self.truncate = truncate
        self.preserve_end_of_sequence = preserve_end_of_sequence

    def on(self, event: Event, state: State) -> None:
        """Shorten."""
        _, whole = sequence_shape(state.batch)
        maximum = whole if self.max_seq_length is None else self.max_seq_length
        length = warm_length(
            state.fraction, self.duration, self.min_seq_length, maximum, self.step_size
        )
        state.batch = set_batch_sequence_length(
            state.batch, length, self.truncate, self.preserve_end_of_sequence
        )


def _last_places(batch: Any) -> Tensor:
    """Of the last token of each sequence, (N,)."""
    mask = batch.get(MASK) if isinstance(batch, Mapping) else None
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        raise DataError(
            f"Where sequences end is told by an entry {MASK!r} (N, L) of the batch, and there is "
            "none. Let the loader give it, or leave preserve_end_of_sequence out."
        )
    places = torch.arange(mask.shape[1], device=mask.device)
    return (places * (mask != 0)).amax(dim=1)


def _with_end(leaf: Tensor, length: int, last: Tensor) -> Tensor:
    """(N, L, ...) -> (N, length, ...), in whose last place is what was at `last`, if cut off."""
    cut, last = leaf[:, :length].clone(), last.to(leaf.device)
    end = leaf[torch.arange(len(leaf), device=leaf.device), last]
    is_cut = (last >= length).view(-1, *[1] * (leaf.dim() - 2))
    cut[:, -1] = torch.where(is_cut, end, cut[:, -1])
    return cut


def _check_options(length: int, truncate: bool, preserve_end_of_sequence: bool) -> None:
    if length < 1:
        raise ConfigError(f"A sequence length of {length} is none. Write 1 or more tokens.")
    if preserve_end_of_sequence and not truncate:
        raise ConfigError(
            "preserve_end_of_sequence=True is for sequences whose end is cut off, and "
            "truncate=False cuts none off. Leave one of them out."
        )
