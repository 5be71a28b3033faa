from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

from compressor.errors import DataError, ModelError
from compressor.interfaces.inputs import ModelInputs
from compressor.quantization import calibrate as module
from compressor.quantization.calibrate import calibrate
from compressor.quantization.ranges import Range


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """output = log(input), with an inner value 'root' = sqrt(input)."""
    graph = helper.make_graph(
        [
            helper.make_node("Sqrt", ["input"], ["root"]),
            helper.make_node("Mul", ["root", "root"], ["square"]),
            helper.make_node("Log", ["square"], ["output"]),
        ],
        "roots",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 2])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, ["batch", 2])],
    )
    opset = helper.make_opsetid("", 20)
    onnx.save(helper.make_model(graph, opset_imports=[opset], ir_version=10), tmp_path / "m.onnx")
    return tmp_path / "m.onnx"


def batch(*rows: tuple[float, float]) -> ModelInputs:
    return ModelInputs((torch.tensor(rows, dtype=torch.float32),))


def test_ranges_are_over_all_batches_for_inputs_inner_values_and_outputs(path: Path) -> None:
    ranges = calibrate(path, [batch((4, 9), (16, 1)), batch((25, 2))], ["input", "root", "output"])
    assert ranges["input"] == Range(1.0, 25.0)
    assert ranges["root"] == Range(1.0, 5.0)
    assert ranges["output"] == pytest.approx((0.0, np.log(25)), abs=1e-6)


def test_both_methods_agree_where_there_is_no_outlier(path: Path) -> None:
    values = torch.linspace(1, 4, 4000).reshape(-1, 2)
    by_range = calibrate(path, [ModelInputs((values,))], ["root"])
    by_share = calibrate(path, [ModelInputs((values,))], ["root"], method="percentile")
    assert by_share["root"] == pytest.approx(by_range["root"], abs=0.01)


def test_one_batch_is_asked_for_at_a_time_and_large_ones_are_cut(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    observe = module._observe

    def noting(session: object, inputs: ModelInputs, names: list[str]) -> object:
        sizes.append(inputs.batch_size)
        return observe(session, inputs, names)

    def stream() -> Iterator[ModelInputs]:
        for start in range(1, 4):
            assert sum(sizes[1:]) == 10 * (start - 1), "the batch before is done"
            yield ModelInputs((torch.full((10, 2), float(start)),))

    monkeypatch.setattr(module, "_observe", noting)
    monkeypatch.setattr(module, "MEMORY_BYTES", 4 * 2 * 4)  # four rows of the one tensor
    assert calibrate(path, stream(), ["root"])["root"] == pytest.approx((1.0, 3**0.5))
    assert sizes == [1, 4, 4, 2, 4, 4, 2, 4, 4, 2]


@pytest.mark.parametrize("method", ["minmax", "percentile"])
def test_a_value_that_is_not_finite_is_an_error_with_the_tensors_name(
    path: Path, method: module.Method
) -> None:
    with pytest.raises(ModelError, match="'root' held a value that is not finite"):
        calibrate(path, [batch((1, 1)), batch((-1, 1))], ["root"], method=method)


def test_no_batch_is_an_error(path: Path) -> None:
    with pytest.raises(DataError, match="no calibration batch"):
        calibrate(path, [], ["root"])
