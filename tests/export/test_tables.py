"""Embeddings in few bits: rows are looked up as integers, and the file holds no table of floats."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto
from torch import Tensor, nn

from compressor.errors import ConfigError
from compressor.export.corrections import CORRECTIONS
from compressor.export.post_training import PostTraining
from compressor.export.qdq import export_quantized, integer_kernels
from compressor.export.quantize import Quantized, quantize
from compressor.export.runtime_graph import executed_graph
from compressor.interfaces.inputs import ModelInputs
from compressor.quantization.model import QuantizedModel
from compressor.quantization.plan import (
    FORMATS,
    STATIC_INT8,
    WEIGHT_INT8,
    LayerFormat,
    QuantizationPlan,
)
from compressor.quantization.scheme import WEIGHT, Scheme

COUNT, COLUMNS, LENGTH = 40, 33, 7  # no multiple of a block, nor of two
TOKENS = [
    torch.randint(COUNT, (8, LENGTH), generator=torch.Generator().manual_seed(seed))
    for seed in range(2)
]
STORED = {  # what the constant's name ends in, its type, and its columns
    "static_int8": ("int8", TensorProto.INT8, COLUMNS),
    "dynamic_int8": ("int8", TensorProto.INT8, COLUMNS),
    "weight_int8": ("int8", TensorProto.INT8, COLUMNS),
    "weight_int4": ("packed", TensorProto.UINT8, COLUMNS // 2 + 1),
    "weight_fp16": ("float16", TensorProto.FLOAT16, COLUMNS),
    "weight_bf16": ("bfloat16", TensorProto.BFLOAT16, COLUMNS),
}
UNUSUAL = [
    LayerFormat(WEIGHT.with_bits(3), "float"),
    LayerFormat(Scheme(8, axis=0), "float"),
    LayerFormat(Scheme(8, signed=True, symmetric=True), "float"),
    LayerFormat(Scheme(4, axis=0, block=16), "float"),
    LayerFormat(Scheme(8, signed=True, symmetric=True, axis=0, block=16), "float"),
]


class Words(nn.Module):
    """A language model; its table may be the weight of the last layer as well."""

    def __init__(self, columns: int = COLUMNS, *, is_tied: bool = False) -> None:
        super().__init__()
        self.words = nn.Embedding(COUNT, columns, padding_idx=0)
        self.hidden = nn.Linear(columns, columns)
        self.head = nn.Linear(columns, COUNT, bias=False)
        if is_tied:
            self.head.weight = self.words.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.hidden(self.words(tokens)).relu())


class Readers(nn.Module):
    """Tables that are read in other ways."""

    def __init__(self) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(COUNT, 8)
        self.words = nn.Embedding(COUNT, 8)
        self.both = nn.Embedding(COUNT, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        rows = self.both(tokens) * self.both.weight.mean()
        return self.head(self.bag(tokens) + (rows + self.words(tokens)).sum(1))


def words(columns: int = COLUMNS, *, is_tied: bool = False) -> nn.Module:
    torch.manual_seed(0)
    return Words(columns, is_tied=is_tied).eval()


def run(path: Path, *, is_optimised: bool) -> NDArray[np.float32]:
    options = ort.SessionOptions()
    if not is_optimised:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    # products of few-bit weights round what they read to eight bits if they may
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    result: NDArray[np.float32] = session.run(None, {"input": TOKENS[0].numpy()})[0]
    return result


def answers(quantized: Quantized) -> NDArray[np.float32]:
    with torch.no_grad():
        result: NDArray[np.float32] = quantized.module(TOKENS[0]).numpy()
    return result


def stored(path: Path) -> dict[str, onnx.TensorProto]:
    return {tensor.name: tensor for tensor in onnx.load(path).graph.initializer}


@pytest.mark.parametrize("format", STORED)
def test_a_file_looks_up_what_its_simulation_rounds_and_has_no_table_of_floats(
    format: str, tmp_path: Path
) -> None:
    quantized = quantize(words(), TOKENS, format=format, layers=["words"], corrections=[])
    path = quantized.save_onnx(tmp_path / "model.onnx")
    expected = answers(quantized)
    for is_optimised in (False, True):
        np.testing.assert_allclose(
            run(path, is_optimised=is_optimised), expected, rtol=1e-5, atol=1e-5
        )
    kind, data_type, columns = STORED[format]
    table = stored(path)[f"words.weight_{kind}"]
    assert (table.data_type, list(table.dims)) == (data_type, [COUNT, columns])
    floats = [
        tensor.name
        for tensor in executed_graph(path).graph.initializer
        if tensor.data_type == TensorProto.FLOAT and list(tensor.dims) == [COUNT, COLUMNS]
    ]
    assert not floats, "the runtime has not made a table of floats of it"


@pytest.mark.parametrize("format", UNUSUAL)
@pytest.mark.parametrize("is_tied", [False, True])
def test_any_scheme_of_a_weight_can_be_looked_up(
    format: LayerFormat, is_tied: bool, tmp_path: Path
) -> None:
    """A tied table has the scheme of its layer; else what takes eight bits has a scale a row."""
    model = words(is_tied=is_tied)
    quantized = quantize(model, TOKENS, format=format, corrections=[])
    path = quantized.save_onnx(tmp_path / "model.onnx")
    np.testing.assert_allclose(run(path, is_optimised=False), answers(quantized), atol=1e-5)
    scheme = quantized.plan.weights["head.weight" if is_tied else "words.weight"].scheme
    assert scheme == (format.weight if is_tied or format.weight.bits <= 4 else WEIGHT)


def test_the_rounding_is_that_of_onnx_by_rows() -> None:
    """Recomputed in numpy: the least scale that covers a row, symmetric."""
    model = words()
    quantized = quantize(model, TOKENS, layers=["words"])
    table = model.words.weight.detach().numpy()
    scale = np.abs(table).max(1, keepdims=True) / np.float32(127)
    scale[scale == 0] = 1  # of the padding
    rows = (np.rint(table / scale) * scale)[TOKENS[0]]
    with torch.no_grad():
        expected = model.head(model.hidden(torch.from_numpy(rows)).relu()).numpy()
    np.testing.assert_allclose(answers(quantized), expected, atol=1e-5)


@pytest.mark.parametrize("format", ["static_int8", "dynamic_int8", "weight_fp16"])
def test_a_table_that_is_a_layers_weight_is_stored_once_and_computed_as_the_layer_alone_is(
    format: str, tmp_path: Path
) -> None:
    kernels = []
    for is_tied in (True, False):
        quantized = quantize(words(32, is_tied=is_tied), TOKENS, format=format)
        path = quantized.save_onnx(tmp_path / "model.onnx")
        np.testing.assert_allclose(run(path, is_optimised=False), answers(quantized), atol=1e-5)
        large = [t.name for t in stored(path).values() if sorted(t.dims) == [32, COUNT]]
        assert len(large) == (1 if is_tied else 2)
        assert not quantized.skipped
        kernels.append(integer_kernels(path))
    assert kernels[0] == kernels[1], "what is transposed is transposed when the file is loaded"


def test_a_tied_table_has_the_numbers_of_its_layer() -> None:
    model = words(is_tied=True)
    plan = quantize(model, TOKENS).plan
    assert list(plan.weights) == ["hidden.weight", "head.weight"]
    rounded = quantize(model, TOKENS, layers=["words"], format="weight_int8")
    weight = model.words.weight.detach()
    scale = weight.abs().amax(1, keepdim=True) / 127
    scale[scale == 0] = 1
    table = (weight / scale).round() * scale
    hidden = model.hidden(table[TOKENS[0]]).relu()
    np.testing.assert_allclose(answers(rounded), (hidden @ table.T).detach(), atol=1e-5)


def test_embeddings_are_named_like_layers() -> None:
    model = words()
    assert list(quantize(model, TOKENS).plan.formats) == ["hidden", "head", "words"]
    alone = quantize(model, TOKENS, layers=["words"])
    assert list(alone.plan.formats) == ["words"]
    assert alone.skipped == dict.fromkeys(["hidden", "head"], "It was not asked for.")
    without = quantize(model, TOKENS, ignored=["words"])
    assert without.skipped == {"words": "It was not asked for."}
    mixed = quantize(model, TOKENS, format={"words": "static_int8", "head": "dynamic_int8"})
    assert mixed.plan.formats["words"] == WEIGHT_INT8


def test_tables_that_are_read_otherwise_stay_in_float_and_say_why(tmp_path: Path) -> None:
    torch.manual_seed(0)
    quantized = quantize(Readers().eval(), TOKENS)
    assert list(quantized.plan.formats) == ["head", "words"]
    assert quantized.skipped.keys() == {"bag", "both"}
    assert "no sum of rows" in quantized.skipped["bag"]
    assert "other operations" in quantized.skipped["both"]
    for_tensorrt = quantize(words(is_tied=True), TOKENS, runtime="tensorrt")
    assert "TensorRT" in for_tensorrt.skipped["words"]
    path = for_tensorrt.save_onnx(tmp_path / "model.onnx")
    (found,) = (node for node in onnx.load(path).graph.node if node.op_type == "Gather")
    assert stored(path)[found.input[0]].data_type == TensorProto.FLOAT
    np.testing.assert_allclose(run(path, is_optimised=False), answers(for_tensorrt), atol=1e-4)
    with pytest.raises(ConfigError, match="TensorRT"):
        quantize(words(), TOKENS, runtime="tensorrt", layers=["words"])


def test_a_table_is_not_multiplied_by_integers() -> None:
    quantizer = PostTraining(words(), ModelInputs((TOKENS[0],)), [ModelInputs((TOKENS[0],))])
    assert quantizer.tables == ["words"]
    with pytest.raises(ConfigError, match="'words' cannot have this format"):
        quantizer.plan({"words": STATIC_INT8})


def test_a_plan_in_json_is_the_same_plan() -> None:
    quantized = quantize(words(), TOKENS, format="weight_int4", corrections=[])
    data = json.loads(json.dumps(quantized.plan.to_json()))
    same = QuantizedModel(quantized.module.source.graph, QuantizationPlan.from_json(data))
    assert torch.equal(same(TOKENS[0]), quantized.module(TOKENS[0]))
    assert torch.equal(quantized.module.frozen()(TOKENS[0]), quantized.module(TOKENS[0]))


@pytest.mark.parametrize("format", ["static_int8", "weight_int4"])
def test_corrections_leave_tables_as_they_are(format: str) -> None:
    model = words()
    quantized = quantize(model, TOKENS, format=format, corrections=CORRECTIONS, seconds=1.0)
    assert torch.equal(quantized.model.words.weight, model.words.weight)
    assert "words" not in quantized.corrected.rounded
    alone = quantize(model, TOKENS, format="weight_int4", layers=["words"])
    assert alone.corrected.rounded == {}


def test_a_table_learns_through_the_rounding_and_the_file_has_what_it_learned(
    tmp_path: Path,
) -> None:
    quantizer = PostTraining(words(), ModelInputs((TOKENS[0],)))
    module = quantizer.simulate({"words": FORMATS["weight_int8"]})
    rounding = module.quantizers()["w", "words.weight"]
    rounding.learn_scale()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        scores = module(TOKENS[0][:, :-1])
        loss = nn.functional.cross_entropy(scores.flatten(0, 1), TOKENS[0][:, 1:].flatten())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
    seen = set(TOKENS[0][:, :-1].flatten().tolist()) - {0}  # the padding has no gradient
    assert rounding.growth is not None
    assert set(rounding.growth.nonzero().flatten().tolist()) == seen
    path = export_quantized(module.eval(), ModelInputs((TOKENS[0],)), tmp_path / "model.onnx")
    with torch.no_grad():
        expected = module(TOKENS[0]).numpy()
    np.testing.assert_allclose(run(path, is_optimised=False), expected, atol=1e-4)
