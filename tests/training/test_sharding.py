"""Every process takes its part of each batch, and all parts together are the batch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler

from compressor.distributed import SingleProcess
from compressor.errors import DataError
from compressor.interfaces.data import DataLoaderView, seed_generators
from compressor.interfaces.loaders import shards_itself, whole_loader, with_sampler
from compressor.seeding import derive_seed, isolated_rng
from compressor.training.loading import epoch_length
from compressor.training.sharding import Part, Sharding, part_size
from compressor.training.step import FunctionStep
from tests.distributed.threads import Member, in_threads


class OneOf(SingleProcess):
    """One of several processes, whose others do as it does."""

    def __init__(self, rank: int, world_size: int, splits_batches: bool = True) -> None:
        self.rank = rank  # type: ignore[misc]
        self.world_size = world_size  # type: ignore[misc]
        self.splits_batches = splits_batches  # type: ignore[misc]

    def gather(self, value: Any) -> list[Any]:
        return [value] * self.world_size

    def total(self, values: Any) -> dict[str, float]:
        return {name: value * self.world_size for name, value in values.items()}


def take(
    loader: Any, count: int, *, splits: bool = True, model: nn.Module | None = None, epoch: int = 0
) -> list[list[tuple[list[int], Part]]]:
    """Of each of `count` processes: the samples of its batches, and what part they are."""
    step = FunctionStep(lambda model, batch: torch.zeros(()), is_observed=False)
    everybody = []
    for rank in range(count):
        sharding = Sharding(OneOf(rank, count, splits), step, model or nn.Linear(1, 1))
        seed_generators(loader, 3)
        with isolated_rng(rank):  # the order must not depend on it
            batches = sharding.of(loader, 5, epoch)
            everybody.append([(batch.tolist(), sharding.part) for batch in batches])
    return everybody


def take_whole(loader: Any) -> list[list[int]]:
    """The samples of the batches of the first epoch in one process."""
    seed_generators(loader, 3)
    with isolated_rng(derive_seed(5, "epoch", 0)):
        return [batch.tolist() for batch in loader]


class Stream(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        yield from torch.randperm(21).tolist()


class Batches:
    """Neither a DataLoader nor a list."""

    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter(torch.randperm(21).split(4))


def loaders() -> dict[str, Any]:
    own = torch.Generator().manual_seed(9)
    numbers = list(range(21))
    return {
        "shuffled": DataLoader(numbers, batch_size=4, shuffle=True),  # type: ignore[arg-type]
        "own generator": DataLoader(numbers, batch_size=4, shuffle=True, generator=own),  # type: ignore[arg-type]
        "short": DataLoader(numbers, batch_size=4, drop_last=True),  # type: ignore[arg-type]
        "own batches": DataLoader(
            numbers,  # type: ignore[arg-type]
            batch_sampler=BatchSampler(RandomSampler(numbers), 4, False),
        ),
        "view": DataLoaderView(DataLoader(numbers, batch_size=4, shuffle=True), max_batches=3),  # type: ignore[arg-type]
        "batched dataset": DataLoader(torch.arange(21).split(4), batch_size=None),  # type: ignore[arg-type]
        "stream": DataLoader(Stream(), batch_size=4),
        "list": list(torch.arange(21).split(4)),
        "iterable": Batches(),
    }


@pytest.mark.parametrize("name", loaders())
@pytest.mark.parametrize("world_size", [2, 3])
def test_the_parts_of_all_are_the_batches_of_one_process(name: str, world_size: int) -> None:
    loader = loaders()[name]
    whole, everybody = take_whole(loader), take(loader, world_size)
    assert [len(each) for each in everybody] == [len(whole)] * world_size
    for number, batch in enumerate(whole):
        parts = [each[number] for each in everybody]
        assert [sample for own, part in parts if part.share for sample in own] == batch
        assert sum(part.share for _, part in parts) == pytest.approx(1)
        assert {part.samples for _, part in parts} == {len(batch)}
        for own, part in parts:
            assert part.share in (0, len(own) / len(batch))
            assert own


@pytest.mark.parametrize("name", ["shuffled", "stream", "list"])
def test_where_batches_are_not_split_processes_take_turns_and_a_rest_is_left_out(name: str) -> None:
    loader = loaders()[name]
    whole = take_whole(loader)
    first, second, *_ = everybody = take(loader, 4, splits=False)
    assert [len(each) for each in everybody] == [1] * 4  # of six batches
    assert [own for each in everybody for own, _ in each] == whole[:4]
    assert first[0][1] == second[0][1] == Part(0.25, 16)


@pytest.mark.parametrize("name", ["shuffled", "own batches", "stream", "list", "iterable"])
def test_whole_batches_count_by_their_samples(name: str) -> None:
    # Each of a round had counted the same: the one sample of the last batch as much as four.
    first, second = take(loaders()[name], 2, splits=False)
    assert [part for _, part in first] == [Part(0.5, 8), Part(0.5, 8), Part(0.8, 5)]
    assert [part for _, part in second] == [Part(0.5, 8), Part(0.5, 8), Part(0.2, 5)]


def test_batches_of_a_loader_that_shards_itself_count_by_their_samples() -> None:
    class Shard(list[torch.Tensor]):
        is_sharded = True

    def parts(member: Member) -> list[Part]:
        own = Shard([torch.arange((32, 9)[member.rank])])
        step = FunctionStep(lambda model, batch: torch.zeros(()), is_observed=False)
        sharding = Sharding(member, step, nn.Linear(1, 1))
        return [sharding.part for _ in sharding.of(own, 5, 0)]

    assert in_threads(2, parts) == [[Part(32 / 41, 41)], [Part(9 / 41, 41)]]


def test_fewer_whole_batches_than_processes_are_an_error() -> None:
    for loader in (loaders()["list"], loaders()["shuffled"]):
        with pytest.raises(DataError, match="6 batches for 7 processes"):
            take(loader, 7, splits=False)


def test_another_epoch_has_another_order() -> None:
    loader = loaders()["shuffled"]
    assert take(loader, 2, epoch=0) == take(loader, 2, epoch=0) != take(loader, 2, epoch=1)


def test_the_loader_is_left_as_it_was() -> None:
    loader = loaders()["shuffled"]
    sampler, before = loader.batch_sampler, dict(vars(loader))
    take(loader, 2)
    assert vars(loader) == before
    assert loader.batch_sampler is sampler


def test_no_part_has_a_single_sample_where_there_are_batch_norms() -> None:
    model = nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(1))
    batches = [torch.arange(count) for count in (7, 5, 3, 2, 1)]
    for each in take(batches, 3, model=model):
        assert [len(own) > 1 for own, _ in each] == [True, True, True, True, False]


@pytest.mark.parametrize("samples", range(1, 30))
@pytest.mark.parametrize("count", [1, 2, 3, 8])
@pytest.mark.parametrize("least", [1, 2, 3])
def test_parts_are_even_and_not_too_small(samples: int, count: int, least: int) -> None:
    size = part_size(samples, count, least)
    assert size * count >= samples
    if least == 1:
        assert size == -(-samples // count)
    rest = samples % size
    assert not rest or rest >= least or samples < least


def test_what_shards_itself_is_known() -> None:
    numbers: Any = list(range(8))
    sampler: Any = torch.utils.data.DistributedSampler(numbers, num_replicas=2, rank=1)
    sharded = DataLoader(numbers, sampler=sampler)
    batched = DataLoader(numbers, batch_sampler=BatchSampler(sampler, 2, False))
    plain = DataLoader(numbers)
    said = DataLoader(numbers)
    said.is_sharded = True  # type: ignore[attr-defined]
    found = [shards_itself(each) for each in (sharded, batched, said, DataLoaderView(said), plain)]
    assert found == [True, True, True, True, False]
    assert not shards_itself([1, 2])


def test_a_distributed_sampler_is_undone_for_an_evaluation() -> None:
    numbers: Any = list(range(9))
    sampler: Any = torch.utils.data.DistributedSampler(numbers, num_replicas=2, rank=1)
    whole = whole_loader(DataLoader(numbers, batch_size=4, sampler=sampler))
    assert torch.cat(list(whole)).tolist() == numbers
    plain = DataLoader(numbers)
    assert whole_loader(plain) is plain


def test_a_subclass_of_a_loader_keeps_its_attributes() -> None:
    class Mine(DataLoader[int]):
        def __init__(self, *args: Any, factor: int, **options: Any) -> None:
            super().__init__(*args, **options)
            self.collate_fn = lambda samples: factor * torch.tensor(samples)

    mine = Mine(list(range(4)), batch_size=4, factor=10)
    (batch,) = with_sampler(mine, lambda batches: [each[:2] for each in batches])
    assert batch.tolist() == [0, 10]


def test_an_epoch_is_as_long_as_its_rounds() -> None:
    loader = loaders()["list"]
    assert epoch_length(loader) == epoch_length(loader, OneOf(0, 4)) == 6
    assert epoch_length(loader, OneOf(0, 4, splits_batches=False)) == 1


@pytest.mark.parametrize("kind", ["loader", "list", "stream"])
@pytest.mark.parametrize("is_nested", [False, True])
def test_a_view_of_two_batches_is_two_rounds_where_whole_ones_are_dealt(
    kind: str, is_nested: bool
) -> None:
    # They had been two batches in all, which are none for each of eight processes.
    batches: dict[str, Any] = {
        "loader": DataLoader(list(range(21)), batch_size=1),  # type: ignore[arg-type]
        "list": list(torch.arange(21).split(1)),
        "stream": DataLoader(Stream(), batch_size=1),
    }
    view = DataLoaderView(batches[kind], max_batches=2)
    if is_nested:
        view = DataLoaderView(view, max_batches=4)
    assert [len(each) for each in take(view, 8, splits=False)] == [2] * 8
    length = epoch_length(view, OneOf(0, 8, splits_batches=False))
    assert length == (None if kind == "stream" else 2)


def test_an_epoch_of_a_view_is_no_longer_than_that_of_its_loader() -> None:
    context = OneOf(0, 8, splits_batches=False)
    view = DataLoaderView(list(torch.arange(21).split(1)), max_batches=4)
    assert epoch_length(view, context) == 2
    assert epoch_length(DataLoaderView(view, max_batches=1), context) == 1
    assert epoch_length(view) == epoch_length(view, OneOf(0, 8)) == 4
