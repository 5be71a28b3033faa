"""The masked-dense check: what is pruned computes what the whole computes with zeros in its place.

Run in float64 on a copy on which no channel hides. Groups are checked all at once and, where that
fails, by halves, so a model whose groups all hold costs a handful of forward passes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from compressor.errors import ModelError, SurgeryError, first_line
from compressor.interfaces.inputs import ModelInputs, output_tensors
from compressor.structure.cutting import keep_many
from compressor.structure.groups import ChannelGroup, Member
from compressor.structure.surgery import undone
from compressor.structure.trace import FORWARD_FAILURES, copy_for_analysis, eval_mode, in_mode, run

VISIBLE = 1e-10  # a smaller change of the output would be rounding, and prove nothing
CLARITY = 1e-3  # the error of the cut, as a fraction of the change that the cut makes
PROBE_SEED = 0  # of the perturbations and subsets: the same groups in every run
KEPT_FRACTIONS = (2 / 3, 1 / 3)


@dataclass(frozen=True)
class Precision:
    """How exact the outputs of a model are, as fractions of their largest values.

    Attributes:
        tolerance: an error above it is one in any case.
        rounding: an error below it is none in any case.
    """

    tolerance: float
    rounding: float


DOUBLE = Precision(1e-9, 1e-13)  # errors are near 1e-15, summed in another order
SINGLE = Precision(1e-5, 2e-6)  # of a model that runs in float32 alone

Cuts: TypeAlias = Sequence[tuple[ChannelGroup, Sequence[int]]]

IS_OUTPUT = "Its channels are the model's outputs."


class Check:
    """A model on which cuts are tried out.

    Attributes:
        probe: the copy, in float64 on the CPU.
        inputs: two samples.
        dense: its outputs before any cut.
        precision: of the outputs.
    """

    def __init__(self, model: nn.Module, inputs: ModelInputs) -> None:
        """Copy `model` and run it once.

        Raises:
            ModelError: if the model cannot be copied, does not run, or gives nothing to compare.
        """
        self.probe, self.inputs, self.precision = _start(model, inputs.to("cpu").with_batch(2))
        self.dense = self._outputs()
        if any(out.dtype != torch.float64 for out in self.dense):
            self.precision = SINGLE
        self._dense_in_training, self._is_random = self._try_training()

    @property
    def trains(self) -> bool:
        """Whether the model runs on the inputs in training mode."""
        return self._dense_in_training is not None

    def faults(self, groups: Sequence[ChannelGroup]) -> dict[str, str]:
        """Name of each group that may not be pruned -> why, in a sentence."""
        faults = {
            group.name: "It has a single channel, so none can be removed."
            for group in groups
            if group.size < 2
        }
        rest = [group for group in groups if group.size > 1]
        self._halve(rest, faults)
        sound = [group for group in rest if group.name not in faults]
        while len(sound) > 1 and self.fault(sound):
            # Each holds alone and not with those before it: the last one of the shortest such run.
            low, high = 0, len(sound)  # the first `low` hold together, the first `high` do not
            while high - low > 1:
                middle = (low + high) // 2
                low, high = (low, middle) if self.fault(sound[:middle]) else (middle, high)
            faults[sound.pop(high - 1).name] = "It cannot be pruned together with other groups."
        return faults | self._unproven(sound)

    def fault(self, groups: Sequence[ChannelGroup]) -> str | None:
        """Why `groups` cannot be pruned together; None if two cuts of them all are right."""
        for part in range(len(KEPT_FRACTIONS)):
            # Neighbours keep other fractions: code may take half of what two groups make.
            cuts = [(group, _kept(group.size, k % 2, part)) for k, group in enumerate(groups)]
            fault = self._cut_fault(cuts, in_training=False)
            if fault is None and self.trains and not part:
                fault = self._cut_fault(cuts, in_training=True)
            if fault is not None:
                return fault
        return None

    def _cut_fault(self, cuts: Cuts, *, in_training: bool) -> str | None:
        """Why one cut is wrong, in one of the two modes."""
        removed = sum(group.size - len(kept) for group, kept in cuts)
        total = sum(group.size for group, _ in cuts)
        where = ", in training mode," if in_training else ""
        cut = f"Without {removed} of its {total} channels{where}"
        try:
            with undone(self.probe):
                keep_many(self.probe, cuts)
                outputs = self._outputs(in_training=in_training)
        except SurgeryError as refusal:
            return str(refusal)
        except FORWARD_FAILURES as failure:
            return f"{cut} the model does not run: {first_line(failure)}"
        if in_training and self._is_random:
            return None  # dropout of another width draws other numbers
        masked = self._masked(cuts, in_training=in_training)
        if _shapes(outputs) != _shapes(masked):
            return IS_OUTPUT
        dense = self._dense_in_training if in_training else self.dense
        assert dense is not None
        error, effect = _relative_error(outputs, masked), _relative_error(masked, dense)
        limit = max(CLARITY * effect, self.precision.rounding)
        if not error <= min(self.precision.tolerance, limit):
            return f"{cut} the output is off by {error:.1e} of what masking them gives."
        return None

    def _unproven(self, groups: Sequence[ChannelGroup]) -> dict[str, str]:
        """Groups of which nothing shows at the outputs: a dead unit would hide every error."""
        visible = self._visible(groups)
        faults = {}
        for group in groups:
            if group.name not in visible:
                cuts = [(group, _kept(group.size, 0, part)) for part in range(len(KEPT_FRACTIONS))]
                effect = max(_relative_error(self._masked([cut]), self.dense) for cut in cuts)
                if effect < VISIBLE:
                    faults[group.name] = (
                        f"Removing its channels changes the output by {effect:.0e}: that proves "
                        "nothing."
                    )
        return faults

    def _visible(self, groups: Sequence[ChannelGroup]) -> set[str]:
        """Names of the groups on which the outputs depend, by their gradients: one pass for all."""
        generator = torch.Generator().manual_seed(PROBE_SEED)
        with undone(self.probe):
            keep_many(self.probe, [(group, range(group.size)) for group in groups])
            tensors = _tensors(self.probe)
            used = {m.tensor for group in groups for m in group.members}
            wanted = {name: tensors[name] for name in used if tensors[name].requires_grad}
            if not wanted:
                return set()
            with torch.enable_grad(), eval_mode(self.probe):
                try:
                    with _KeepsDouble():
                        outputs = output_tensors(self.inputs.call(self.probe))
                    total = sum(
                        (out * torch.rand(out.shape, generator=generator)).sum()
                        for out in outputs
                        if out.requires_grad
                    )
                    if not isinstance(total, Tensor):
                        return set()
                    found = torch.autograd.grad(total, list(wanted.values()), allow_unused=True)
                except FORWARD_FAILURES:
                    return set()
        gradients = dict(zip(wanted, found, strict=True))
        return {
            group.name
            for group in groups
            if any(_depends(gradients.get(member.tensor), member) for member in group.members)
        }

    def _outputs(self, *, in_training: bool = False, seed: int = PROBE_SEED) -> list[Tensor]:
        """What the probe gives; its statistics stay as they are.

        Raises:
            ModelError: if there is nothing to compare.
        """
        if not in_training:
            with eval_mode(self.probe), torch.no_grad(), _KeepsDouble():
                outputs = output_tensors(self.inputs.call(self.probe))
        else:
            modes = [(module, module.training) for module in self.probe.modules()]
            with undone(self.probe), torch.random.fork_rng(), torch.no_grad(), _KeepsDouble():
                torch.manual_seed(seed)
                for module, _ in modes:
                    for key, buffer in module._buffers.items():
                        module._buffers[key] = None if buffer is None else buffer.clone()
                try:
                    outputs = output_tensors(
                        self.inputs.call(in_mode(self.probe, is_training=True))
                    )
                finally:
                    for module, mode in modes:
                        module.training = mode
        if not outputs:
            raise ModelError(
                "The model returns no floating point tensor, so no change of it could be seen. "
                "Return the scores, not the classes."
            )
        return outputs

    def _try_training(self) -> tuple[list[Tensor] | None, bool]:
        """The outputs in training mode, if it runs, and whether they depend on chance."""
        try:
            first, second = (self._outputs(in_training=True, seed=seed) for seed in (0, 1))
        except (ModelError, *FORWARD_FAILURES):
            return None, True
        same = _shapes(first) == _shapes(second) and all(map(torch.equal, first, second))
        return first, not same

    def _halve(self, groups: Sequence[ChannelGroup], faults: dict[str, str]) -> bool:
        """Whether `groups` hold together; into `faults` those that do not hold alone."""
        fault = self.fault(groups) if groups else None
        if fault is None:
            return True
        if len(groups) == 1:
            faults[groups[0].name] = fault
            return False
        middle = len(groups) // 2
        self._halve(groups[:middle], faults)
        self._halve(groups[middle:], faults)
        return False

    def _masked(self, cuts: Cuts, *, in_training: bool = False) -> list[Tensor]:
        """Outputs of the whole model with zeros wherever a tensor would lose entries."""
        saved: list[tuple[Tensor, Tensor]] = []
        with torch.no_grad():
            try:
                with undone(self.probe):
                    keep_many(self.probe, [(group, range(group.size)) for group, _ in cuts])
                    tensors = _tensors(self.probe)
                    for group, kept in cuts:
                        for member in group.members:
                            if _divides_by_itself(member):
                                continue
                            tensor = tensors[member.tensor]
                            saved.append((tensor, tensor.clone()))
                            gone = [e for c in group.pruned(kept) for e in member.index[c]]
                            tensor.index_fill_(member.dim, torch.tensor(gone, dtype=torch.long), 0)
                    return self._outputs(in_training=in_training)
            finally:
                for tensor, values in reversed(saved):
                    tensor.copy_(values)


def make_probe(model: nn.Module) -> nn.Module:
    """A copy of `model` in float64 on which no channel hides: for checks only.

    A layer that starts at zero (the last norm of a block, a classifier) hides every error before
    it, one with equal entries hides permutations, one with tiny ones (layer scale) its branch: all
    get random values, and so do the running statistics of the norms.
    """
    probe = copy_for_analysis(model).double().requires_grad_(True)
    generator = torch.Generator().manual_seed(PROBE_SEED)

    def positive(like: Tensor) -> Tensor:
        return torch.rand(like.shape, generator=generator, dtype=like.dtype) + 0.5

    with torch.no_grad():
        for parameter in probe.parameters():
            is_constant = parameter.numel() > 1 and bool(
                (parameter == parameter.flatten()[0]).all()
            )
            if is_constant or not parameter.any():
                parameter.copy_(positive(parameter))
        for module in probe.modules():
            if isinstance(module, _NormBase) and module.running_mean is not None:
                assert module.running_var is not None
                module.running_mean += positive(module.running_mean) - 1
                module.running_var *= positive(module.running_var)
    return probe


def _divides_by_itself(member: Member) -> bool:
    """The direction of a weight norm: its scale is zero already, and 0 / 0 would be nan."""
    return member.side == "out" and member.tensor.endswith(("original1", "weight_v"))


class _KeepsDouble(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Casts to a coarser type than float64 do nothing: their rounding would hide small errors.

    What is made without other tensors is made in float64 as well.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if getattr(kwargs.get("dtype"), "is_floating_point", False):  # of a cast, or of a factory
            kwargs["dtype"] = torch.float64
        result = func(*args, **kwargs)
        given = pytree.tree_leaves([args, kwargs])
        is_made = isinstance(result, Tensor) and not any(isinstance(x, Tensor) for x in given)
        return result.double() if is_made and result.is_floating_point() else result


def _kept(size: int, first: int, part: int) -> tuple[int, ...]:
    """The channels that stay in one of two cuts: what the other removes, and no others.

    Args:
        size: of the group.
        first: which of `KEPT_FRACTIONS` stays in the first cut.
        part: 0 for the first cut, 1 for the second.
    """
    order = torch.randperm(size, generator=torch.Generator().manual_seed(PROBE_SEED)).tolist()
    border = min(max(round(size * KEPT_FRACTIONS[first]), 1), size - 1)
    return tuple(sorted(order[border:] if part else order[:border]))


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def _depends(gradient: Tensor | None, member: Member) -> bool:
    if gradient is None:
        return False
    entries = [entry for channel in member.index for entry in channel]
    return bool(gradient.index_select(member.dim, torch.tensor(entries)).any())


def _start(model: nn.Module, inputs: ModelInputs) -> tuple[nn.Module, ModelInputs, Precision]:
    """The probe and its inputs: in float64, or in float32 if the model runs in that alone."""
    probe, double = make_probe(model), inputs.double()
    try:
        with torch.no_grad(), _KeepsDouble():
            run(probe, double)
        return probe, double, DOUBLE
    except ModelError:
        single, given = probe.float(), inputs.float()
        with torch.no_grad():
            run(single, given)
        return single, given, SINGLE


def _shapes(outputs: Sequence[Tensor]) -> list[torch.Size]:
    return [out.shape for out in outputs]


def _relative_error(outputs: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Largest difference, as a fraction of the largest value of the same output.

    Infinite if a detector found other numbers of boxes.
    """
    if _shapes(outputs) != _shapes(expected):
        return inf
    worst = 0.0
    for output, target in zip(outputs, expected, strict=True):
        if not target.numel():
            continue
        scale = target.abs().max().item() or 1.0
        error = ((output - target).abs().max() / scale).item()
        worst = max(worst, error if error == error else inf)
    return worst
