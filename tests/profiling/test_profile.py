from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_model
from torch import nn

from compressor.errors import ModelError
from compressor.interfaces.inputs import ModelInputs
from compressor.profiling.latency import Timing
from compressor.profiling.profile import Comparison, compare, profile, state_size_bytes
from compressor.testing.models import DictModel, TiedModel, TinyMLP, TinyResNet


def fake_measure(models: Mapping[str, nn.Module], inputs: ModelInputs) -> dict[str, Timing]:
    """A millisecond for each thousand parameters."""
    sizes = {name: sum(p.numel() for p in m.parameters()) / 1e3 for name, m in models.items()}
    return {name: Timing(ms, ms, 0.9 * ms, 1.1 * ms, 9) for name, ms in sizes.items()}


@pytest.fixture
def comparison() -> Comparison:
    images = torch.zeros(1, 64)
    return compare(TinyMLP(64, 64), TinyMLP(64, 16), images, measure=fake_measure)


@pytest.mark.parametrize("model", [TinyResNet(), TiedModel()], ids=["plain", "tied"])
def test_the_size_is_that_of_a_safetensors_file(model: nn.Module, tmp_path: Path) -> None:
    save_model(model, str(tmp_path / "model"))
    written = (tmp_path / "model").stat().st_size
    # save_model notes in the header which names were tied
    assert state_size_bytes(model) == pytest.approx(written, abs=64)


@pytest.mark.slow
def test_a_profile_has_every_figure_and_survives_json() -> None:
    model = TinyMLP(64, 32)
    result = profile(model, torch.zeros(2, 64), name="digits", metric=lambda m: {"accuracy": 91.25})
    assert result.params == 64 * 32 + 32 + 32 * 32 + 32 + 32 * 10 + 10
    assert result.macs == 2 * (64 * 32 + 32 * 32 + 32 * 10)
    assert result.peak_memory_bytes == 3 * 2 * 32 * 4  # fc2: its input, its output, and its ReLU
    assert result.latency is not None
    assert result.latency.best_ms > 0
    values = json.loads(json.dumps(result.to_json()))
    assert values["metrics"] == {"accuracy": 91.25}
    assert [layer["name"] for layer in values["layers"]] == ["fc1", "fc2", "fc3"]
    assert model.training


def test_the_table_has_units_and_a_row_for_each_layer() -> None:
    table = profile(TinyResNet(), torch.zeros(1, 1, 8, 8), latency=False).table()
    assert "829 kMACs" in table
    assert "kB" in table
    assert "latency" not in table
    rows = {line.split()[0]: line.split() for line in table.splitlines() if line}
    assert rows["layer1.0.conv2"][1:] == [
        "Conv2d", "2.30", "k", "147", "k", "1×16×8×8", "1×16×8×8",
    ]  # fmt: skip


def test_what_could_not_be_counted_is_in_the_table() -> None:
    class Distances(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cdist(x, x)

    table = profile(Distances(), torch.zeros(3, 2), latency=False).table()
    assert table.endswith("not counted: aten::_cdist_forward (1)")


def test_inputs_may_be_a_dict_argument() -> None:
    batch = {"image": torch.zeros(2, 1, 8, 8), "scale": torch.ones(2)}
    result = profile(DictModel(), (batch,), latency=False)
    assert result.macs == 2 * (64 * 8 * 9 + 8 * 10)


def test_ratios_are_reference_over_compressed(comparison: Comparison) -> None:
    before, after = comparison.reference, comparison.compressed
    assert comparison.params_ratio == before.params / after.params > 1
    assert comparison.macs_ratio == pytest.approx((64 * 64 * 2 + 640) / (64 * 16 + 256 + 160))
    assert comparison.size_ratio == before.size_bytes / after.size_bytes > 1
    assert comparison.latency_ratio == pytest.approx(comparison.params_ratio)
    assert json.loads(json.dumps(comparison.to_json()))["macs_ratio"] == comparison.macs_ratio


def test_the_comparison_is_a_table_of_before_and_after(comparison: Comparison) -> None:
    rows = [line.split() for line in comparison.table().splitlines()]
    assert rows[0] == ["reference", "compressed", "ratio"]
    assert rows[1] == ["params", "8.97", "k", "1.48", "k", f"{comparison.params_ratio:.2f}x"]
    assert len({len(line) for line in comparison.table().splitlines()}) == 1


@pytest.mark.slow
def test_models_are_timed_in_turn_with_real_calls() -> None:
    small, large = TinyMLP(64, 8), TinyMLP(64, 2048)
    ratio = compare(large, small, torch.zeros(64, 64)).latency_ratio
    assert ratio is not None
    assert ratio > 2  # 500 times the MACs


def test_a_comparison_without_latency_has_no_latency_ratio() -> None:
    result = compare(TinyMLP(), TinyMLP(), torch.zeros(1, 64), latency=False)
    assert result.latency_ratio is None
    assert result.macs_ratio == 1


def test_a_profile_and_a_comparison_print_as_their_tables(comparison: Comparison) -> None:
    assert str(comparison) == repr(comparison) == comparison.table()
    assert str(comparison.reference) == repr(comparison.reference) == comparison.reference.table()


def test_classes_are_no_models() -> None:
    with pytest.raises(ModelError, match="`model` is the class TinyMLP"):
        profile(TinyMLP, torch.zeros(1, 64))  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="`compressed` is the class TinyMLP"):
        compare(TinyMLP(), TinyMLP, torch.zeros(1, 64))  # type: ignore[arg-type]
