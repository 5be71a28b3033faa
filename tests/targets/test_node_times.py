"""The runtime's trace against its clock."""

from __future__ import annotations

import time
from pathlib import Path

import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from compressor.export.onnxruntime_model import open_session
from compressor.targets import node_times
from compressor.targets.node_times import layer_kernel_ms
from tests.brevity import PATIENT_TIMES

LAYERS = 30


@pytest.mark.slow
def test_what_the_trace_itself_takes_is_not_counted(tmp_path: Path) -> None:
    path, sample = tmp_path / "chain.onnx", torch.ones(1, 4, 4, 4)
    write_chain(path)
    session = open_session(path, 1)
    runs_ms = []
    for _ in range(500):
        started = time.perf_counter()
        session.run(None, {"t0": sample.numpy()})
        runs_ms.append((time.perf_counter() - started) * 1e3)
    whole_ms = sorted(runs_ms)[len(runs_ms) // 4]
    layers_ms = min(layer_kernel_ms(path, sample, 1) for _ in range(3))
    # With the trace, whose clock ticks in whole microseconds, each layer takes 2 us and more.
    assert 0.3 * whole_ms < layers_ms < 1.3 * whole_ms


@pytest.mark.parametrize(
    ("times_ms", "timed"),
    [
        ([1.0, 1.04, 9.0], 2),
        ([1.0, 1.06, 1.04, 9.0], 3),
        ([2.0, 2.2, 1.0, 1.3, 1.01, 9.0], 5),  # the first two were beside another program
        ([1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 9.0], 6),
    ],
)
def test_a_layer_is_timed_until_its_two_fastest_times_agree(
    times_ms: list[float], timed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = iter(times_ms)
    monkeypatch.setattr(node_times, "_timed_ms", lambda *_: next(told))
    monkeypatch.setattr(node_times, "MOST_TIMES", PATIENT_TIMES)
    assert layer_kernel_ms(Path("layer.onnx"), torch.zeros(1), 1) == 1.0
    assert next(told) == times_ms[timed]


def write_chain(path: Path) -> None:
    """Pointwise convolutions that take half a microsecond each."""
    weight = numpy_helper.from_array(torch.eye(4).reshape(4, 4, 1, 1).numpy(), "weight")
    nodes = [
        helper.make_node("Conv", [f"t{i}", "weight"], [f"t{i + 1}"], f"conv{i}")
        for i in range(LAYERS)
    ]
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 4, 4, 4])
        for name in ("t0", f"t{LAYERS}")
    ]
    graph = helper.make_graph(nodes, "chain", ends[:1], ends[1:], [weight])
    opsets = [helper.make_opsetid("", 20)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
