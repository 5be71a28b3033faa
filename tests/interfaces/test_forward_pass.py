from __future__ import annotations

from collections import OrderedDict, UserDict, namedtuple
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compressor.errors import ConfigError, DataError
from compressor.interfaces.device import Device
from compressor.interfaces.forward_pass import ForwardPass, TorchForwardPass, random_like
from compressor.seeding import generator

Pair = namedtuple("Pair", ["left", "right"])
A, B, C, D, E = (torch.full((2, 3), float(value)) for value in range(5))


class Recorder(nn.Module):
    """Returns what it is called with."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return args, kwargs


@pytest.mark.parametrize(
    ("pattern", "batch", "called_with"),
    [
        (None, (A, B), (A,)),
        ((0, "_"), [A, B], (A,)),
        ((1, 0, "_", 2), (A, B, C, D), (B, A, D)),
        ((0, "_", 1, "_", "_"), (A, B, C, D, E), (A, C)),
        ((0,), A, (A,)),
        ((0,), {"x": A}, ({"x": A},)),
        (("_",), (A, B), ()),
        (("_", "_"), (A, B), ()),
    ],
)
def test_the_number_at_a_place_is_the_place_of_the_argument(
    pattern: Any, batch: Any, called_with: Any
) -> None:
    args, kwargs = TorchForwardPass(pattern).perform(Recorder(), batch, Device.CPU)
    assert kwargs == {}
    assert repr(args) == repr(called_with)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ((0, "x"), "contains 'x'"),
        ((0, 1.0), "contains 1.0"),
        ((True, "_"), "contains True"),
        ((0, 0), r"names the arguments \[0, 0\]. Number them \[0, 1\]"),
        ((0, 2), r"Number them \[0, 1\]"),
        ((-1, 0), r"names the arguments \[-1, 0\]"),
        ((), "is not a tuple"),
        ("0_", "is not a tuple"),
        (0, "is not a tuple"),
    ],
)
def test_a_pattern_that_cannot_be_meant_is_a_type_error(pattern: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message) as caught:
        TorchForwardPass(pattern)
    assert isinstance(caught.value, ConfigError)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ((A, B, C), r"The batch has 3 elements, and model_input_pattern=\(0, '_'\) has 2"),
        (A, "The batch is a Tensor, and"),
        ({"x": A, "y": B}, r"The batch is a dict with the keys \['x', 'y'\]"),
    ],
)
def test_a_batch_that_does_not_fit_is_a_value_error(batch: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        TorchForwardPass((0, "_")).perform(Recorder(), batch, "cpu")
    assert isinstance(caught.value, DataError)


def test_uncommon_inputs_need_own_random_ones() -> None:
    with pytest.raises(TypeError, match="no create_random_model_inputs"):
        TorchForwardPass((0, "_"), expecting_common_inputs=False)


class OldStyle(ForwardPass):
    """As the documents show it, on the base class, with all four methods."""

    def __init__(self) -> None:
        super().__init__(model_input_pattern=None, expecting_common_inputs=False)

    def model_call(self, model: Any, x: Any, device: Device) -> Any:
        assert device == Device.CPU
        x, z = x
        return model(x.cpu(), z.cpu())

    def create_random_model_inputs(self, batch_size: int) -> Any:
        shapes = self.get_model_input_shapes()
        return torch.rand(batch_size, *shapes[0]), torch.rand(batch_size, *shapes[1])

    def extract_model_inputs(self, batch: Any) -> Any:
        x, _, z = batch
        return x, z

    def get_model_input_shapes(self) -> tuple[tuple[int, ...], ...]:
        return (3, 8, 8), (10,)


def test_all_methods_may_be_the_users() -> None:
    forward_pass = OldStyle()
    forward_pass.infer_sampler((A, B, C))
    (x, z), _ = forward_pass.perform(Recorder(), (A, B, C), "cpu")
    assert torch.equal(x, A)
    assert torch.equal(z, C)
    (x, z), _ = forward_pass.random_perform(Recorder(), 4, "cpu")
    assert (x.shape, z.shape) == ((4, 3, 8, 8), (4, 10))


class Forgetful(TorchForwardPass):
    """Does not call `super().__init__()`."""

    def __init__(self) -> None:
        self.mine = 1

    def extract_model_inputs(self, batch: Any) -> Any:
        return {"a": batch["image"], "b": batch["mask"]}


def test_a_subclass_may_forget_to_call_init() -> None:
    forward_pass = Forgetful()
    batch = {"image": A, "mask": B, "label": C}
    args, kwargs = forward_pass.perform(Recorder(), batch, Device.CPU)
    assert args == ()
    assert kwargs.keys() == {"a", "b"}
    assert forward_pass.model_input_pattern == (0, "_")
    assert forward_pass.expecting_common_inputs
    forward_pass.infer_sampler(batch)
    assert forward_pass.get_model_input_shapes() == ((3,), (3,))


def test_a_single_tensor_may_be_extracted() -> None:
    class Whole(TorchForwardPass):
        def extract_model_inputs(self, batch: Any) -> Any:
            return batch["x"]

    args, _ = Whole().perform(Recorder(), {"x": A}, "cpu")
    assert torch.equal(args[0], A)


def nested_batch(size: int = 4) -> tuple[Any, Tensor]:
    inputs = {
        "image": torch.rand(size, 3, 2, dtype=torch.float16) + 2,
        "deep": [(torch.randint(5, 9, (size, 7)), {"mask": torch.rand(size, 2) < 0.5})],
        "spectrum": torch.rand(size, 2, dtype=torch.complex64),
        "pair": Pair(torch.full((size,), -3, dtype=torch.int8), OrderedDict(y=torch.rand(size))),
        "anchors": torch.tensor([1.0, 2.0, 3.0]),
        "scale": torch.tensor(0.5),
        "user": UserDict(ids=torch.randint(0, 3, (size, 2), dtype=torch.uint8)),
        "name": "night",
        "nothing": None,
    }
    return inputs, torch.zeros(size)


def test_random_inputs_are_like_the_sample_at_any_depth() -> None:
    forward_pass = TorchForwardPass((0, "_"))
    batch = nested_batch()
    forward_pass.infer_sampler(batch)
    (drawn,) = forward_pass.create_random_model_inputs(9)
    sample = batch[0]
    assert drawn["image"].shape == (9, 3, 2)
    assert drawn["image"].dtype == torch.float16
    assert sample["image"].min() <= drawn["image"].min() <= drawn["image"].max()
    assert drawn["image"].max() <= sample["image"].max()
    numbers, inner = drawn["deep"][0]
    assert numbers.shape == (9, 7)
    assert set(numbers.unique().tolist()) <= {5, 6, 7, 8}
    assert inner["mask"].dtype == torch.bool
    assert inner["mask"].shape == (9, 2)
    assert drawn["spectrum"].dtype == torch.complex64
    assert drawn["spectrum"].shape == (9, 2)
    assert isinstance(drawn["pair"], Pair)
    assert drawn["pair"].left.tolist() == [-3] * 9
    assert isinstance(drawn["pair"].right, OrderedDict)
    assert drawn["anchors"].tolist() == [1, 2, 3]
    assert drawn["scale"].item() == 0.5
    assert isinstance(drawn["user"], UserDict)
    assert drawn["user"]["ids"].dtype == torch.uint8
    assert drawn["user"]["ids"].max() < 3
    assert (drawn["name"], drawn["nothing"]) == ("night", None)


def test_random_inputs_are_the_same_each_time_and_draw_from_no_global_generator() -> None:
    forward_pass = TorchForwardPass((0, "_"))
    forward_pass.infer_sampler((A + torch.rand(2, 3), B))
    before = torch.get_rng_state()
    (first,), (second,) = (forward_pass.create_random_model_inputs(2) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(before, torch.get_rng_state())


def test_shapes_have_no_batch_axis() -> None:
    forward_pass = TorchForwardPass((1, "_", 0))
    forward_pass.infer_sampler((torch.zeros(4, 3, 8, 8), torch.zeros(4), torch.zeros(4, 10)))
    assert forward_pass.get_model_input_shapes() == ((10,), (3, 8, 8))


def test_the_sample_is_a_copy() -> None:
    x = torch.zeros(2, 3)
    forward_pass = TorchForwardPass()
    forward_pass.infer_sampler((x, B))
    x.fill_(100)
    assert forward_pass.create_random_model_inputs(1)[0].max() <= 1


def test_shapes_are_unknown_before_the_first_batch() -> None:
    with pytest.raises(DataError, match=r"Call infer_sampler\(batch\)"):
        TorchForwardPass().create_random_model_inputs(1)


@pytest.mark.parametrize(
    "dtype",
    [
        *(torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16, torch.bool),
        *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64),
    ],
)
def test_every_type_can_be_drawn(dtype: torch.dtype) -> None:
    drawn = random_like(torch.ones(2, 2).to(dtype), (5, 2), generator(0))
    assert drawn.dtype == dtype
    assert drawn.shape == (5, 2)


def test_whole_numbers_are_drawn_uniformly() -> None:
    drawn = random_like(torch.tensor([2, 5]), (4000,), generator(0))
    counts = torch.bincount(drawn, minlength=6)
    assert counts[:2].sum() == 0
    assert (counts[2:] - 1000).abs().max() < 150  # 5 standard deviations


def test_a_sample_without_a_range_is_drawn_from_zero_to_one() -> None:
    for sample in (torch.tensor([float("nan")]), torch.tensor([float("inf"), 0]), torch.empty(0)):
        drawn = random_like(sample, (100,), generator(0))
        assert 0 <= drawn.min() < drawn.max() <= 1
