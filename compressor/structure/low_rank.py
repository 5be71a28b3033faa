"""Low-rank factors of a layer's weight: pure functions of tensors, computed in float64.

SVD, in the metric of the layer's inputs if their second moment is known, Tucker-2 (Kim et al. 2016,
1511.06530) and the two one-dimensional convolutions of Jaderberg et al. 2014 (1405.3866). At full
rank each gives the weight back.

The rank-r approximation of W that is nearest in its outputs W X projects them on their r principal
directions (Eckart and Young, 1936): W_r = U Uᵀ W, with U the leading eigenvectors of W (X Xᵀ) Wᵀ.
So nothing is inverted, and a moment may be singular.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from compressor.errors import SurgeryError

SWEEPS = 3  # of HOOI; further ones change the error in the fourth digit
RIDGE = 1e-6  # of the mean variance: a singular moment still has a Cholesky factor
NO_SCALE = 1e-150  # a component that is zero is left as it is


class Tucker(NamedTuple):
    """The factors of `tucker2`.

    Attributes:
        outer: (out, r0).
        core: (r0, r1, *kernel).
        inner: (r1, in).
    """

    outer: Tensor
    core: Tensor
    inner: Tensor


def truncate(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Best rank-`rank` factors of a matrix (Eckart and Young, 1936).

    Args:
        weight: (out, in).
        rank: 1 to min(out, in). Worth it below out * in / (out + in).

    Returns:
        `u` (out, rank) and `v` (rank, in); `u @ v` is nearest to `weight` in the Frobenius norm.
        Components come by falling weight and are split evenly: the first r of `u` and `v` are the
        factors of rank r.

    Raises:
        SurgeryError: if `rank` is out of range.

    >>> u, v = truncate(torch.eye(4), rank=4)
    >>> torch.allclose(u @ v, torch.eye(4))
    True
    """
    return whitened_svd(weight, rank, None)


def whitened_svd(weight: Tensor, rank: int, moment: Tensor | None) -> tuple[Tensor, Tensor]:
    """The factors of rank `rank` whose outputs are nearest to those of `weight` on known inputs.

    Args:
        weight: (out, in).
        rank: 1 to min(out, in).
        moment: (in, in), the sum or mean of x xᵀ over the inputs x, as of `second_moment`; None
            takes them as white, which is `truncate`.

    Returns:
        `u` (out, rank) and `v` (rank, in), as of `truncate`; for the inputs X of `moment`,
        ‖(weight - u v) X‖ is least.

    Raises:
        SurgeryError: if `rank` is out of range.
    """
    _check_rank(rank, min(weight.shape), "the matrix", weight)
    exact = weight.double()
    if len(exact) <= exact.shape[1]:
        metric = exact if moment is None else exact @ _regular(moment)
        basis = _leading(metric @ exact.T, rank)
    else:  # the same subspace from the smaller side: the range of W L V, with L Lᵀ the moment
        spread = exact if moment is None else exact @ _root(moment)
        basis = torch.linalg.qr(spread @ _leading(spread.T @ spread, rank)).Q
    u, v = _split_evenly(basis, basis.T @ exact)
    return u.to(weight.dtype), v.to(weight.dtype)


def spatial_svd(weight: Tensor, rank: int, moment: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Two one-dimensional convolutions for one: down the height, then along the width.

    Args:
        weight: (out, in, height, width).
        rank: channels between the two, 1 to min(out * width, in * height).
        moment: (in * height, in * height), of the input's vertical patches. Patches of different
            columns are taken as uncorrelated.

    Returns:
        `across` (out, rank, 1, width) and `down` (rank, in, height, 1), which comes first.

    Raises:
        SurgeryError: if `rank` is out of range.
    """
    outputs, inputs, height, width = weight.shape
    matrix = weight.permute(0, 3, 1, 2).reshape(outputs * width, inputs * height)
    u, v = whitened_svd(matrix, rank, moment)
    across = u.view(outputs, width, rank).permute(0, 2, 1).unsqueeze(2).contiguous()
    return across, v.view(rank, inputs, height, 1)


def tucker2(
    weight: Tensor, ranks: Sequence[int], moment: Tensor | None = None, *, sweeps: int = SWEEPS
) -> Tucker:
    """Factors of a convolution in its output and its input channels.

    The start is the truncated HOSVD, each sweep of HOOI refits one side to the other (De Lathauwer
    et al. 2000).

    Args:
        weight: (out, in, *kernel).
        ranks: of the output and of the input channels.
        moment: (in, in), of the input channels. Positions of the kernel are taken as uncorrelated.
        sweeps: of HOOI; 0 is the HOSVD.

    Raises:
        SurgeryError: if a rank is out of range.
    """
    for side, rank in enumerate(ranks):
        _check_rank(rank, weight.shape[side], ("the outputs", "the inputs")[side], weight)
    exact = weight.double().flatten(2)
    is_whitened = moment is not None and ranks[1] < weight.shape[1]
    root = _root(moment) if is_whitened and moment is not None else None
    scaled = exact if root is None else torch.einsum("oik,ij->ojk", exact, root)
    inner = _mode_basis(scaled, 1, ranks[1])
    outer = _mode_basis(scaled, 0, ranks[0])
    for _ in range(sweeps):
        outer = _mode_basis(torch.einsum("oik,ir->ork", scaled, inner), 0, ranks[0])
        inner = _mode_basis(torch.einsum("oik,or->rik", scaled, outer), 1, ranks[1])
    core = torch.einsum("oik,op,iq->pqk", scaled, outer, inner)
    rows = inner.T
    if root is not None:  # back from the white inputs; the rows' lengths go into the core
        rows = torch.linalg.solve_triangular(root, rows, upper=False, left=False)
        lengths = rows.norm(dim=1)
        rows, core = rows / lengths[:, None], core * lengths[:, None]
    core = core.view(*ranks, *weight.shape[2:])
    return Tucker(*(factor.to(weight.dtype).contiguous() for factor in (outer, core, rows)))


def second_moment(rows: Tensor) -> Tensor:
    """Mean of x xᵀ over the rows, shrunk towards a multiple of the identity: (n, in) -> (in, in).

    The fewer rows there are for their length, the more: in / (in + n) of it is the identity. What
    few samples do not show is then not taken for absent. See Ledoit and Wolf (2004).
    """
    count, size = rows.shape
    wide = rows if rows.dtype == torch.float64 else rows.float()
    moment = (wide.T @ wide).double() / max(count, 1)
    share = size / (size + count)
    level = moment.diagonal().mean()
    moment *= 1 - share
    moment.diagonal().add_(share * level)
    return moment


def _check_rank(rank: int, most: int, side: str, weight: Tensor) -> None:
    if not 1 <= rank <= most:
        raise SurgeryError(
            f"rank={rank} is out of range for {side} of a weight {tuple(weight.shape)}. "
            f"Give a number from 1 to {most}."
        )


def _leading(gram: Tensor, rank: int) -> Tensor:
    """The eigenvectors of the largest eigenvalues, largest first: (n, n) -> (n, rank)."""
    symmetric = (gram + gram.T) / 2
    vectors: Tensor = torch.linalg.eigh(symmetric).eigenvectors
    return vectors[:, -rank:].flip(1)


def _regular(moment: Tensor) -> Tensor:
    """`moment` with a small ridge: of inputs that are all zero, a multiple of the identity."""
    exact = moment.double().clone()
    exact.diagonal().add_(RIDGE * exact.diagonal().mean().clamp_min(NO_SCALE))
    return exact


def _root(moment: Tensor) -> Tensor:
    """A lower triangular L with L Lᵀ = `moment`."""
    root: Tensor = torch.linalg.cholesky(_regular(moment))
    return root


def _mode_basis(tensor: Tensor, mode: int, rank: int) -> Tensor:
    unfolded = tensor.movedim(mode, 0).flatten(1)
    return _leading(unfolded @ unfolded.T, rank)


def _split_evenly(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Give both sides of each component the same length: both train alike under weight decay."""
    lengths = u.norm(dim=0) * v.norm(dim=1)
    half = lengths.sqrt().clamp_min(NO_SCALE)
    ratio = torch.where(lengths > NO_SCALE, half / u.norm(dim=0), 1.0)
    return u * ratio, v / ratio[:, None]
