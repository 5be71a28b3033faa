"""What is compared between processes, and what they agree on; real ones are in tests/training."""

from __future__ import annotations

from collections.abc import Callable
from math import inf
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compressor.distributed import SingleProcess
from compressor.distributed.agreement import (
    DivergedRanksError,
    agree,
    agree_on,
    check_agreement,
    check_structure,
    digests,
)
from tests.distributed.threads import in_threads


def make_model(width: int = 3) -> nn.Module:
    model = nn.Sequential(nn.Linear(2, width), nn.BatchNorm1d(width))
    for tensor in (*model.parameters(), *model.buffers()):
        nn.init.constant_(tensor, 1)
    return model


def messages(
    check: Callable[..., None], count: int, change: Callable[[nn.Module, int], Any]
) -> list[str]:
    """The errors of so many processes, each of which has changed its model."""

    def work(context: Any) -> None:
        model = make_model()
        with torch.no_grad():
            changed = change(model, context.rank)
        check(context, changed if isinstance(changed, nn.Module) else model)

    found = in_threads(count, work)
    assert all(each is None or isinstance(each, DivergedRanksError) for each in found), found
    return [str(each) for each in found if each is not None]


def spoil(model: nn.Module, rank: int) -> None:
    if rank == 1:
        model[1].weight[2] += 1e-6  # type: ignore[index,operator]


def test_a_bit_that_differs_is_found_and_all_are_told() -> None:
    found = messages(check_agreement, 3, spoil)
    assert len(found) == 3
    for message in found:
        assert message.startswith(
            "The parameter '1.weight' has other values in ranks 0, 2 and rank 1."
        )


def test_equal_models_are_equal() -> None:
    assert not messages(agree, 2, lambda model, rank: None)


def test_a_missing_parameter_and_another_shape_are_named() -> None:
    found = messages(check_structure, 2, lambda model, rank: make_model(3 + rank))
    assert (
        "'0.weight' is not the same in all processes: (3, 2) of torch.float32 in rank 0,"
        in found[0]
    )
    found = messages(check_structure, 2, lambda model, rank: model[: 2 - rank])  # type: ignore[index]
    assert "'1.weight' is not the same in all processes: (3,) of" in found[1]
    assert "missing in rank 1" in found[1]


def test_values_of_parameters_are_no_matter_of_structure() -> None:
    assert not messages(check_structure, 2, spoil)


def test_buffers_become_their_mean_and_counts_those_of_rank_0() -> None:
    def work(context: Any) -> list[Tensor]:
        model = make_model()
        norm = model[1]  # type: ignore[index]
        norm.running_mean.fill_(context.rank)  # type: ignore[union-attr,operator]
        norm.num_batches_tracked.fill_(5 + context.rank)  # type: ignore[union-attr,operator]
        agree(context, model)
        return [norm.running_mean, norm.running_var, norm.num_batches_tracked]  # type: ignore[union-attr,list-item]

    for mean, variance, count in in_threads(3, work):
        assert mean.tolist() == [1.0] * 3
        assert variance.tolist() == [1.0] * 3
        assert count == 5


def test_what_is_equal_stays_equal_to_the_bit() -> None:
    values = torch.tensor([0.1, 1 / 3, inf, -inf, 1e38, 0.0])
    # 0.1f + 0.1f + 0.1f is rounded, and a third of it another number; three times 1e38 overflows
    for own in in_threads(3, lambda context: _agreed(context, values.clone())):
        assert torch.equal(own, values)


def test_zeros_of_either_sign_become_one() -> None:
    """0.0 == -0.0 was left as it was, and then refused as other values."""

    def change(model: Any, rank: int) -> None:
        model[1].running_mean.fill_(-0.0 if rank else 0.0)

    assert not messages(agree, 2, change)
    own = [torch.tensor(0.0), torch.tensor(-0.0)]
    in_threads(2, lambda context: _agreed(context, own[context.rank]))
    assert [each.signbit().item() for each in own] == [False, False]


def test_halves_are_averaged_as_floats() -> None:
    def work(context: Any) -> Tensor:
        return _agreed(context, torch.tensor([1000.0 + context.rank], dtype=torch.float16))

    assert [each.item() for each in in_threads(3, work)] == [1001.0] * 3


def test_an_expanded_tensor_that_is_equal_is_not_written_to() -> None:
    for own in in_threads(2, lambda context: _agreed(context, torch.ones(1).expand(3))):
        assert own.tolist() == [1.0] * 3


def _agreed(context: Any, tensor: Tensor) -> Tensor:
    agree_on(context, [tensor])
    return tensor


@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.float64, torch.bfloat16, torch.bool, torch.int64, torch.complex64],
)
def test_a_digest_changes_with_any_entry_and_any_order(dtype: torch.dtype) -> None:
    ones = torch.tensor([1, 0, 1, 1, 0, 0, 1, 0])
    changed = [torch.where(torch.arange(8) == position, 1 - ones, ones) for position in range(8)]
    found = digests([each.to(dtype) for each in (ones, ones.flip(0), *changed)])
    assert len(set(found)) == len(found)
    assert digests([ones.to(dtype)]) == found[:1]


def test_a_digest_knows_the_sign_of_zero_and_a_long_tensor() -> None:
    assert len(set(digests([torch.zeros(1), -torch.zeros(1)]))) == 2
    long = torch.zeros(2**22 + 3, dtype=torch.int8)
    early, late = long.clone(), long.clone()
    early[0], late[2**22] = 1, 1  # the first of each chunk
    assert len(set(digests([long, early, late]))) == 3
    assert digests([]) == []


def test_one_process_compares_nothing() -> None:
    class Silent(SingleProcess):
        def gather(self, value: Any) -> Any:
            raise AssertionError

    agree(Silent(), make_model())
