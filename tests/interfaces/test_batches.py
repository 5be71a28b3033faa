"""Batches of any form: moved, counted and split, whichever way they are gone through."""

from __future__ import annotations

from collections import UserDict
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compressor.errors import DataError
from compressor.interfaces.data import leaves, map_leaves, move, sample_count, split_batch


class Pair(NamedTuple):
    x: Any
    y: Any


LEAVES = st.one_of(
    st.lists(st.integers(0, 3), max_size=2).map(torch.zeros),
    st.just(torch.zeros(2, device="meta")),
    st.just(torch.nn.Parameter(torch.zeros(2))),
    st.sampled_from(["name", 3, None]),
)
BATCHES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
        st.builds(Pair, inner, inner),
        st.dictionaries(st.sampled_from("abc"), inner, max_size=3).map(UserDict),
    ),
    max_leaves=6,
)


def form(batch: Any) -> Any:
    """Containers by type and keys, leaves by identity."""
    if isinstance(batch, (dict, UserDict)):
        return type(batch), [(key, form(value)) for key, value in batch.items()]
    if isinstance(batch, (tuple, list)):
        return type(batch), [form(value) for value in batch]
    return id(batch)


@given(BATCHES, st.sampled_from(["cpu", torch.device("cpu")]))
def test_a_batch_that_need_not_move_is_moved_like_any_other(batch: Any, device: Any) -> None:
    """Flat batches take a way of their own, without the recursion."""
    cpu = map_leaves(
        lambda leaf: torch.zeros(2) if getattr(leaf, "is_meta", False) else leaf, batch
    )
    slow = map_leaves(lambda leaf: leaf.to(device) if hasattr(leaf, "to") else leaf, cpu)
    moved = move(cpu, device)
    assert form(moved) == form(slow)
    if isinstance(batch, (list, dict)):
        assert moved is not cpu  # an algorithm may put something else into it


@given(BATCHES)
def test_a_batch_with_something_elsewhere_is_moved_whole(batch: Any) -> None:
    moved = move(batch, torch.device("meta"))
    assert [leaf.is_meta for leaf in leaves(moved) if isinstance(leaf, torch.Tensor)] == [
        True for leaf in leaves(batch) if isinstance(leaf, torch.Tensor)
    ]


@given(BATCHES)
def test_samples_are_counted_alike_on_flat_and_nested_batches(batch: Any) -> None:
    lengths = [len(x) for x in leaves(batch) if isinstance(x, torch.Tensor) and x.dim()]
    assert sample_count(batch) == (lengths[0] if lengths else 1)


X, Y = torch.arange(6.0).reshape(3, 2), torch.arange(3)


def plain(batch: Any) -> Any:
    """Tensors as lists, to compare."""
    return map_leaves(lambda leaf: leaf.tolist() if isinstance(leaf, torch.Tensor) else leaf, batch)


@pytest.mark.parametrize(
    ("batch", "first", "last"),
    [
        ((X, Y), (X[:2], Y[:2]), (X[2:], Y[2:])),
        ([X, Y], [X[:2], Y[:2]], [X[2:], Y[2:]]),
        ({"x": X, "scale": 2.0}, {"x": X[:2], "scale": 2.0}, {"x": X[2:], "scale": 2.0}),
        (Pair({"x": X}, [Y]), Pair({"x": X[:2]}, [Y[:2]]), Pair({"x": X[2:]}, [Y[2:]])),
        (UserDict(x=X), UserDict(x=X[:2]), UserDict(x=X[2:])),
        # names of samples: default_collate makes them a tuple
        ((X, ("a", "b", "c")), (X[:2], ("a", "b")), (X[2:], ("c",))),
        ((X, ["a", "b", "c"]), (X[:2], ["a", "b"]), (X[2:], ["c"])),
        ((X, ["a", "b"]), (X[:2], ["a", "b"]), (X[2:], ["a", "b"])),
        # targets of samples that differ in size
        (
            (X, [{"box": torch.zeros(n, 4)} for n in (1, 3, 2)]),
            (X[:2], [{"box": torch.zeros(n, 4)} for n in (1, 3)]),
            (X[2:], [{"box": torch.zeros(2, 4)}]),
        ),
        ((X, [["a"], ["b", "c"], []]), (X[:2], [["a"], ["b", "c"]]), (X[2:], [[]])),
        # three inputs of three samples are inputs
        (([X, X, {"y": Y}], Y), ([X[:2], X[:2], {"y": Y[:2]}], Y[:2]), None),
        (([X, X, torch.ones(())], Y), ([X[:2], X[:2], torch.ones(())], Y[:2]), None),
        # what is not per sample is in every part
        ((X, torch.ones(5), torch.ones(()), X.shape, None), (X[:2], torch.ones(5)), None),
        ((X, torch.Size([4, 5, 6])), (X[:2], torch.Size([4, 5, 6])), None),
    ],
    ids=str,
)
def test_a_batch_is_cut_where_it_has_an_entry_per_sample(batch: Any, first: Any, last: Any) -> None:
    before = form(batch)
    parts = split_batch(batch, 2)
    assert len(parts) == 2
    got = plain(parts[0])
    if last is None:
        assert got[: len(first)] == plain(first)
    else:
        assert got == plain(first)
        assert plain(parts[1]) == plain(last)
        assert type(parts[1]) is type(batch)
    assert form(batch) == before


def test_two_tensors_of_two_samples_are_a_batch_and_not_two_samples() -> None:
    x, y = torch.zeros(2, 3), torch.ones(2)
    parts = split_batch([x, y], 1)
    assert [[tuple(value.shape) for value in part] for part in parts] == [[(1, 3), (1,)]] * 2
    with_table = split_batch([x, torch.ones(5)], 1)
    assert [[tuple(value.shape) for value in part] for part in with_table] == [[(1, 3), (5,)]] * 2
    nested = split_batch([[x, x], y], 1)
    assert [[tuple(value.shape) for value in part[0]] for part in nested] == [[(1, 3)] * 2] * 2


@pytest.mark.parametrize("size", [3, 4, 100])
@pytest.mark.parametrize("batch", [(X, Y), {"x": X}, X, ["a", "b"], "no tensor"], ids=str)
def test_a_batch_that_is_small_enough_is_the_only_part(batch: Any, size: int) -> None:
    (part,) = split_batch(batch, size)
    assert part is batch


@given(st.integers(1, 12), st.integers(1, 13))
def test_parts_put_together_are_the_batch(count: int, size: int) -> None:
    x = torch.arange(count)
    parts = split_batch({"x": x, "names": [str(i) for i in range(count)]}, size)
    assert torch.equal(torch.cat([part["x"] for part in parts]), x)
    assert [name for part in parts for name in part["names"]] == [str(i) for i in range(count)]
    sizes = [sample_count(part) for part in parts]
    assert len(set(sizes[:-1])) <= 1
    assert max(sizes) <= size


def test_parts_are_views_and_sparse_ones_are_cut_too() -> None:
    x = torch.eye(3)
    parts = split_batch((x, x.to_sparse()), 2)
    assert parts[1][0].data_ptr() == x[2:].data_ptr()
    assert torch.equal(parts[1][1].to_dense(), x[2:])
    assert torch.equal(parts[0][1].to_dense(), x[:2])


def test_a_tokenizers_batch_keeps_its_class() -> None:
    class BatchEncoding(UserDict):  # type: ignore[type-arg]
        def __init__(self, data: Any) -> None:
            super().__init__(data)
            self.tokenizer = "fast"

    encoding = BatchEncoding({"input_ids": X, "attention_mask": X > 0})
    last = split_batch(encoding, 1)[-1]
    assert type(last) is BatchEncoding
    assert last.tokenizer == "fast"
    assert torch.equal(last["input_ids"], X[2:])
    assert encoding["input_ids"] is X


def test_parts_hold_a_sample_at_least() -> None:
    with pytest.raises(DataError, match="Parts of 0 samples"):
        split_batch((X, Y), 0)
