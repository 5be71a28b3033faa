"""What is packed comes back bit for bit, and takes the bytes that are promised."""

from __future__ import annotations

from math import ceil, log2, prod

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compressor.errors import CheckpointError
from compressor.structure import packing
from compressor.structure.packing import pack, packed_bits, stored_bits, unpack

DTYPES = (
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.complex64,
    torch.complex128,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.uint8,
    torch.uint16,
    torch.uint32,
    torch.uint64,
    torch.bool,
)


def raw(tensor: Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def total_bytes(parts: dict[str, Tensor]) -> int:
    return sum(part.nbytes for part in parts.values())


def weights(size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    """Of random bytes, so with NaN of all kinds, infinities and both zeros; often repeated."""
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(0, 40), max_size=3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    width = torch.empty(0, dtype=dtype).element_size()
    high = 2 if dtype == torch.bool else 256
    values = draw(st.sampled_from([1, 2, 3, 17, 256, 300, 10**4]))
    palette = torch.randint(0, high, (values, width), dtype=torch.uint8, generator=generator)
    chosen = torch.randint(0, values, (prod(shape),), generator=generator)
    entries = palette[chosen]
    is_zero = torch.rand(prod(shape), generator=generator) < draw(st.sampled_from([0.0, 0.5, 0.95]))
    entries[is_zero] = 0
    return entries.flatten().view(dtype).reshape(shape)


@settings(max_examples=150, deadline=None)
@given(tensors())
def test_every_bit_comes_back(tensor: Tensor) -> None:
    parts = pack("a.b", tensor)
    founds = [parts]
    if tensor.dtype != torch.complex128:  # which no safetensors file takes
        founds.append(safetensors.torch.load(safetensors.torch.save(parts)))
    for found in founds:
        (name, back), *others = unpack(found).items()
        assert not others
        assert name == "a.b"
        assert back.dtype == tensor.dtype
        assert back.shape == tensor.shape
        assert raw(back) == raw(tensor)
    assert total_bytes(parts) <= tensor.nbytes


def test_minus_zero_is_a_value_and_every_nan_its_own() -> None:
    bits = [0x7FC00000, 0x7FC00001, -0x80000000, 0] * 300
    tensor = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    parts = pack("w", tensor)
    assert len(parts) > 1
    assert unpack(parts)["w"].view(torch.int32).tolist() == bits


def test_a_sparse_tensor_takes_a_bit_an_entry_and_its_values() -> None:
    tensor = weights(1003)
    tensor[torch.arange(1003) % 4 != 0] = 0
    nonzero = int((tensor != 0).sum())
    parts = pack("w", tensor)
    assert sorted(parts) == ["w..mask.1003", "w..values"]
    assert total_bytes(parts) == ceil(1003 / 8) + 4 * nonzero
    assert 8 * total_bytes(parts) == packed_bits(1003, 32, nonzero=nonzero)


@pytest.mark.parametrize("distinct", [2, 3, 16, 17, 200, 256])
def test_few_values_take_an_index_an_entry_and_the_palette(distinct: int) -> None:
    tensor = weights(distinct)[torch.arange(5001) % distinct]
    parts = pack("w", tensor)
    assert sorted(parts) == ["w..indices.5001", "w..palette"]
    assert total_bytes(parts) == ceil(log2(distinct)) * ceil(5001 / 8) + 4 * distinct
    assert 8 * total_bytes(parts) == packed_bits(5001, 32, distinct=distinct)


def test_a_sparse_palette_takes_both() -> None:
    tensor = weights(16)[torch.arange(4000) % 16] * (torch.arange(4000) % 3 == 0)
    tensor = tensor + 0.0  # no -0.0
    nonzero = int((tensor != 0).sum())
    parts = pack("w", tensor)
    assert sorted(parts) == ["w..indices.", "w..mask.4000", "w..palette"]
    assert total_bytes(parts) == 500 + 4 * ceil(nonzero / 8) + 64
    assert 8 * total_bytes(parts) == packed_bits(4000, 32, nonzero=nonzero, distinct=16)


def test_a_constant_takes_its_value_alone() -> None:
    assert total_bytes(pack("w", torch.full((100, 100), 0.1))) == 4


def test_what_would_not_get_smaller_stays_as_it_is() -> None:
    for tensor in (weights(1000), torch.zeros(8), torch.tensor(3), torch.empty(0, 4)):
        assert list(pack("w", tensor)) == ["w"]


def test_values_that_come_late_are_no_palette(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "SAMPLE", 100)
    tensor = torch.cat([torch.ones(100), weights(2000)])
    assert list(pack("w", tensor)) == ["w"]
    assert raw(unpack(pack("w", tensor))["w"]) == raw(tensor)


@pytest.mark.parametrize(("gone", "values"), [(0.5, 0), (0.9, 0), (0.0, 4), (0.0, 256), (0.75, 16)])
def test_the_bits_an_entry_are_those_of_a_file(gone: float, values: int) -> None:
    size = 40_000
    tensor = weights(values)[torch.arange(size) % values] if values else weights(size)
    tensor[: round(gone * size)] = 0
    form = ({"nonzero": size - round(gone * size)} if gone else {}) | (
        {"distinct": values} if values else {}
    )
    file_bytes = len(safetensors.torch.save(pack("layer.weight", tensor)))
    assert stored_bits(size, 32, **form) == pytest.approx(8 * file_bytes / size, rel=0.01)


def test_bits_are_never_more_than_those_of_the_entries() -> None:
    assert stored_bits(10, 32, nonzero=10) == 32.0


def test_tensors_of_several_calls_are_unpacked_together() -> None:
    parts = pack("a", torch.eye(100)) | pack("b", weights(5))
    assert list(unpack(parts)) == ["b", "a"]
    assert unpack(parts)["a"].equal(torch.eye(100))


def test_a_name_that_looks_like_a_part_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"'a\.\.mask'"):
        pack("a..mask", torch.ones(2))


@pytest.mark.parametrize("key", ["w..mask.100x100", "w..palette"])
def test_missing_or_shortened_parts_are_refused(key: str) -> None:
    tensor = torch.eye(100) + 2 * torch.eye(100).roll(1)
    parts = pack("w", tensor)
    assert key in parts
    shortened = parts | {key: parts[key][..., :1]}
    missing = {name: part for name, part in parts.items() if name != key}
    for damaged in (shortened, missing):
        with pytest.raises(CheckpointError, match="'w' is damaged"):
            unpack(damaged)
