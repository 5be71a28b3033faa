"""A programmed module is the module: in both modes, in training, exported, saved; and narrower."""

from __future__ import annotations

import copy
import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from compressor.errors import CheckpointError, ModelError, SurgeryError
from compressor.interfaces.inputs import ModelInputs
from compressor.structure import surgery
from compressor.structure.describe import apply_difference, diff, outline, rebuild
from compressor.structure.programs.program import (
    Program,
    check_program,
    get_integer,
    with_integer,
)
from compressor.structure.programs.programmed import ATTRIBUTE, base_class, is_programmed
from compressor.structure.programs.trace import Traced, trace_program
from compressor.testing.models import CifarBlock, CifarResNet
from tests.structure.programs import CASES, Gated, LeNet, inputs_of, make


@cache
def traced(case: str) -> Traced:
    return trace_program(make(case), inputs_of(case, 2), inputs_of(case, 3))


def program_of(case: str) -> Program:
    return traced(case).program


def programmed(case: str) -> nn.Module:
    model = make(case)
    surgery.reprogram(model, "", program_of(case))
    return model


def outputs(model: nn.Module, inputs: ModelInputs) -> list[Tensor]:
    """Results, and what became of the inputs, for one seed."""
    copied = inputs.map(torch.clone)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        leaves = pytree.tree_leaves((copied.call(model), copied.args))
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def assert_equal(model: nn.Module, other: nn.Module, inputs: ModelInputs, tol: float = 0) -> None:
    for a, b in zip(outputs(model, inputs), outputs(other, inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=tol, atol=tol)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("size", [1, 2, 7])
def test_equals_the_module_in_eval_mode_for_any_batch(case: str, size: int) -> None:
    model, other = make(case).eval(), programmed(case).eval()
    assert is_programmed(other)
    assert_equal(model, other, inputs_of(case, size))


@pytest.mark.parametrize("case", sorted(set(CASES) - {"cifar_shortcut"}))
def test_trains_like_the_module(case: str) -> None:
    model, other = make(case).double().train(), programmed(case).double().train()
    for step in range(3):
        inputs = inputs_of(case, 4 + step).double()
        for trained in (model, other):
            loss = torch.stack([out.square().mean() for out in outputs(trained, inputs)]).sum()
            trained.zero_grad()
            loss.backward()
            with torch.no_grad():
                for parameter in trained.parameters():
                    parameter -= 0.1 * parameter.grad
    names = dict(model.named_parameters())
    for name, parameter in other.named_parameters():
        torch.testing.assert_close(parameter.grad, names[name].grad, rtol=1e-12, atol=1e-12)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], value, rtol=1e-12, atol=1e-12)


def test_whole_children_stay_calls() -> None:
    steps = program_of("heads")[3]
    assert [step[1] for step in steps if step[0] == "call"] == [
        "norm",
        "qkv",
        "out",
        "skip",
        "norm",
    ]
    assert "shortcut" in [step[1] for step in program_of("cifar_block")[3]]


def test_what_happens_in_training_only_still_happens() -> None:
    model = programmed("heads").train()
    runs = {tuple(model(torch.ones(3, 5, 8)).flatten().tolist()) for _ in range(8)}
    assert len(runs) > 1
    model.eval()
    assert torch.equal(model(torch.ones(3, 5, 8)), model(torch.ones(3, 5, 8)))


def test_the_traced_module_is_left_as_it_was() -> None:
    model = make("lenet").train()
    before = copy.deepcopy(model.state_dict())
    trace_program(model, inputs_of("lenet", 2), inputs_of("lenet", 3))
    assert type(model) is LeNet
    assert model.training
    assert not any(child._forward_hooks or child._forward_pre_hooks for child in model.modules())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
        assert value.dtype == before[name].dtype


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_runs_in_the_type_that_the_model_is_moved_to(dtype: torch.dtype) -> None:
    model, other = make("heads").to(dtype).eval(), make("heads").to(dtype).eval()
    surgery.reprogram(other, "", program_of("heads"))
    inputs = inputs_of("heads", 3).map(lambda x: x.to(dtype))
    assert_equal(model, other, inputs)


def test_arguments_may_be_given_by_name_and_defaults_by_value() -> None:
    model, other, x = make("heads").eval(), programmed("heads").eval(), torch.randn(2, 5, 8)
    expected = model(x)
    assert torch.equal(other(x=x), expected)
    assert torch.equal(other(x, False), expected)
    assert torch.equal(other(x, causal=False), expected)


def test_other_arguments_are_refused() -> None:
    heads, nested = programmed("heads").eval(), programmed("nested").eval()
    x = torch.randn(2, 5, 8)
    with pytest.raises(ModelError, match="without the argument 'causal'"):
        heads(x, causal=True)
    with pytest.raises(ModelError, match="unexpected keyword argument 'mask'"):
        heads(x, mask=None)
    with pytest.raises(ModelError, match="the argument 3; it now got 4"):
        nested(inputs_of("nested", 2).args[0], times=4)
    with pytest.raises(ModelError, match="takes the arguments"):
        nested(inputs_of("nested", 2).args[0]["image"], times=3)


def test_sizes_that_a_view_would_confuse_are_refused() -> None:
    lenet = programmed("lenet").eval()
    with pytest.raises(ModelError, match=r"shape \(2, 1, 32, 32\), not \(2, 1, 44, 44\)"):
        lenet(torch.randn(2, 1, 44, 44))


def test_sizes_may_change_where_no_operation_depends_on_them() -> None:
    model, other = make("cifar_block").eval(), programmed("cifar_block").eval()
    assert_equal(model, other, ModelInputs((torch.randn(2, 8, 10, 14),)))


def test_a_programmed_model_stays_of_its_class() -> None:
    model = programmed("lenet")
    assert isinstance(model, LeNet)
    assert base_class(model) is LeNet
    assert type(model) is type(programmed("lenet"))
    assert repr(model).startswith("ProgrammedLeNet(")


def test_a_deep_copy_runs_the_program_with_its_own_weights() -> None:
    model = programmed("lenet").eval()
    copied = copy.deepcopy(model)
    expected = outputs(model, inputs_of("lenet", 2))
    with torch.no_grad():
        model.fc2.weight.zero_()
    for a, b in zip(outputs(copied, inputs_of("lenet", 2)), expected, strict=True):
        assert torch.equal(a, b)


def test_an_edit_that_is_undone_gives_the_code_back() -> None:
    model, inputs = make("lenet").eval(), inputs_of("lenet", 2)
    broken = with_integer(program_of("lenet"), slot_of("view", (1, 1), "lenet"), 200)
    with surgery.undone(model):
        surgery.reprogram(model, "", broken)
        with pytest.raises(RuntimeError):
            inputs.call(model)
    assert type(model) is LeNet
    assert_equal(model, make("lenet").eval(), inputs)


def test_a_shared_module_is_programmed_everywhere() -> None:
    gated = make("gated")
    model = nn.Sequential(gated, gated)
    surgery.reprogram(model, "1", program_of("gated"))
    assert is_programmed(model[0])
    expected = nn.Sequential(make("gated"), make("gated"))
    assert_equal(model, expected, inputs_of("gated", 2))


def slot_of(node: str, position: tuple[int, ...], case: str) -> tuple[int, ...]:
    """Path of an integer of the program, by its place in the graph."""
    found = {
        slot.path
        for (other, place), slot in traced(case).slots.items()
        if (other.name, place) == (node, position)
    }
    (path,) = found
    return path


def masked(model: nn.Module, *entries: tuple[str, list[int]]) -> nn.Module:
    """A copy with these columns (dimension 1) of weights set to zero."""
    model = copy.deepcopy(model)
    for name, columns in entries:
        model.get_parameter(name).data[:, columns] = 0
    return model


def test_a_rewritten_view_makes_the_flattened_layer_narrower() -> None:
    dense = make("lenet").double().eval()
    pruned, kept = [0, 5, 6, 9], [i for i in range(16) if i not in (0, 5, 6, 9)]
    columns = [i * 25 + j for i in kept for j in range(25)]
    model = copy.deepcopy(dense)
    path = slot_of("view", (1, 1), "lenet")
    assert get_integer(program_of("lenet"), path) == 400
    surgery.reprogram(model, "", with_integer(program_of("lenet"), path, 300))
    for name in ("conv2.weight", "conv2.bias", "norm.weight", "norm.bias"):
        surgery.slice_parameter(model, name, 0, kept)
    for name in ("norm.running_mean", "norm.running_var"):
        surgery.slice_parameter(model, name, 0, kept)
    surgery.slice_parameter(model, "fc1.weight", 1, columns)
    zeros = [i * 25 + j for i in pruned for j in range(25)]
    assert_equal(model, masked(dense, ("fc1.weight", zeros)), inputs_of("lenet", 3).double(), 1e-12)


def test_a_rewritten_pad_makes_the_shortcut_narrower() -> None:
    dense = CifarBlock(8, 16, 2).double().eval()
    shortcut, x = dense.shortcut, torch.randn(2, 8, 8, 8, dtype=torch.float64)
    trace = trace_program(shortcut, ModelInputs((x,)), ModelInputs((torch.cat([x, x]),)))
    program = trace.program
    for position in ((1, 4), (1, 5)):
        (slot,) = [
            slot
            for (node, place), slot in trace.slots.items()
            if (node.name, place) == ("pad", position)
        ]
        program = with_integer(program, slot.path, 3)  # 4 before: one of 16 less at each end
    model = copy.deepcopy(dense)
    surgery.reprogram(model, "shortcut", program)
    kept = list(range(1, 15))
    for name in ("conv2.weight", "bn2.weight", "bn2.bias", "bn2.running_mean", "bn2.running_var"):
        surgery.slice_parameter(model, name, 0, kept)
    torch.testing.assert_close(model(x), dense(x)[:, kept], rtol=1e-12, atol=1e-12)


def test_a_rewritten_split_and_batch_multiple_lose_a_head() -> None:
    """Of `reshape(n, -1, 3, 2, 4)` the 2 becomes 1, of `reshape(n, -1, 8)` the 8 becomes 4."""
    dense = make("heads").double().eval()
    program = program_of("heads")
    program = with_integer(program, slot_of("view", (1, 3), "heads"), 1)
    last = [node for node in traced("heads").graph.graph.nodes if "view" in node.name][-1]
    program = with_integer(program, slot_of(last.name, (1, 2), "heads"), 4)
    model = copy.deepcopy(dense)
    surgery.reprogram(model, "", program)
    rows = [i * 8 + j for i in range(3) for j in range(4, 8)]
    surgery.slice_parameter(model, "qkv.weight", 0, rows)
    surgery.slice_parameter(model, "qkv.bias", 0, rows)
    surgery.slice_parameter(model, "out.weight", 1, range(4, 8))
    expected = masked(dense, ("out.weight", [0, 1, 2, 3]))
    assert_equal(model, expected, inputs_of("heads", 3).double(), 1e-12)


@pytest.mark.parametrize("case", CASES)
def test_slots_are_the_integers_of_the_graph(case: str) -> None:
    trace = traced(case)
    assert trace.slots or trace.following
    for (node, position), slot in trace.slots.items():
        if node.op == "placeholder":
            value = node.meta["val"].shape[position[0]]
        else:
            value = (*node.args, *node.kwargs.values())
            for index in position:
                value = value[index]
        assert get_integer(trace.program, slot.path) * slot.scale == value
    assert not set(trace.slots) & trace.following


def test_integers_that_adapt_by_themselves_have_no_slot() -> None:
    class Adapting(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            a, b = x.flatten(1).unflatten(1, (2, -1)).chunk(2, dim=-1)
            return (a * b).reshape(len(x), -1)

    inputs = [ModelInputs((torch.randn(n, 4, 6),)) for n in (2, 3)]
    trace = trace_program(Adapting(), *inputs)
    names = {node: node.name.partition("_")[0] for node in trace.graph.graph.nodes}
    following = {(names[node], position) for node, position in trace.following}
    assert ("split", (1,)) in following  # 6 of 12
    assert {("view", (1, 1)), ("view", (1, 2))} <= following  # 24, and 12 of 24


@pytest.mark.parametrize("case", ["lenet", "heads", "nested", "cifar_resnet"])
def test_the_json_of_the_difference_gives_the_model_back(case: str) -> None:
    reference, model = make(case), programmed(case).eval()
    difference = json.loads(json.dumps(diff(reference, model)))
    assert set(difference["changed"][""]) <= {"program", "buffers"}
    for rebuilt in (rebuild(make(case, seed=1), difference), make(case, seed=1)):
        if not is_programmed(rebuilt):
            apply_difference(rebuilt, difference)
        rebuilt.load_state_dict(model.state_dict(), strict=True)
        assert_equal(model, rebuilt.eval(), inputs_of(case, 3))
        assert diff(rebuilt, model) == diff(model, model)
        assert diff(outline(rebuilt), model) == diff(model, model)


def test_a_programmed_module_inside_a_new_one_is_written_too() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block: nn.Module = nn.Identity()

        def forward(self, x: Tensor) -> Any:
            return self.block(x)

    new = nn.Sequential(nn.Linear(3, 4), nn.Unflatten(1, (2, 2)))
    inputs = [ModelInputs((torch.randn(n, 4),)) for n in (2, 3)]
    surgery.reprogram(new, "1", trace_program(new[1], *inputs).program)
    model = Two()
    surgery.replace(model, "block", new)
    rebuilt = rebuild(Two(), json.loads(json.dumps(diff(Two(), model))))
    rebuilt.load_state_dict(model.state_dict(), strict=True)
    assert is_programmed(rebuilt.block[1])
    assert_equal(model, rebuilt, ModelInputs((torch.randn(5, 3),)))


def test_a_failed_rebuild_leaves_the_model_as_it_was() -> None:
    difference = diff(make("lenet"), programmed("lenet"))
    difference["changed"][""]["parameters"] = {"nothing": None}
    model = make("lenet")
    with pytest.raises(CheckpointError):
        apply_difference(model, difference)
    assert type(model) is LeNet
    assert ATTRIBUTE not in vars(model)


@pytest.mark.parametrize(
    "step",
    [
        ("op", "aten.from_file.default", (("text", "/etc/passwd"),), (), (), ()),
        ("op", "aten.save.default", (1, ("text", "file")), (), (), ()),
        ("op", "quantized.add.default", (), (), (), ()),
        ("op", "aten.view.__class__", (), (), (), ()),
        ("op", "aten.__class__.__init__", (), (), (), ()),
        ("op", "os.system", (("text", "true"),), (), (), ()),
        ("eval", "1 + 1", ()),
        ("call", "conv1", '[1, {"type": "collections.defaultdict"}]', (), 0, ()),
    ],
)
def test_a_file_cannot_name_anything_but_tensor_operations(step: tuple[Any, ...]) -> None:
    program = program_of("lenet")
    bad = (*program[:3], (step, *program[3]), *program[4:])
    with pytest.raises(CheckpointError):
        check_program(bad)
    difference = diff(make("lenet"), programmed("lenet"))
    model = programmed("lenet")
    setattr(model, ATTRIBUTE, bad)
    difference = json.loads(json.dumps(diff(make("lenet"), model)))
    with pytest.raises(CheckpointError):
        rebuild(make("lenet"), difference)


def test_an_attribute_in_the_way_is_not_overwritten() -> None:
    model = make("lenet")
    setattr(model, ATTRIBUTE, "mine")
    with pytest.raises(SurgeryError, match=r"attribute 'compressor_program'"):
        surgery.reprogram(model, "", program_of("lenet"))
    assert type(model) is LeNet


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.relu() if self.training else x.sigmoid()


class Counting(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * float(len(x))


class Detached(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            scale = x.abs().amax()
        return x / scale


class Squared(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sum() + x.new_zeros(len(x) ** 2)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Branching(), "other things in training mode"),
        (Counting(), "with another batch size"),
        (Detached(), "not traced|grad_enabled"),
        (Squared(), "other results in eval mode"),
    ],
)
def test_what_a_program_cannot_hold_is_refused(model: nn.Module, reason: str) -> None:
    inputs = [ModelInputs((torch.randn(n, 4),)) for n in (2, 3)]
    with pytest.raises(ModelError, match=reason):
        trace_program(model, *inputs)


def test_a_patched_forward_and_hooks_are_refused() -> None:
    inputs = [inputs_of("gated", n) for n in (2, 3)]
    patched, hooked = Gated(), Gated()
    vars(patched)["forward"] = lambda x: x
    hooked.register_forward_hook(lambda *_: None)
    for model in (patched, hooked):
        with pytest.raises(ModelError, match="hooks"):
            trace_program(model, *inputs)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["lenet", "gated", "heads", "in_place", "cifar_resnet"])
def test_exports_and_agrees_in_onnx_runtime(case: str, tmp_path: Path) -> None:
    from compressor.export.onnx import export_onnx
    from compressor.export.onnxruntime_model import OnnxRuntimeModel

    model = programmed(case).eval()
    path = export_onnx(model, inputs_of(case, 2), tmp_path / "model.onnx")
    runtime = OnnxRuntimeModel(path)
    for size in (1, 5):
        (expected, *_), (got, *_) = (outputs(m, inputs_of(case, size)) for m in (model, runtime))
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["lenet", "gated", "cifar_block"])
def test_runs_under_export_and_compile(case: str) -> None:
    model, inputs = programmed(case).eval(), inputs_of(case, 3)
    (expected, *_) = outputs(model, inputs)
    with torch.no_grad():
        exported = torch.export.export(model, inputs.args, strict=False).module()
        compiled = torch.compile(model, backend="eager")
        for other in (exported, compiled):
            torch.testing.assert_close(inputs.call(other), expected)


def test_a_model_programmed_at_two_levels() -> None:
    """The root's program calls a programmed child: what `CifarResNet` becomes."""
    model, inputs = CifarResNet(8).eval(), [inputs_of("cifar_resnet", n) for n in (2, 3)]
    before = [copy.deepcopy(model)]
    shortcut = model.layer2[0].shortcut
    taken = [ModelInputs((torch.randn(n, 16, 32, 32),)) for n in (2, 3)]
    surgery.reprogram(model, "layer2.0.shortcut", trace_program(shortcut, *taken).program)
    surgery.reprogram(model, "", trace_program(model, *inputs).program)
    assert_equal(model, before[0], inputs_of("cifar_resnet", 4))
