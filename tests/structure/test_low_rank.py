"""Low-rank factors against torch's own SVD, and against laws."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from compressor.errors import SurgeryError
from compressor.structure.low_rank import (
    second_moment,
    spatial_svd,
    truncate,
    tucker2,
    whitened_svd,
)


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def correlated(rows: int, size: int, seed: int = 1) -> Tensor:
    """Rows whose directions differ in variance by 10⁴."""
    turn = torch.linalg.qr(draw(size, size, seed=seed)).Q
    return draw(rows, size, seed=seed + 1) * torch.logspace(0, -2, size).double() @ turn


@pytest.mark.parametrize("shape", [(8, 5), (5, 8), (6, 6)])
@pytest.mark.parametrize("rank", [1, 3, 5])
def test_a_truncated_matrix_is_as_near_as_eckart_and_young_allow(
    shape: tuple[int, int], rank: int
) -> None:
    weight = draw(*shape)
    u, v = truncate(weight, rank)
    assert (u.shape, v.shape) == ((shape[0], rank), (rank, shape[1]))
    least = torch.linalg.svdvals(weight)[rank:].square().sum().sqrt()
    torch.testing.assert_close((weight - u @ v).norm(), least, rtol=1e-10, atol=1e-12)


def test_the_first_components_are_the_factors_of_a_lower_rank() -> None:
    weight = draw(7, 9)
    u, v = truncate(weight, 5)
    fewer_u, fewer_v = truncate(weight, 2)
    torch.testing.assert_close(u[:, :2] @ v[:2], fewer_u @ fewer_v)
    torch.testing.assert_close(u.norm(dim=0), v.norm(dim=1))


@pytest.mark.parametrize("shape", [(8, 5), (5, 8)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_at_full_rank_nothing_is_lost_whatever_the_inputs_are(
    shape: tuple[int, int], dtype: torch.dtype, tolerance: float
) -> None:
    weight = draw(*shape, dtype=dtype)
    moments = [None, torch.zeros(shape[1], shape[1]), second_moment(correlated(3, shape[1]))]
    for moment in moments:
        u, v = whitened_svd(weight, 5, moment)
        assert u.dtype == dtype
        assert (u @ v - weight).norm() <= tolerance * weight.norm()


@pytest.mark.parametrize("shape", [(12, 8), (8, 12)])
@pytest.mark.parametrize("rank", [1, 4, 7])
def test_on_correlated_inputs_whitening_is_nearer_than_plain_svd(
    shape: tuple[int, int], rank: int
) -> None:
    weight, rows = draw(*shape), correlated(200, shape[1])
    plain, whitened = (
        rows @ (weight - u @ v).T
        for u, v in (truncate(weight, rank), whitened_svd(weight, rank, second_moment(rows)))
    )
    assert whitened.norm() < 0.95 * plain.norm()


@pytest.mark.parametrize("count", [1, 3, 8, 50])
@pytest.mark.parametrize("seed", range(5))
def test_on_any_inputs_whitening_is_never_farther(count: int, seed: int) -> None:
    """Also where there are fewer samples than directions."""
    weight, rows = draw(9, 8, seed=seed), draw(count, 8, seed=seed + 10)
    for rank in range(1, 8):
        plain, whitened = (
            float((rows @ (weight - u @ v).T).norm())
            for u, v in (truncate(weight, rank), whitened_svd(weight, rank, second_moment(rows)))
        )
        assert whitened <= plain * (1 + 1e-9) + 1e-12


def test_with_many_samples_the_outputs_are_as_near_as_any_rank_allows() -> None:
    """The bound is Eckart and Young's for the outputs themselves, as torch's SVD gives it."""
    weight, rows = draw(8, 6), correlated(20_000, 6)
    u, v = whitened_svd(weight, 3, second_moment(rows))
    outputs = rows @ weight.T
    least = torch.linalg.svdvals(outputs)[3:].square().sum().sqrt()
    torch.testing.assert_close((outputs - rows @ (u @ v).T).norm(), least, rtol=1e-3, atol=0)


def test_a_second_moment_is_the_mean_of_products_shrunk_towards_white() -> None:
    rows = draw(30, 4)
    by_hand = torch.stack([torch.outer(row, row) for row in rows]).mean(0)
    level = by_hand.trace() / 4
    expected = 30 / 34 * by_hand + 4 / 34 * level * torch.eye(4)
    torch.testing.assert_close(second_moment(rows), expected)


@pytest.mark.parametrize("kernel", [(3,), (3, 3), (2, 3), (2, 2, 2)])
@pytest.mark.parametrize("is_whitened", [False, True])
def test_tucker_at_full_rank_is_the_convolution(kernel: tuple[int, ...], is_whitened: bool) -> None:
    weight = draw(6, 5, *kernel)
    moment = second_moment(correlated(50, 5)) if is_whitened else None
    outer, core, inner = tucker2(weight, (6, 5), moment)
    product = torch.einsum("op,pq...,qi->oi...", outer, core, inner)
    assert (product - weight).norm() <= 1e-12 * weight.norm()


def test_tucker_errs_between_the_bounds_of_its_modes_and_sweeps_help() -> None:
    """De Lathauwer: at least the tail of each mode alone, at most of both together."""
    weight = draw(8, 7, 3, 3)
    tails = [
        torch.linalg.svdvals(weight.movedim(mode, 0).flatten(1))[rank:].square().sum()
        for mode, rank in enumerate((3, 4))
    ]
    errors = []
    for sweeps in (0, 3):
        outer, core, inner = tucker2(weight, (3, 4), sweeps=sweeps)
        product = torch.einsum("op,pqhw,qi->oihw", outer, core, inner)
        errors.append((product - weight).square().sum())
    assert max(tails) <= errors[1] < errors[0] <= sum(tails)


def test_tucker_has_the_shapes_of_a_chain_of_convolutions() -> None:
    weight, x = draw(6, 5, 3, 3), draw(2, 5, 8, 8, seed=1)
    outer, core, inner = tucker2(weight, (4, 3))
    product = torch.einsum("op,pqhw,qi->oihw", outer, core, inner)
    chain = F.conv2d(F.conv2d(F.conv2d(x, inner[..., None, None]), core), outer[..., None, None])
    torch.testing.assert_close(chain, F.conv2d(x, product))


def output_error(weight: Tensor, product: Tensor, x: Tensor) -> float:
    return float(F.conv2d(x, weight - product).norm())


def channels_correlated() -> Tensor:
    """(4, 8, 12, 12), pixels independent of each other."""
    return correlated(4 * 144, 8).view(4, 12, 12, 8).permute(0, 3, 1, 2)


def test_tucker_in_the_metric_of_the_channels_is_nearer_on_such_inputs() -> None:
    weight, x = draw(8, 8, 3, 3), channels_correlated()
    moment = second_moment(x.permute(0, 2, 3, 1).reshape(-1, 8))
    products = [
        torch.einsum("op,pqhw,qi->oihw", *tucker2(weight, (5, 4), metric))
        for metric in (None, moment)
    ]
    plain, whitened = (output_error(weight, product, x) for product in products)
    assert whitened < 0.9 * plain


@pytest.mark.parametrize("shape", [(6, 4, 3, 3), (4, 6, 5, 2), (3, 5, 2, 3)])
def test_two_one_dimensional_convolutions_at_full_rank_are_the_square_one(
    shape: tuple[int, int, int, int],
) -> None:
    weight, x = draw(*shape), draw(2, shape[1], 7, 6, seed=1)
    across, down = spatial_svd(weight, min(shape[0] * shape[3], shape[1] * shape[2]))
    assert (across.shape[2], down.shape[3]) == (1, 1)
    chain = F.conv2d(F.conv2d(x, down), across)
    torch.testing.assert_close(chain, F.conv2d(x, weight), rtol=1e-11, atol=1e-11)


def test_spatial_svd_is_the_truncation_of_its_matrix() -> None:
    weight = draw(6, 4, 3, 3)
    across, down = spatial_svd(weight, 5)
    product = torch.einsum("orw,rih->oihw", across[:, :, 0], down[..., 0])
    matrix = weight.permute(1, 2, 0, 3).reshape(12, 18)
    least = torch.linalg.svdvals(matrix)[5:].square().sum().sqrt()
    torch.testing.assert_close((weight - product).norm(), least)


def test_spatial_svd_in_the_metric_of_its_patches_is_nearer() -> None:
    weight, x = draw(8, 8, 3, 3), channels_correlated()
    patches = x.unfold(2, 3, 1).permute(0, 2, 3, 1, 4).reshape(-1, 24)
    products = [
        torch.einsum("orw,rih->oihw", across[:, :, 0], down[..., 0])
        for across, down in (spatial_svd(weight, 8), spatial_svd(weight, 8, second_moment(patches)))
    ]
    plain, whitened = (output_error(weight, product, x) for product in products)
    assert whitened < 0.9 * plain


def test_a_weight_of_zeros_has_factors_of_zeros() -> None:
    u, v = truncate(torch.zeros(4, 3), 2)
    assert not (u @ v).any()
    assert u.isfinite().all()
    assert v.isfinite().all()
    assert all(factor.isfinite().all() for factor in tucker2(torch.zeros(4, 3, 2), (2, 2)))


@pytest.mark.parametrize("rank", [0, 4])
def test_a_rank_out_of_range_is_refused(rank: int) -> None:
    with pytest.raises(SurgeryError, match=f"rank={rank} .* from 1 to 3"):
        truncate(torch.ones(3, 5), rank)
    with pytest.raises(SurgeryError, match=f"rank={rank} is out of range for the inputs"):
        tucker2(torch.ones(5, 3, 2, 2), (2, rank))
