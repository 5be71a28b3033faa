"""What `benchmarks.coverage` finds out about one model, and how. Each check is a function.

Of every channel group a random 30 % is removed. The result must equal the whole model in which
every entry of the removed channels is zero, in float64; run in ONNX Runtime; and come back from
disk. The weights are random, and settled so that none of them hides an error.
"""

from __future__ import annotations

import random
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from math import inf
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from benchmarks.coverage_models import Case
from benchmarks.limits import Report, one_line
from compressor.export.onnx import export_onnx
from compressor.export.onnxruntime_model import OnnxRuntimeModel
from compressor.interfaces.inputs import ModelInputs, output_tensors
from compressor.structure import archive
from compressor.structure.channels import find_groups, verify_group
from compressor.structure.cutting import keep_many
from compressor.structure.groups import ChannelGroup, ChannelMap
from compressor.structure.trace import copy_model, export_graph

PRUNED_FRACTION = 0.3
EQUAL = 1e-9  # in float64, of the largest output; sums in another order leave 1e-12
ALIKE = 1e-3  # in float32, torch against ONNX Runtime
VISIBLE = 1e-10  # the removal must change the output by more, or its equality says nothing
DEAD = 1e-4  # a channel of less variance would be blown up by its batch norm
FLAT = 1e-2  # a constant below it, such as a layer scale of 1e-6, hides its branch

Cuts = list[tuple[ChannelGroup, Sequence[int]]]


def check_ours(case: Case, seed: int, report: Report) -> None:
    """Everything about this package; reported as soon as it is known."""
    report(stage="building the model")
    model, inputs = make(case, seed)
    report(params=count_params(model))
    report(stage="tracing it")
    report(**attempt("traced", lambda: export_graph(model, inputs) is not None))

    report(stage="finding groups")
    began, began_cpu = time.perf_counter(), time.process_time()
    found = find_groups(model, inputs)
    report(seconds=time.perf_counter() - began, cpu_seconds=time.process_time() - began_cpu)
    cuts = draw_cuts(found, seed)
    report(
        groups=len(found.groups),
        quarantined=[list(entry) for entry in found.quarantined],
        frozen=[[reason, len(layers), list(layers[:3])] for reason, layers in found.frozen],
    )

    report(stage="cutting the channels")
    pruned = copy_model(model)
    keep_many(pruned, cuts)
    report(
        removed=sum(group.size - len(kept) for group, kept in cuts),
        params_kept=count_params(pruned) / count_params(model),
    )
    report(stage="running the pruned model")
    report(**attempt("runs", lambda: outputs_of(pruned, inputs) is not None))
    report(stage="comparing with the masked model")
    report(**attempt("equal", lambda: equals_masked(model, pruned, inputs, cuts, report)))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        report(stage="saving and loading")
        report(**attempt("reloads", lambda: reloads(case, model, pruned, inputs, seed, folder)))
        report(stage="exporting to ONNX")
        fact = attempt("onnx", lambda: matches_in_runtime(pruned, inputs, folder, report))
        report(**fact)
        if not fact["onnx"]:
            report(stage="exporting the unpruned model to ONNX")
            report(**attempt("dense_onnx", lambda: matches_in_runtime(model, inputs, folder)))
    report(stage="training the pruned model")
    report(**attempt("trains", lambda: trains_like(model, pruned, inputs)))
    report(stage="checking a group again")
    report(**attempt("verified", lambda: verifies(model, inputs, found)))


def attempt(name: str, check: Callable[[], bool | str | None]) -> dict[str, Any]:
    """The fact `name` as true or false, and the reason if it is false or the check raised.

    None where there is nothing to be said.
    """
    try:
        answer = check()
    except Exception as error:  # anything that a model or a tool raises is a reason
        answer = one_line(error)
    if answer is None or answer is True:
        return {name: answer}
    return {name: False, f"{name}_reason": str(answer)}


# --------------------------------------------------------------------------------------- the model


def make(case: Case, seed: int) -> tuple[nn.Module, ModelInputs]:
    """The model of `case`, settled; the same for the same seed."""
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, inputs = case.build()
        settle(model, inputs)
    return model, inputs


@torch.no_grad()
def settle(model: nn.Module, inputs: ModelInputs) -> None:
    """Give `model`, in place, weights that hide nothing and activations of a moderate size.

    Zeros hide every error behind them, equal entries hide permutations, a layer scale of 1e-6 hides
    its branch. Batch norms measure their statistics on `inputs`, else the values of a deep network
    with random weights leave float32.
    """
    for name, parameter in model.named_parameters():
        first = parameter.flatten()[:1]
        is_zero = not bool(parameter.any())
        is_constant = parameter.numel() > 1 and bool((parameter == first).all())
        if not (is_zero or is_constant):
            continue
        if is_zero and parameter.dim() > 1:
            parameter.normal_(std=parameter[0].numel() ** -0.5)
        elif name.endswith("bias"):
            parameter.normal_(std=0.1)
        elif bool(first.abs() < FLAT):
            parameter.uniform_(0.5, 1.5)
        else:
            parameter.mul_(torch.empty_like(parameter).uniform_(0.75, 1.25))
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
        norm.train()
    try:
        inputs.call(model)
    except ValueError:  # one value a channel has no variance
        pass
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()
        assert norm.running_mean is not None
        assert norm.running_var is not None
        norm.running_var.clamp_min_(DEAD)
        deviation = norm.running_var.sqrt()
        norm.running_mean += 0.1 * deviation * torch.randn_like(deviation)
        norm.running_var *= torch.empty_like(deviation).uniform_(0.75, 1.25)


def draw_cuts(found: ChannelMap, seed: int) -> Cuts:
    """Every group with a random 30 % of its channels removed, at least one and not all."""
    generator = random.Random(seed)
    cuts: Cuts = []
    for group in found.groups:
        pruned = min(max(1, round(PRUNED_FRACTION * group.size)), group.size - 1)
        kept = sorted(generator.sample(range(group.size), group.size - pruned))
        cuts.append((group, kept))
    return cuts


def count_params(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def prunable_fraction(model: nn.Module, groups: Sequence[ChannelGroup]) -> float:
    """Share of the output channels of convolutions and linear layers that belong to a group.

    Args:
        model: as the members of the groups name its tensors.
        groups: all that were found.
    """
    outputs = {
        f"{name}.weight" if name else "weight": size
        for name, module in model.named_modules()
        if (size := output_channels(module)) is not None
    }
    covered: dict[str, set[int]] = {}
    for group in groups:
        for member in group.producers if group.size > 1 else ():
            if member.tensor in outputs:
                entries = {entry for channel in member.index for entry in channel}
                covered.setdefault(member.tensor, set()).update(entries)
    return sum(map(len, covered.values())) / max(1, sum(outputs.values()))


def output_channels(module: nn.Module) -> int | None:
    """How many, of a convolution or linear layer; None of anything else."""
    if type(module).__name__ == "Conv1D":  # the linear layer of GPT-2
        return int(module.nf)
    size = getattr(module, "out_channels", None) or getattr(module, "out_features", None)
    weight = getattr(module, "weight", None)
    return int(size) if isinstance(size, int) and isinstance(weight, Tensor) else None


# -------------------------------------------------------------------------------------- the checks


def outputs_of(model: nn.Module, inputs: ModelInputs) -> list[Tensor]:
    model.eval()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [tensor.detach() for tensor in output_tensors(inputs.call(model))]


def equals_masked(
    model: nn.Module, pruned: nn.Module, inputs: ModelInputs, cuts: Cuts, report: Report
) -> bool | str:
    """Whether `pruned` computes what `model` does without the removed channels, in float64."""
    inputs = inputs.double()
    whole = copy_model(model)
    keep_many(whole, [(group, range(group.size)) for group, _ in cuts])  # only prepared
    report(prunable_fraction=prunable_fraction(whole, [group for group, _ in cuts]))
    dense = outputs_of(copy_model(model).double(), inputs)
    if (error := relative_error(outputs_of(whole.double(), inputs), dense)) > EQUAL:
        return f"prepared for pruning and not pruned, the model is off by {error:.1e}"
    mask(whole, cuts)
    masked = outputs_of(whole, inputs)
    error = relative_error(outputs_of(copy_model(pruned).double(), inputs), masked)
    effect = relative_error(masked, dense)
    report(error=error, effect=effect)
    if not error <= EQUAL:
        return f"off by {error:.1e} of the masked model"
    return effect > VISIBLE or f"the removal changes the output by {effect:.0e}: no proof"


@torch.no_grad()
def mask(model: nn.Module, cuts: Cuts) -> None:
    """Set every entry of the removed channels to zero, in place."""
    tensors: Mapping[str, Tensor] = dict(model.named_parameters(remove_duplicate=False)) | dict(
        model.named_buffers(remove_duplicate=False)
    )
    for group, kept in cuts:
        pruned = group.pruned(list(kept))
        for member in group.members:
            entries = [entry for channel in pruned for entry in member.index[channel]]
            tensors[member.tensor].index_fill_(member.dim, torch.tensor(entries).long(), 0)


def trains_like(model: nn.Module, pruned: nn.Module, inputs: ModelInputs) -> bool | None:
    """Whether `pruned` runs forward and backward in training mode; None if `model` does not."""
    try:
        backward(copy_model(model), inputs)
    except Exception:
        return None  # such as a detector, which then wants targets
    backward(copy_model(pruned), inputs)
    return True


def backward(model: nn.Module, inputs: ModelInputs) -> None:
    model.train()
    outputs = [tensor for tensor in output_tensors(inputs.call(model)) if tensor.requires_grad]
    sum(tensor.mean() for tensor in outputs).backward()


def verifies(model: nn.Module, inputs: ModelInputs, found: ChannelMap) -> bool | str:
    """Whether the package's own check of a group, the one with most members, says so again."""
    if not found.groups:
        return True
    return verify_group(model, inputs, max(found.groups, key=lambda g: len(g.members))) or True


def reloads(
    case: Case, model: nn.Module, pruned: nn.Module, inputs: ModelInputs, seed: int, folder: Path
) -> bool | str:
    """Whether a fresh instance gets the pruned model back from a folder, to the last bit."""
    archive.save(pruned, folder / "saved", reference=model)
    fresh, _ = make(case, seed + 1)
    loaded = archive.load(folder / "saved", fresh)
    error = relative_error(outputs_of(loaded, inputs), outputs_of(pruned, inputs))
    return error == 0 or f"the loaded model is off by {error:.1e}"


def matches_in_runtime(
    model: nn.Module, inputs: ModelInputs, folder: Path, report: Report | None = None
) -> bool | str:
    """Whether the exported file gives the model's outputs in ONNX Runtime."""
    path = export_onnx(model, inputs, folder / "model.onnx")
    answers = output_tensors(inputs.call(OnnxRuntimeModel(path)))
    error = relative_error(answers, outputs_of(model, inputs))
    if report:
        report(onnx_error=error)
    return error <= ALIKE or f"ONNX Runtime is off by {error:.1e}"


def relative_error(outputs: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Largest difference as a fraction of the largest value of that output; inf for other shapes.

    Integers among the outputs are not compared.
    """
    if [tensor.shape for tensor in outputs] != [tensor.shape for tensor in expected]:
        return inf
    worst = 0.0
    for output, target in zip(outputs, expected, strict=True):
        if target.numel():
            output, target = output.double(), target.double()
            scale = float(target.abs().max()) or 1.0
            error = float((output - target).abs().max()) / scale
            worst = max(worst, error if error == error else inf)
    return worst
