from __future__ import annotations

import contextlib
import copy
import pickle
from collections import OrderedDict, UserDict
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    TensorDataset,
)

from compressor.errors import DataError
from compressor.interfaces.data import (
    DataLoaderView,
    check_data,
    first_batch,
    kept_generators,
    leaves,
    move,
    sample_count,
    seed_generators,
    take,
)


class Numbers(IterableDataset[Any]):
    def __init__(self, count: int) -> None:
        self.count = count

    def __iter__(self) -> Iterator[Any]:
        return iter(torch.arange(float(self.count)))


def make_loader(samples: int = 10, **options: Any) -> DataLoader[Any]:
    dataset = TensorDataset(torch.arange(float(samples)), torch.zeros(samples))
    return DataLoader(dataset, batch_size=4, **options)


def test_a_view_counts_the_real_samples() -> None:
    view = DataLoaderView(make_loader())
    assert (len(view), view.batch_size, view.dataset_size) == (3, 4, 10)
    assert [len(x) for x, _ in view] == [4, 4, 2]
    assert DataLoaderView(make_loader(drop_last=True)).dataset_size == 8


def test_a_view_has_the_attributes_of_the_loader() -> None:
    loader = make_loader()
    view = DataLoaderView(loader)
    assert view.native_dl is loader
    assert view.dataset is loader.dataset
    with pytest.raises(AttributeError, match="no attribute 'num_classes'"):
        view.num_classes  # noqa: B018


def test_a_view_can_be_cut_short() -> None:
    view = DataLoaderView(make_loader(), max_batches=2)
    assert len(view) == len(list(view)) == 2
    assert view.dataset_size == 8


def test_a_view_of_a_view_is_one_of_the_loader_with_the_smaller_limit() -> None:
    loader = make_loader()
    for outer, inner, batches in ((None, 2, 2), (1, 2, 1), (2, 1, 1), (2, None, 2)):
        view = DataLoaderView(DataLoaderView(loader, inner), outer)
        assert view.native_dl is loader
        assert len(view) == len(list(view)) == batches


def test_a_list_of_batches_is_a_loader() -> None:
    view = DataLoaderView([torch.zeros(3, 2), torch.zeros(1, 2)])
    assert (view.batch_size, view.dataset_size, len(view)) == (3, None, 2)


def test_a_view_of_a_stream_does_not_know_its_length() -> None:
    view = DataLoaderView(DataLoader(Numbers(10), batch_size=4))
    assert view.batch_size == 4
    assert view.dataset_size is None
    with pytest.raises(TypeError):
        len(view)


def test_a_view_can_be_copied_and_pickled() -> None:
    for view in (copy.copy(DataLoaderView([1])), pickle.loads(pickle.dumps(DataLoaderView([1])))):
        assert list(view) == [1]


def test_the_users_mapping_is_left_alone() -> None:
    data = {"train": make_loader(), "test": make_loader(), "extra": iter([1])}
    before = dict(data)
    views = check_data(data, "test", None)
    assert data == before
    assert list(views) == ["train", "test", "extra"]
    assert views["train"].native_dl is data["train"]
    assert len(list(check_data(data, "test", None, max_batches=1)["test"])) == 1


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([1], "The data is a list. Give a mapping of splits"),
        ({"test": [1]}, "no 'train' split. It has: 'test'"),
        ({}, "no 'train' split. It has: none"),
        ({"train": [1], "tset": [1]}, "eval_split='test' is not a split .* Did you mean 'tset'"),
        ({"train": [], "test": [1]}, "The 'train' split yields no batch"),
        ({"train": [1], "test": DataLoader(Numbers(0))}, "The 'test' split yields no batch"),
        ({"train": iter([1]), "test": [1]}, "'train' split is a list_iterator, which one pass"),
        ({"train": (b for b in [1]), "test": [1]}, "'train' split is a generator"),
        ({"train": 3, "test": [1]}, "'train' split is a int, not a loader. Give a DataLoader"),
    ],
)
def test_data_that_cannot_be_used_says_why(data: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        check_data(data, "test", None)


def test_a_dataset_is_not_a_loader() -> None:
    class Mine(Dataset[int]):
        def __getitem__(self, index: int) -> int:
            return index

    with pytest.raises(DataError, match=r"Wrap it in a torch.utils.data.DataLoader"):
        check_data({"train": Mine(), "test": [1]}, "test", None)


def test_the_holdout_must_be_there() -> None:
    with pytest.raises(DataError, match="holdout='final' is not a split"):
        check_data({"train": [1], "test": [1]}, "test", "final")


def test_looking_at_a_stream_leaves_no_trace() -> None:
    own = torch.Generator().manual_seed(1)
    shuffled = make_loader(shuffle=True, generator=own)
    states = torch.get_rng_state(), own.get_state()
    check_data({"train": DataLoader(Numbers(3)), "test": [1]}, "test", None)
    first_batch(shuffled)
    assert torch.equal(states[0], torch.get_rng_state())
    assert torch.equal(states[1], own.get_state())


def in_loader(own: torch.Generator) -> DataLoader[Any]:
    return make_loader(shuffle=True, generator=own)


def in_sampler(own: torch.Generator) -> DataLoader[Any]:
    return make_loader(sampler=RandomSampler(range(10), generator=own))


def in_batch_sampler(own: torch.Generator) -> DataLoader[Any]:
    sampler = BatchSampler(RandomSampler(range(10), generator=own), 4, drop_last=False)
    return DataLoader(make_loader().dataset, batch_sampler=sampler)


def order(loader: Any) -> list[float]:
    return [value for x, _ in loader for value in x.tolist()]


@pytest.mark.parametrize("make", [in_loader, in_sampler, in_batch_sampler])
def test_a_loaders_own_generator_is_put_back_and_seeded_wherever_it_is(make: Any) -> None:
    own = torch.Generator().manual_seed(1)
    view = DataLoaderView(make(own))
    state = own.get_state()
    with kept_generators(view):
        seed_generators(view, 5)
        first = order(view)
        seed_generators(view, 5)
        assert order(view) == first
        assert not torch.equal(own.get_state(), state)
    assert torch.equal(own.get_state(), state)
    with contextlib.suppress(KeyError), kept_generators(view):
        order(view)
        raise KeyError
    assert torch.equal(own.get_state(), state)


def test_a_loader_without_batches_has_no_first_one() -> None:
    with pytest.raises(DataError, match="yields no batch"):
        first_batch([])


def test_taking_fetches_no_batch_too_many() -> None:
    fetched = []

    class Counting:
        def __iter__(self) -> Iterator[int]:
            for number in range(5):
                fetched.append(number)
                yield number

    assert list(take(Counting(), 2)) == [0, 1]
    assert fetched == [0, 1]
    assert list(take([1], 9)) == [1]


def test_a_batch_is_moved_at_any_depth_and_keeps_its_form() -> None:
    batch = {
        "x": [torch.ones(2), (torch.ones(2), "name")],
        "ordered": OrderedDict(a=torch.ones(2)),
        "user": UserDict(b=torch.ones(2)),
    }
    moved = move(batch, "meta", non_blocking=True)
    assert [type(leaf) for leaf in leaves(moved)] == [type(leaf) for leaf in leaves(batch)]
    assert all(leaf.is_meta for leaf in leaves(moved) if isinstance(leaf, torch.Tensor))
    assert isinstance(moved["ordered"], OrderedDict)
    assert isinstance(moved["user"], UserDict)
    assert not batch["user"]["b"].is_meta  # the batch itself is not changed


def test_what_is_copied_to_a_gpu_without_waiting_is_pinned_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    done: list[str] = []

    def note(name: str) -> Any:
        return lambda tensor, *_, **__: (done.append(name), tensor)[1]

    monkeypatch.setattr(torch.Tensor, "pin_memory", note("pin"))
    monkeypatch.setattr(torch.Tensor, "to", note("copy"))
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda tensor: bool(tensor.sum() == 0))
    ordinary, pinned = torch.ones(2), torch.zeros(2)
    elsewhere, special = torch.ones(2, device="meta"), torch.nn.Parameter(torch.ones(2))
    for batch, device, non_blocking, expected in (
        ([ordinary], "cuda", True, ["pin", "copy"]),
        ([ordinary], "cuda", False, ["copy"]),
        ([ordinary], "cpu", True, ["copy"]),
        ([pinned, elsewhere, special, ordinary.to_sparse()], "cuda:0", True, ["copy"] * 4),
    ):
        done.clear()
        move(batch, device, non_blocking)
        assert done == expected


def test_what_can_move_itself_is_asked_to() -> None:
    class Graph:
        def to(self, device: str) -> str:
            return f"graph on {device}"

    assert move((Graph(), 1), "meta") == ("graph on meta", 1)


@pytest.mark.parametrize(
    ("batch", "count"),
    [
        (torch.zeros(8, 3), 8),
        ((["a", "b"], torch.tensor(3.0), torch.zeros(2)), 2),
        ({"x": {"y": torch.zeros(5)}}, 5),
        (["a", "b"], 1),
    ],
)
def test_samples_are_counted_on_the_first_tensor_that_has_a_length(batch: Any, count: int) -> None:
    assert sample_count(batch) == count
