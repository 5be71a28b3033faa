from __future__ import annotations

import dataclasses
import math

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from torch import Tensor

from compressor.quantization.affine import (
    channel_range,
    dequantize,
    fake_quantize,
    parameters_of_range,
    quantize,
)
from compressor.quantization.scheme import ACTIVATION, FLOAT, WEIGHT, Scheme, torch_dtype

LAWS = settings(derandomize=True, deadline=None, max_examples=50)
FloatArray = NDArray[np.float32]

STORED = [Scheme(bits, signed=signed) for bits in (4, 8, 16) for signed in (False, True)]
schemes = st.builds(
    dataclasses.replace,
    st.sampled_from([*STORED, Scheme(3), Scheme(7, signed=True)]),
    symmetric=st.booleans(),
    reduced=st.booleans(),
)
layouts = st.sampled_from([(None, None), (0, None), (1, None), (-1, None), (0, 1), (0, 3), (0, 9)])
# Magnitudes whose steps are normal numbers, and whose squares are too
floats = st.one_of(
    st.just(0.0),
    st.floats(2.0**-60, 2.0**60, width=32),
    st.floats(-(2.0**60), -(2.0**-60), width=32),
)
small = st.floats(-50, 50, width=32)


def tensors(elements: st.SearchStrategy[float]) -> st.SearchStrategy[FloatArray]:
    shapes = hnp.array_shapes(min_dims=2, max_dims=4, min_side=1, max_side=7)
    return hnp.arrays(np.float32, shapes, elements=elements)


def shape_of_parameters(shape: tuple[int, ...], scheme: Scheme) -> tuple[int, ...]:
    if scheme.axis is None:
        return ()
    if scheme.block is None:
        return (shape[scheme.axis],)
    return (shape[0], math.ceil(shape[1] / scheme.block))


def by_onnx(
    x: Tensor, scale: Tensor, zero_point: Tensor, scheme: Scheme
) -> tuple[NDArray[np.int64], FloatArray]:
    """Integers and floats of QuantizeLinear and DequantizeLinear as `onnx.reference` runs them."""
    stored = getattr(TensorProto, scheme.storage.upper())
    step, shift = scale.numpy(), zero_point.numpy()
    attributes = {} if scheme.axis is None else {"axis": scheme.axis % x.dim()}
    if scheme.block is not None:
        # ONNX has blocks of one dimension, and parameters for each entry of the others. Its
        # reference wants whole blocks, so entries with one block have its numbers as their own.
        step, shift = (
            np.broadcast_to(
                np.repeat(part, scheme.block, 1)[:, : x.shape[1]].reshape(
                    *x.shape[:2], *[1] * (x.dim() - 2)
                ),
                x.shape,
            )
            for part in (step, shift)
        )
        size = math.gcd(scheme.block, x.shape[1])
        step, shift = step[:, ::size], shift[:, ::size]
        attributes = {"axis": 1, "block_size": size}
    zeros = helper.make_tensor("zero_point", stored, shift.shape, shift.flatten().tolist())
    graph = helper.make_graph(
        [
            helper.make_node("QuantizeLinear", ["x", "scale", "zero_point"], ["q"], **attributes),
            helper.make_node("DequantizeLinear", ["q", "scale", "zero_point"], ["y"], **attributes),
        ],
        "qdq",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)],
        [
            helper.make_tensor_value_info("q", stored, x.shape),
            helper.make_tensor_value_info("y", TensorProto.FLOAT, x.shape),
        ],
        [numpy_helper.from_array(np.ascontiguousarray(step), "scale"), zeros],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)])
    onnx.checker.check_model(model, full_check=True)
    integers, values = map(np.asarray, ReferenceEvaluator(model).run(None, {"x": x.numpy()}))
    return integers.astype(np.int64), values


def assert_equals_onnx(x: Tensor, scale: Tensor, zero_point: Tensor, scheme: Scheme) -> None:
    integers, values = by_onnx(x, scale, zero_point, scheme)
    ours = quantize(x, scale, zero_point, scheme)
    assert ours.dtype == torch.int32
    np.testing.assert_array_equal(ours.numpy(), integers)
    for floats_of in (
        dequantize(ours, scale, zero_point, scheme),
        fake_quantize(x, scale, zero_point, scheme),
    ):
        assert floats_of.dtype == torch.float32
        # As bytes: so that 0 and -0 differ
        np.testing.assert_array_equal(floats_of.numpy().view(np.int32), values.view(np.int32))


@given(tensors(floats), schemes, layouts)
@LAWS
def test_what_covers_a_tensor_equals_the_onnx_reference_bit_for_bit(
    array: FloatArray, scheme: Scheme, layout: tuple[int | None, int | None]
) -> None:
    scheme = dataclasses.replace(scheme, axis=layout[0], block=layout[1])
    x = torch.from_numpy(array)
    scale, zero_point = parameters_of_range(*channel_range(x, scheme), scheme)
    assert scale.shape == zero_point.shape == shape_of_parameters(x.shape, scheme)
    if scheme.symmetric or dataclasses.replace(scheme, axis=None, block=None) in STORED:
        assert_equals_onnx(x, scale, zero_point, scheme)
    else:  # fewer integers than the type has: ONNX may round an end to one beyond them
        integers = quantize(x, scale, zero_point, scheme).numpy()
        expected, _ = by_onnx(x, scale, zero_point, scheme)
        np.testing.assert_array_equal(integers, expected.clip(scheme.qmin, scheme.qmax))
        assert np.abs(integers - expected).max() <= 1


@given(st.data(), tensors(small), st.sampled_from(STORED), layouts)
@LAWS
def test_any_scale_and_zero_point_equal_the_onnx_reference_bit_for_bit(
    data: st.DataObject,
    array: FloatArray,
    scheme: Scheme,
    layout: tuple[int | None, int | None],
) -> None:
    scheme = dataclasses.replace(scheme, axis=layout[0], block=layout[1])
    shape = shape_of_parameters(array.shape, scheme)
    steps = st.floats(2.0**-16, 4, width=32)
    scale = data.draw(hnp.arrays(np.float32, shape, elements=steps))
    integers = st.integers(scheme.qmin, scheme.qmax)
    zero_point = data.draw(hnp.arrays(np.int32, shape, elements=integers))
    x, steps_of, shifts = (
        torch.from_numpy(np.asarray(part)) for part in (array, scale, zero_point)
    )
    assert_equals_onnx(x, steps_of, shifts, scheme)


def test_ties_go_to_the_even_integer() -> None:
    x = torch.tensor([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5])
    integers = quantize(x, torch.tensor(1.0), torch.tensor(0), Scheme(8, signed=True))
    assert integers.tolist() == [-2, -2, 0, 0, 2, 2]


@given(tensors(st.floats(width=32)))
@LAWS
def test_32_bits_are_the_identity(array: FloatArray) -> None:
    x = torch.from_numpy(array)
    assert fake_quantize(x, torch.tensor(1.0), torch.tensor(0), FLOAT) is x


@given(schemes, floats, floats)
@LAWS
def test_zero_is_exact_and_the_range_is_covered_to_half_a_step(
    scheme: Scheme, a: float, b: float
) -> None:
    low, high = sorted([a, b])
    scale, zero_point = parameters_of_range(torch.tensor(low), torch.tensor(high), scheme)
    step, shift = float(scale), int(zero_point)
    assert step > 0
    assert scheme.qmin <= shift <= scheme.qmax
    assert float(fake_quantize(torch.tensor(0.0), scale, zero_point, scheme)) == 0.0
    # 2^-7 of a step: 65,535 of them in float32 are off by 2^-8 of one
    tolerance = (0.5 + 2**-7) * step
    assert (scheme.qmin - shift) * step <= min(low, 0) + tolerance
    assert (scheme.qmax - shift) * step >= max(high, 0) - tolerance


@given(schemes, floats, floats)
@LAWS
def test_rounding_within_the_range_is_off_by_half_a_step(
    scheme: Scheme, a: float, b: float
) -> None:
    low, high = sorted([min(a, 0), max(b, 0)])
    x = torch.linspace(low, high, 50)
    scale, zero_point = parameters_of_range(torch.tensor(low), torch.tensor(high), scheme)
    error = (fake_quantize(x, scale, zero_point, scheme) - x).abs().max()
    # Two rounded halves at an end: of the value, and of the zero point
    assert float(error) <= (1.0 if low < 0 < high else 0.5 + 2**-7) * float(scale) * (1 + 2**-7)


@given(st.sampled_from([4, 8, 16]), st.booleans(), st.floats(1e-20, 1e20))
@LAWS
def test_a_range_from_zero_ends_within_itself(bits: int, is_signed: bool, high: float) -> None:
    # else a runtime may not leave out the Clip(0, high) before the quantizer
    scheme = Scheme(bits, signed=is_signed)
    low, end = torch.tensor([0.0, high], dtype=torch.double)
    scale, zero_point = parameters_of_range(low, end, scheme)
    assert int(zero_point) == scheme.qmin
    assert high * (1 - 1e-6) <= float(scale) * (scheme.qmax - scheme.qmin) <= high


@given(schemes, floats, floats)
@LAWS
def test_parameters_are_those_of_the_formula(scheme: Scheme, a: float, b: float) -> None:
    low, high = min(a, b, 0.0), max(a, b, 0.0)
    ends = torch.tensor(low).double(), torch.tensor(high).double()
    scale, zero_point = (float(number) for number in parameters_of_range(*ends, scheme))
    if low == high:
        assert (scale, zero_point) == (1.0, scheme.middle if scheme.symmetric else scheme.qmin)
    elif scheme.symmetric:
        levels = (scheme.qmax - scheme.qmin) // 2
        assert scale == pytest.approx(max(-low, high) / levels, rel=1e-6)
        assert zero_point == scheme.qmin + levels
    else:
        assert scale == pytest.approx((high - low) / (scheme.qmax - scheme.qmin), rel=1e-6)
        # In float64, of the float32 scale: rounds to even
        shift = round(scheme.qmin - low / scale)
        assert zero_point == min(max(shift, scheme.qmin), scheme.qmax)


@pytest.mark.parametrize("scheme", [WEIGHT, Scheme(4, axis=0)], ids=["symmetric", "affine"])
def test_a_row_of_zeros_has_steps_too_small_to_be_heard(scheme: Scheme) -> None:
    """Kernels that sum in floats wrote noise of 3 % of a step of 1."""
    ends = torch.tensor([0.0, -1.0]), torch.tensor([0.0, 2.0])
    scale, zero_point = parameters_of_range(*ends, scheme)
    assert 0 < scale[0] < 1e-6 * scale[1]
    rows = fake_quantize(torch.tensor([[0.0], [2.0]]), scale, zero_point, scheme)
    assert rows[0] == 0
    source_scale = torch.tensor(1e-20)  # a bias is stored in steps of both
    assert (source_scale * scale > 0).all()


@pytest.mark.parametrize("scheme", [ACTIVATION, WEIGHT, Scheme(4, symmetric=True)], ids=str)
@pytest.mark.parametrize("largest", [0.0, 1e-45, 1e-40])
def test_what_no_scale_can_say_is_zero(scheme: Scheme, largest: float) -> None:
    scheme = dataclasses.replace(scheme, axis=None)
    scale, zero_point = parameters_of_range(torch.tensor(0.0), torch.tensor(largest), scheme)
    assert scale == 1.0
    assert fake_quantize(torch.tensor(largest), scale, zero_point, scheme) == 0.0


@given(tensors(floats), layouts)
@LAWS
def test_ranges_are_the_extremes_of_what_shares_a_scale(
    array: FloatArray, layout: tuple[int | None, int | None]
) -> None:
    axis, block = layout
    low, high = channel_range(torch.from_numpy(array), Scheme(axis=axis, block=block))
    if axis is None:
        parts = np.array(array.ravel())[None]
    elif block is None:
        parts = np.stack([part.ravel() for part in np.moveaxis(array, axis, 0)])
    else:
        starts = range(0, array.shape[1], block)
        ranges = [
            [(row[i : i + block].min(), row[i : i + block].max()) for i in starts] for row in array
        ]
        assert torch.stack([low, high], -1).tolist() == np.array(ranges).tolist()
        return
    assert low.flatten().tolist() == parts.min(1).tolist()
    assert high.flatten().tolist() == parts.max(1).tolist()


def test_gradient_of_the_input_is_1_within_the_range_and_0_outside() -> None:
    # clamp of torch 2.15 has the gradient 0 at its bounds, and had 1: neither all that rounds to
    # an outermost integer nor the largest weight of a channel may depend on it
    scale, zero_point = torch.tensor(0.5), torch.tensor(3)
    x = torch.tensor([-100.0, -1.8, -1.5, -1.4, 0.1, 5.9, 6.0, 6.3, 9.0], requires_grad=True)
    fake_quantize(x, scale, zero_point, Scheme(4)).sum().backward()  # 4 bits: -1.5 to 6
    assert x.grad is not None
    assert x.grad.tolist() == [0, 0, 1, 1, 1, 1, 1, 0, 0]


@pytest.mark.parametrize(
    "scheme",
    [
        Scheme(4),
        Scheme(3, signed=True, symmetric=True),
        Scheme(4, signed=True, symmetric=True, axis=0),
        Scheme(4, axis=1),
        Scheme(4, signed=True, axis=0, block=2),
    ],
    ids=str,
)
def test_gradient_of_the_scale_is_that_of_the_learned_step_size(scheme: Scheme) -> None:
    generator = torch.Generator().manual_seed(0)
    x = 3 * torch.randn(4, 5, generator=generator)
    weights = torch.randn(4, 5, generator=generator)
    shape = shape_of_parameters((4, 5), scheme)
    scale = torch.rand(shape, generator=generator) / 2 + 0.2
    shift = torch.randint(scheme.qmin + 2, scheme.qmax - 1, shape, generator=generator)
    if scheme.symmetric:
        shift = torch.full(shape, scheme.middle)
    scale.requires_grad_()
    (fake_quantize(x, scale, shift, scheme) * weights).sum().backward()

    expected = torch.zeros(shape)
    clamped = 0
    for i in range(4):
        for j in range(5):
            places = {None: (), 0: (i,), 1: (j,)}[scheme.axis]
            if scheme.block:
                places = (i, j // scheme.block)
            step, zero = scale[places].item(), shift[places].item()
            v = x[i, j].item() / step
            # Esser et al., equation 3, with -Q_N and Q_P counted from the zero point
            least, most = scheme.qmin - zero, scheme.qmax - zero
            slope = least if v <= least else most if v >= most else round(v) - v
            clamped += not least < v < most
            expected[places] += slope * weights[i, j].item()
    assert 0 < clamped < 20
    assert scale.grad is not None
    wanted = pytest.approx(expected.flatten().tolist(), rel=1e-4, abs=1e-5)
    assert scale.grad.flatten().tolist() == wanted


@pytest.mark.parametrize("scheme", [*STORED, Scheme(5), Scheme(12, signed=True)], ids=str)
def test_integers_fit_their_types(scheme: Scheme) -> None:
    limits = torch.iinfo(torch_dtype(scheme))
    assert limits.min <= scheme.qmin < scheme.qmax <= limits.max
    assert scheme.qmax - scheme.qmin + 1 == 2**scheme.bits
    assert int(scheme.storage.removeprefix("u").removeprefix("int")) >= scheme.bits


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("bits", [2, 4, 8, 16])
def test_every_integer_of_a_symmetric_scheme_has_its_opposite(bits: int, signed: bool) -> None:
    scheme = Scheme(bits, signed=signed, symmetric=True)
    assert scheme.qmax - scheme.middle == scheme.middle - scheme.qmin


@pytest.mark.parametrize("bits", [1, 17, 31, 0, -8])
def test_other_bits_are_refused(bits: int) -> None:
    with pytest.raises(ValueError, match=f"bits={bits} is not 2 to 16"):
        Scheme(bits)


@pytest.mark.parametrize(("block", "axis"), [(0, 0), (32, None), (32, 1)])
def test_blocks_without_rows_are_refused(block: int, axis: int | None) -> None:
    with pytest.raises(ValueError, match=f"block={block} with axis={axis}"):
        Scheme(4, block=block, axis=axis)
