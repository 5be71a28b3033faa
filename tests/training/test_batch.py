from __future__ import annotations

import importlib
from collections import OrderedDict, UserDict, namedtuple
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from compressor.errors import DataError
from compressor.training.batch import get_item, set_item

Pair = namedtuple("Pair", ["image", "label"])


@dataclass(frozen=True)
class Record:
    image: int
    label: int


BATCHES: list[tuple[Any, int | str]] = [
    ((1, 2), 1),
    ((1, 2), -1),
    ([1, 2], 1),
    (Pair(1, 2), 1),
    (Pair(1, 2), "label"),
    ({"image": 1, "label": 2}, "label"),
    ({0: 1, 1: 2}, 1),
    (OrderedDict(image=1, label=2), "label"),
    (UserDict(image=1, label=2), "label"),
    (SimpleNamespace(image=1, label=2), "label"),
    (Record(1, 2), "label"),
]


@pytest.mark.parametrize(("batch", "key"), BATCHES)
def test_an_item_is_found_and_replaced_in_a_new_batch_of_the_same_form(
    batch: Any, key: int | str
) -> None:
    assert get_item(batch, key) == 2
    changed = set_item(batch, key, 7)
    assert type(changed) is type(batch)
    assert get_item(changed, key) == 7
    assert get_item(batch, key) == 2


def test_the_other_items_are_shared() -> None:
    image = torch.ones(2)
    for batch in ((image, 2), {0: image, 1: 2}, Pair(image, 2)):
        assert get_item(set_item(batch, 1, 7), 0) is image


@pytest.mark.parametrize(
    ("batch", "key", "has"),
    [
        ((1, 2), 2, "2 items"),
        ([1], "label", "1 items"),
        ({"image": 1}, "label", "'image'"),
        ({"image": 1}, 0, "'image'"),
        (Pair(1, 2), "mask", "image, label"),
        (SimpleNamespace(image=1), "label", "image"),
        (SimpleNamespace(image=1), 0, "image"),
        (torch.zeros(2, 3), 0, r"shape \(2, 3\)"),
        (torch.zeros(2, 3), "data", r"shape \(2, 3\)"),
    ],
)
def test_a_missing_item_is_named_with_what_the_batch_has(
    batch: Any, key: int | str, has: str
) -> None:
    for action in (lambda: get_item(batch, key), lambda: set_item(batch, key, 7)):
        with pytest.raises(DataError, match=f"(?s)(?=.*{key!r})(?=.*{has})"):
            action()


def test_the_encoding_of_a_tokenizer_is_copied() -> None:
    transformers = importlib.import_module("transformers")
    batch = transformers.BatchEncoding({"input_ids": torch.zeros(1, 2), "labels": torch.zeros(1)})
    changed = set_item(batch, "labels", 7)
    assert (get_item(changed, "labels"), type(changed)) == (7, type(batch))
    assert get_item(batch, "labels") is not get_item(changed, "labels")
