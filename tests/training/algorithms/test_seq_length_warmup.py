from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from compressor.errors import ConfigError, DataError
from compressor.training import Algorithm, Event, State, TaskModel
from compressor.training.algorithms import SeqLengthWarmup
from compressor.training.algorithms.seq_length_warmup import set_batch_sequence_length, warm_length
from tests.training.algorithms.settings import SETTINGS

IDS = torch.tensor([[1, 2, 3, 4, 5, 6, 9], [1, 2, 3, 9, 0, 0, 0]])
"""Tokens, of which 9 ends a sequence and 0 is none."""
BATCH = {"input_ids": IDS, "attention_mask": (IDS > 0).long(), "id": torch.tensor([7, 8])}


def test_the_end_is_cut_off_every_sequence_and_nothing_else() -> None:
    short = set_batch_sequence_length(BATCH, 3)
    assert short["input_ids"].tolist() == [[1, 2, 3], [1, 2, 3]]
    assert short["attention_mask"].shape == (2, 3)
    assert short["id"] is BATCH["id"]
    assert BATCH["input_ids"].shape == (2, 7)


def test_the_end_of_a_sequence_may_take_the_last_place() -> None:
    kept = [set_batch_sequence_length(BATCH, n, preserve_end_of_sequence=True) for n in (3, 4, 5)]
    assert [batch["input_ids"].tolist() for batch in kept] == [
        [[1, 2, 9], [1, 2, 9]],
        [[1, 2, 3, 9], [1, 2, 3, 9]],
        [[1, 2, 3, 4, 9], [1, 2, 3, 9, 0]],
    ]
    assert [batch["attention_mask"].sum().item() for batch in kept] == [6, 8, 9]
    assert IDS[0, 2] == 3


def test_sequences_may_be_cut_into_several_that_never_cross() -> None:
    batch = [IDS, IDS.unsqueeze(-1) + 0.5]
    ids, vectors = set_batch_sequence_length(batch, 3, truncate=False)
    assert ids.tolist() == [[1, 2, 3], [4, 5, 6], [1, 2, 3], [9, 0, 0]]
    assert torch.equal(vectors[..., 0], ids + 0.5)
    with pytest.raises(DataError, match=r"\(2,\) with an entry for each sequence.*truncate=True"):
        set_batch_sequence_length(BATCH, 3, truncate=False)


@pytest.mark.parametrize("truncate", [True, False])
def test_what_is_short_enough_is_the_batch_itself(truncate: bool) -> None:
    batch = IDS, IDS
    assert set_batch_sequence_length(batch, 7, truncate) is batch
    assert set_batch_sequence_length(batch, 9, truncate) is batch


@pytest.mark.slow  # imports transformers
def test_any_form_of_a_batch_keeps_its_form() -> None:
    from transformers import BatchEncoding

    encoding = BatchEncoding({"input_ids": IDS})
    short = set_batch_sequence_length(encoding, 2)
    assert type(short) is BatchEncoding
    assert short["input_ids"].shape == (2, 2)
    assert encoding["input_ids"].shape == (2, 7)
    ids, name = set_batch_sequence_length((IDS, "a"), 2)
    assert ids.shape == (2, 2)
    assert name == "a"


def test_the_length_grows_in_steps_and_ends_where_it_is_to() -> None:
    lengths = [warm_length(batch / 10, 0.5, 4, 30, 8) for batch in range(11)]
    assert lengths == [4, 4, 12, 12, 20, *[30] * 6]
    assert warm_length(0.0, 0.5, 16, 8) == 8  # batches that are shorter than the start


class Noting(Algorithm):
    events = frozenset({Event.AFTER_LOSS})

    def __init__(self) -> None:
        self.lengths: list[int] = []

    def on(self, event: Event, state: State) -> None:
        self.lengths.append(state.batch[0].shape[1])


@pytest.mark.parametrize(("maximum", "last"), [(None, 8), (6, 6), (20, 8)])
def test_a_training_grows_to_whole_sequences(maximum: int | None, last: int) -> None:
    noting = Noting()
    warmup = SeqLengthWarmup(0.5, min_seq_length=2, max_seq_length=maximum, step_size=2)
    SETTINGS["SeqLengthWarmup"].make_trainer([warmup, noting]).fit()
    expected = {8: [2, 2, 4, 6], 6: [2, 2, 4, 4], 20: [2, 6, 8, 8]}[maximum or 8]
    assert noting.lengths == [*expected, *[last] * 4]


def test_pieces_of_sequences_are_samples() -> None:
    class Pieces(TaskModel):
        def __init__(self) -> None:
            super().__init__()
            self.model = torch.nn.Linear(2, 1)
            self.samples: list[int] = []

        def forward(self, batch: Any) -> Tensor:
            self.samples.append(len(batch[0]))
            return self.model(batch[0])  # type: ignore[no-any-return]

        def loss(self, outputs: Tensor, batch: Any) -> Tensor:
            return outputs.mean()

    task = Pieces()
    warmup = SeqLengthWarmup(1.0, min_seq_length=2, max_seq_length=2, truncate=False)
    trainer = SETTINGS["SeqLengthWarmup"].make_trainer(
        [warmup], task=task, train_dataloader=[(torch.ones(4, 8),)], max_duration="1ba"
    )
    trainer.fit()
    assert task.samples == [16]
    assert trainer.state.clock.sample == 16


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"duration": 0}, "duration=0"),
        ({"duration": 1.5}, "duration=1.5"),
        ({"step_size": 0}, "step_size=0"),
        ({"min_seq_length": 0}, "length of 0"),
        ({"min_seq_length": 9, "max_seq_length": 8}, "min_seq_length=9"),
        ({"truncate": False, "preserve_end_of_sequence": True}, "truncate=False"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        SeqLengthWarmup(**options)


def test_batches_without_sequences_or_masks_are_refused() -> None:
    with pytest.raises(DataError, match="has no sequences"):
        set_batch_sequence_length({"x": torch.ones(3)}, 2)
    with pytest.raises(DataError, match="has no sequences"):
        set_batch_sequence_length((torch.ones(2, 3, 8, 8), torch.ones(2)), 2)
    with pytest.raises(DataError, match="attention_mask"):
        set_batch_sequence_length((IDS, IDS), 2, preserve_end_of_sequence=True)
