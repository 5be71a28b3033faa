"""Damage is measured on repaired variants; what runs before a change is computed once."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compressor.config import Config
from compressor.frameworks import code_version
from compressor.frameworks.base import Job
from compressor.frameworks.deployment import Deployment
from compressor.frameworks.recovery import Recovery
from compressor.frameworks.sensing import Sensing
from compressor.frameworks.subset import Subset, model_digest, parts_of
from compressor.frameworks.torch_bench import TorchBench
from compressor.frameworks.torch_framework import TorchFramework
from compressor.interfaces.divergence import divergence
from compressor.interfaces.inputs import ModelInputs, output_tensors
from compressor.progress import SILENT
from compressor.result import Choice, Plan
from compressor.search.tuning import Tuning
from compressor.search.variants import Base
from compressor.structure.run_record import record_run
from compressor.techniques import TECHNIQUES, TechniqueContext, apply_plan
from compressor.testing.models import DictModel, TiedModel, TinyMLP, TinyResNet, TinyTransformer
from compressor.training.algorithms.batchnorm import reestimate_batchnorm

MODELS: dict[str, tuple[type[nn.Module], tuple[int, ...]]] = {
    "residual": (TinyResNet, (24, 1, 8, 8)),
    "transformer": (TinyTransformer, (24, 16)),
    "tied": (TiedModel, (24, 16)),
    "dict": (DictModel, ()),
}


def make(name: str, seed: int = 0) -> tuple[nn.Module, Subset]:
    """A model, and two batches for it."""
    torch.manual_seed(seed)
    kind, shape = MODELS[name]
    if name == "dict":
        calls = [{"image": torch.randn(24, 1, 8, 8), "scale": torch.rand(24)} for _ in range(2)]
        inputs = tuple(ModelInputs((call,)) for call in calls)
    elif kind is TinyResNet:
        inputs = tuple(ModelInputs((torch.randn(shape),)) for _ in range(2))
    else:
        inputs = tuple(ModelInputs((torch.randint(0, 32, shape),)) for _ in range(2))
    return kind().eval(), Subset(inputs, inputs)


class Bench:
    """What `Sensing` needs, and the choices of all techniques."""

    def __init__(self, model: nn.Module, subset: Subset) -> None:
        self.model, self.subset = model, subset
        self.techniques = {name: cls() for name in NAMES for cls in [TECHNIQUES.get(name)]}
        self.context = TechniqueContext(
            subset.inputs[0].with_batch(4), importance="l2", stores_compact=True
        )

    @cached_property
    def choices(self) -> list[Choice]:
        found = [t.choices(self.model, self.context) for t in self.techniques.values()]
        return [choice for choices in found for choice in choices]

    def sensing(self, prefix_bytes: int = 2**30) -> Sensing:
        return Sensing(
            self.model,
            self.subset,
            self.techniques,
            lambda: self.context,
            is_classifier=True,
            prefix_bytes=prefix_bytes,
        )

    def some(self, technique: str, count: int = 2) -> list[Choice]:
        return [choice for choice in self.choices if choice.technique == technique][-count:]

    def reestimated(self, plan: Plan) -> nn.Module:
        """A variant with new batch norms alone."""
        model = copy.deepcopy(self.model)
        apply_plan(model, plan, self.techniques, self.context)
        reestimate_batchnorm(model, self.subset.inputs, lambda each, inputs: inputs.call(each))
        return model


NAMES = ("channel_pruning", "block_removal", "low_rank", "sparsity", "clustering")


def plan_of(*choices: Choice) -> Plan:
    return Plan(choices)


def direct(model: nn.Module, reference: nn.Module, subset: Subset) -> float:
    """Divergence, by calling both."""

    def outputs(each: nn.Module) -> Sequence[list[Tensor]]:
        with torch.no_grad():
            return [output_tensors(inputs.call(each)) for inputs in subset.inputs]

    return divergence(outputs(model), outputs(reference), is_classifier=True)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("prefix_bytes", [2**30, 100_000])
def test_damages_are_the_same_with_and_without_what_was_kept(name: str, prefix_bytes: int) -> None:
    model, subset = make(name)
    bench = Bench(model, subset)
    before = copy.deepcopy(model.state_dict())
    full, cached = bench.sensing(0), bench.sensing(prefix_bytes)
    for choice in [c for technique in NAMES for c in bench.some(technique)]:
        assert cached.damage_of(plan_of(choice)) == full.damage_of(plan_of(choice)), choice.key
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[key])
    assert all("forward" not in vars(module) for module in model.modules())


def test_what_runs_before_a_change_runs_once() -> None:
    model, subset = make("residual")
    bench, calls = Bench(model, subset), [0, 0]
    sensing = bench.sensing()
    choices = [c for c in bench.choices if c.site == "layer2.1" or "layer2.1.conv1" in c.modules]
    sensing.damage_of(plan_of(choices[0]))

    def count(place: int) -> None:
        calls[place] += 1

    first, last = model.get_submodule("layer1.0.conv1"), model.get_submodule("linear")
    for place, module in enumerate((first, last)):
        kind = type(module)
        hooked = lambda _, args, place=place: count(place)  # noqa: E731
        module.register_forward_pre_hook(hooked)
        assert isinstance(module, kind)
    for choice in choices[1:6]:
        sensing.damage_of(plan_of(choice))
    assert calls[0] <= 6  # two samples, to see whether a new cut changes nothing
    assert calls[1] >= len(choices[1:6])


class Notes(nn.Module):
    """Its input, of which it keeps the mean for others."""

    def forward(self, x: Tensor) -> Tensor:
        self.seen = x.detach().mean(1, keepdim=True)
        return x * 2


class Aside(nn.Module):
    """Uses what a module keeps beside its output."""

    def __init__(self) -> None:
        super().__init__()
        self.notes, self.fc, self.head = Notes(), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.notes(x)
        out: Tensor = self.head(self.fc(x).relu() + self.notes.seen)
        return out


def test_a_model_whose_modules_do_more_than_return_runs_in_full() -> None:
    torch.manual_seed(0)
    model = Aside().eval()
    inputs = tuple(ModelInputs((torch.randn(24, 4),)) for _ in range(2))
    subset = Subset(inputs, inputs)
    bench = Bench(model, subset)
    model.notes.seen = None  # type: ignore[assignment]
    head = Choice("sparsity", "head", {"sparsity": 0.5, "criterion": "magnitude"}, "", ("head",))
    kept = bench.sensing().damage_of(plan_of(head))
    assert kept == bench.sensing(0).damage_of(plan_of(head)) > 0


def test_the_repair_does_less_damage_than_new_batch_norms() -> None:
    model, subset = make("residual")
    bench = Bench(model, subset)
    for choice in (*bench.some("block_removal", 1), *bench.some("channel_pruning", 2)):
        alone = direct(bench.reestimated(plan_of(choice)), model, subset)
        assert bench.sensing().damage_of(plan_of(choice)) < 0.8 * alone


def test_the_damage_is_that_of_the_variant() -> None:
    """The subset has so few positions that a repair takes all of them for both."""
    model, subset = make("transformer")
    bench = Bench(model, subset)
    plan = plan_of(*bench.some("channel_pruning", 1), *bench.some("low_rank", 1))
    sensing = bench.sensing()
    variant = sensing.build(plan)
    assert sensing.divergence_of(variant) == pytest.approx(direct(variant, model, subset))
    assert sensing.damage_of(plan) == pytest.approx(sensing.divergence_of(variant))
    assert all(p.requires_grad for p in variant.parameters())


def test_zeros_and_palettes_stay_when_the_layers_behind_an_edit_are_repaired() -> None:
    model, subset = make("residual")
    bench = Bench(model, subset)
    sparse = next(c for c in bench.choices if c.site == "layer2.0.conv2" and c.label == "75% zeros")
    palette = next(c for c in bench.choices if c.technique == "clustering" and c.site == "linear")
    removed = next(c for c in bench.choices if c.technique == "block_removal")
    variant = bench.sensing().build(plan_of(sparse, palette, removed))
    zeros = (variant.get_parameter("layer2.0.conv2.weight") == 0).float().mean()
    assert float(zeros) == pytest.approx(0.75, abs=0.01)
    assert (
        len(variant.get_parameter("linear.weight").unique()) <= 2 ** palette.setting["index_bits"]
    )
    layer = "layer2.0.conv1.weight"
    assert not torch.equal(variant.get_parameter(layer), model.get_parameter(layer))


def test_a_further_plan_starts_from_the_weights_of_the_variant() -> None:
    model, subset = make("residual")
    bench = Bench(model, subset)
    sensing = bench.sensing()
    width = next(c for c in bench.choices if c.technique == "channel_pruning")
    removed = bench.some("block_removal", 1)
    made = plan_of(width)
    recovered = sensing.build(made)
    with torch.no_grad():
        for parameter in recovered.parameters():
            parameter += 0.01 * torch.randn(
                parameter.shape, generator=torch.Generator().manual_seed(1)
            )
    base = Base(made, recovered)
    assert sensing.damage_of(made, base) == pytest.approx(direct(recovered, model, subset))
    further = plan_of(width, *removed)
    variant = sensing.build(further, base)
    assert torch.equal(
        variant.get_parameter("conv1.weight"), recovered.get_parameter("conv1.weight")
    )
    assert not hasattr(variant.get_submodule(removed[0].site), "conv1")
    assert bench.sensing(0).damage_of(further, base) == sensing.damage_of(further, base)


def test_a_hopeless_choice_is_not_measured_on_the_rest() -> None:
    torch.manual_seed(0)
    inputs = [ModelInputs(([torch.randn(1, 8, 8) for _ in range(4)],)) for _ in range(3)]
    model = Listed().eval()
    sensing = Bench(model, Subset(tuple(inputs), tuple(inputs))).sensing(0)
    small = Choice("sparsity", "net.linear", {"sparsity": 0.95, "criterion": "magnitude"})
    mild = sensing.damage_of(plan_of(small))
    Listed.calls = 0
    assert sensing.damage_of(plan_of(small)) == mild
    in_full = Listed.calls
    model.net.linear.weight.data *= 1e4
    sensing = Bench(model, Subset(tuple(inputs), tuple(inputs))).sensing(0)
    assert sensing.damage_of(plan_of(small)) > 5.0
    Listed.calls = 0
    sensing.damage_of(plan_of(small))
    assert Listed.calls == in_full - 2


class Listed(nn.Module):
    """A model of a list of images, whose batches cannot be joined; counts its calls."""

    calls = 0

    def __init__(self) -> None:
        super().__init__()
        self.net = TinyResNet()

    def forward(self, images: list[Tensor]) -> Tensor:
        Listed.calls += 1
        out: Tensor = self.net(torch.stack(images))
        return out


def test_batches_are_joined_as_far_as_memory_allows() -> None:
    batches = [{"x": torch.full((4, 3), float(i)), "table": torch.eye(2)} for i in range(5)]
    inputs = tuple(ModelInputs((batch,)) for batch in batches)
    subset = Subset(inputs, inputs)
    (whole,) = parts_of(subset, sample_bytes=1)
    assert torch.equal(whole.args[0]["x"], torch.cat([batch["x"] for batch in batches]))
    assert whole.args[0]["table"].shape == (2, 2)
    assert [part.batch_size for part in parts_of(subset, sample_bytes=2**25)] == [8, 8, 4]
    assert [part.batch_size for part in parts_of(subset, sample_bytes=2**40)] == [4] * 5
    other = ModelInputs(({"x": torch.zeros(4, 2), "table": torch.eye(2)},))
    uneven = Subset((*inputs, other), (*inputs, other))
    assert parts_of(uneven, sample_bytes=1) == uneven.inputs


def test_a_run_is_recorded_as_it_was() -> None:
    model, subset = make("residual")
    before = len(model._forward_hooks)
    record = record_run(model, subset.inputs[0])
    assert record.counts["relu"] == 1
    assert record.counts["layer1.0.relu"] == 2
    assert record.largest_bytes == 24 * 16 * 8 * 8 * 4
    assert record.start_of("layer1.0.conv2") < record.start_of("layer2.0.conv1")
    assert len(model._forward_hooks) == before


def open_bench(folder: Path) -> TorchBench:
    """Of a small classifier."""
    data = [(torch.randn(8, 4), torch.arange(8) % 3)]
    config = Config.from_dict({"delta": 1.0, "device": "CPU", "optimization": "macs"})
    job = Job({"train": data, "test": data}, TinyMLP(4, num_classes=3), config)
    return TorchBench(job, folder, SILENT)


def test_another_version_senses_anew_and_keeps_the_variants(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = open_bench(tmp_path)
    before = bench.digest(), bench.job_digest()
    monkeypatch.setattr("compressor.frameworks.torch_bench.damage_version", lambda: "another")
    assert bench.digest() != before[0]
    assert bench.job_digest() == before[1]


def test_the_version_is_that_of_the_deciding_sources_and_of_torch(tmp_path: Path) -> None:
    for name in ("training/algorithms/a.py", "export/b.py", "seeding.py", "report/c.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1")
    versions = [code_version.version_of(tmp_path, "2.0")]
    for name in ("training/algorithms/a.py", "export/b.py", "seeding.py"):
        (tmp_path / name).write_text("2")
        versions.append(code_version.version_of(tmp_path, "2.0"))
    versions.append(code_version.version_of(tmp_path, "2.1"))
    assert len(set(versions)) == 5
    (tmp_path / "report/c.py").write_text("2")
    assert code_version.version_of(tmp_path, "2.1") == versions[-1]


def test_what_decides_is_there() -> None:
    root = Path(code_version.__file__).parents[1]
    for name in code_version.DECIDING:
        assert (root / name).is_file() or any((root / name).rglob("*.py")), name
    assert code_version.damage_version() == code_version.version_of(root, torch.__version__)


def test_a_model_that_calls_its_norms_by_keyword_is_repaired_layer_by_layer(
    caplog: pytest.LogCaptureFixture,
) -> None:
    torch.manual_seed(0)
    inputs = tuple(ModelInputs((torch.randn(24, 3, 8, 8),)) for _ in range(2))
    model = ByKeyword().eval()
    sensing = Bench(model, Subset(inputs, inputs)).sensing()
    sparse = Choice("sparsity", "conv", {"sparsity": 0.5, "criterion": "magnitude"}, "", ("conv",))
    assert 0 < sensing.damage_of(plan_of(sparse)) < float("inf")
    assert not caplog.records


class ByKeyword(nn.Module):
    """Calls its norm by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.head = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.bn(input=self.conv(x)).relu().mean((2, 3)))
        return out


def test_what_was_released_is_found_again_the_same() -> None:
    model, subset = make("residual")
    bench = Bench(model, subset)
    width, removed = bench.some("channel_pruning", 1), bench.some("block_removal", 1)
    sensing = bench.sensing()
    base = Base(plan_of(*width), sensing.build(plan_of(*width)))
    whole = plan_of(*width, *removed)

    def measured() -> list[float | str]:
        damages = sensing.damage_of(whole), sensing.damage_of(whole, base)
        return [*damages, model_digest(sensing.build(whole)), sensing.divergence_of(base.model)]

    before = measured()
    prefix = sensing._from_reference.prefix
    assert prefix is not None
    kept: list[weakref.ref[Any]] = [weakref.ref(prefix), weakref.ref(sensing._origin(base))]
    del prefix
    sensing.release()
    gc.collect()
    assert [each() for each in kept] == [None, None]
    assert measured() == before


def test_memory_is_released_before_training_and_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = open_bench(tmp_path)
    model, told = bench.build(Plan()), []

    def stop(*_: object, **__: object) -> None:
        told.append("began")
        raise StopIteration

    monkeypatch.setattr(Sensing, "release", lambda _: told.append("released"))
    monkeypatch.setattr(Recovery, "fit", stop)
    monkeypatch.setattr(Deployment, "export", stop)
    with pytest.raises(StopIteration):
        bench.recover(model, Plan(), 1, tmp_path, is_final=False, tuning=Tuning())
    with pytest.raises(StopIteration):
        bench.export(model, Plan(), tmp_path)
    assert told == ["released", "began"] * 2


class Distances(nn.Module):
    """Computes something whose multiplications are not counted."""

    def __init__(self) -> None:
        super().__init__()
        self.net = TinyMLP(4, num_classes=3)

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.net(x)
        return torch.cdist(hidden, hidden.new_ones(3, 3))


def test_what_is_not_counted_is_told_by_every_process(tmp_path: Path) -> None:
    """One that goes on takes the baseline of an earlier one, and does not measure it."""
    data = [(torch.randn(8, 4), torch.arange(8) % 3)]
    config = Config.from_dict({"delta": 1.0, "device": "CPU", "optimization": "macs"})
    bench = TorchFramework().open(
        Job({"train": data, "test": data}, Distances(), config), tmp_path, SILENT
    )
    bench.check()
    (told,) = [each for each in bench.lost() if "not counted" in each]
    assert told.endswith("aten::_cdist_forward.")
    bench.baseline()
    assert [each for each in bench.lost() if "not counted" in each] == [told]
