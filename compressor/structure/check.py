"""The masked-dense check: what is pruned computes what the whole computes with zeros in its place.

Run in float64 on a copy on which no channel hides. Groups are checked all at once and, where that
fails, by halves, so a model whose groups all hold costs a handful of forward passes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils._python_dispatch import TorchDispatchMode

from compressor.errors import ModelError, SurgeryError, first_line
from compressor.interfaces.inputs import ModelInputs, output_tensors
from compressor.structure.cutting import keep_many
from compressor.structure.groups import ChannelGroup, Member
from compressor.structure.surgery import undone
from compressor.structure.trace import FORWARD_FAILURES, copy_model, eval_mode, run

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
SINGLE = Precision(1e-5, 2e-6)  # of a model that returns float32, whatever it is given

IS_OUTPUT = "Its channels are the model's outputs."


class Check:
    """A model on which cuts are tried out.

    Attributes:
        probe: the copy, in float64 on the CPU.
        inputs: two samples.
        dense: its outputs before any cut.
        precision: of the outputs.
        trains: whether it runs on them in training mode.
    """

    def __init__(self, model: nn.Module, inputs: ModelInputs) -> None:
        """Copy `model` and run it once.

        Raises:
            ModelError: if the model cannot be copied, does not run, or gives nothing to compare.
        """
        self.probe = make_probe(model)
        self.inputs = inputs.to("cpu").with_batch(2).double()
        with torch.no_grad(), _KeepsDouble():
            run(self.probe, self.inputs)
        self.dense = _outputs(self.probe, self.inputs)
        is_double = all(out.dtype == torch.float64 for out in self.dense)
        self.precision = DOUBLE if is_double else SINGLE
        self.trains = self._training_failure() is None

    def faults(self, groups: Sequence[ChannelGroup]) -> dict[str, str]:
        """Name of each group that may not be pruned -> why, in a sentence."""
        faults = {
            group.name: "It has a single channel, so none can be removed."
            for group in groups
            if group.size < 2
        }
        rest = [group for group in groups if group.size > 1]
        if self._halve(rest, faults):
            return faults
        sound = [group for group in rest if group.name not in faults]
        while len(sound) > 1 and self.fault(sound):
            # Each holds alone and not with those before it: the last one of the shortest such run.
            low, high = 0, len(sound)  # the first `low` hold together, the first `high` do not
            while high - low > 1:
                middle = (low + high) // 2
                low, high = (low, middle) if self.fault(sound[:middle]) else (middle, high)
            faults[sound.pop(high - 1).name] = "It cannot be pruned together with other groups."
        return faults

    def fault(self, groups: Sequence[ChannelGroup]) -> str | None:
        """Why `groups` cannot be pruned together; None if two cuts of them all are right."""
        largest_effect = effect = 0.0
        for part in range(len(KEPT_FRACTIONS)):
            # Neighbours keep other fractions: code may take half of what two groups make.
            cuts = [
                (group, _some(group.size, KEPT_FRACTIONS[(part + k) % 2], seed=part))
                for k, group in enumerate(groups)
            ]
            removed = sum(group.size - len(kept) for group, kept in cuts)
            cut = f"Without {removed} of its {sum(g.size for g in groups)} channels"
            try:
                with undone(self.probe):
                    keep_many(self.probe, cuts)
                    outputs = _outputs(self.probe, self.inputs)
                    failure = self._training_failure() if self.trains and not part else None
            except SurgeryError as refusal:
                return str(refusal)
            except FORWARD_FAILURES as error_raised:
                return f"{cut} the model does not run: {first_line(error_raised)}"
            if failure is not None:
                return f"{cut} the model does not run in training mode: {failure}"
            masked = self._masked(cuts)
            if _shapes(outputs) != _shapes(masked):
                return IS_OUTPUT
            error, effect = _relative_error(outputs, masked), _relative_error(masked, self.dense)
            limit = max(CLARITY * effect, self.precision.rounding)
            if not error <= min(self.precision.tolerance, limit):
                return f"{cut} the output is off by {error:.1e} of what masking them gives."
            largest_effect = max(largest_effect, effect)
        if largest_effect < VISIBLE:
            return f"Removing its channels changes the output by {effect:.0e}: that proves nothing."
        return None

    def _training_failure(self) -> str | None:
        """What running the probe in training mode raises; its statistics stay as they are."""
        training = [module for module in self.probe.modules() if not module.training]
        with (
            undone(self.probe),
            torch.random.fork_rng(devices=[]),
            torch.no_grad(),
            _KeepsDouble(),
        ):
            for module in self.probe.modules():
                for key, buffer in module._buffers.items():
                    module._buffers[key] = None if buffer is None else buffer.clone()
            self.probe.train()
            try:
                self.inputs.call(self.probe)
            except FORWARD_FAILURES as error:
                return first_line(error)
            finally:
                for module in training:
                    module.training = False
        return None

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

    def _masked(self, cuts: Sequence[tuple[ChannelGroup, Sequence[int]]]) -> list[Tensor]:
        """Outputs of the whole model with zeros wherever a tensor would lose entries."""
        saved: list[tuple[Tensor, Tensor]] = []
        with torch.no_grad():
            try:
                with undone(self.probe):
                    keep_many(self.probe, [(group, range(group.size)) for group, _ in cuts])
                    tensors = {
                        **dict(self.probe.named_parameters(remove_duplicate=False)),
                        **dict(self.probe.named_buffers(remove_duplicate=False)),
                    }
                    for group, kept in cuts:
                        for member in group.members:
                            if _divides_by_itself(member):
                                continue
                            tensor = tensors[member.tensor]
                            saved.append((tensor, tensor.clone()))
                            gone = [e for c in group.pruned(kept) for e in member.index[c]]
                            tensor.index_fill_(member.dim, torch.tensor(gone, dtype=torch.long), 0)
                    return _outputs(self.probe, self.inputs)
            finally:
                for tensor, values in reversed(saved):
                    tensor.copy_(values)


def make_probe(model: nn.Module) -> nn.Module:
    """A copy of `model` in float64 on which no channel hides: for checks only.

    A layer that starts at zero (the last norm of a block, a classifier) hides every error before
    it, one with equal entries hides permutations, one with tiny ones (layer scale) its branch: all
    get random values, and so do the running statistics of the norms.
    """
    probe = copy_model(model).cpu().double().eval().requires_grad_(True)
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


def _outputs(model: nn.Module, inputs: ModelInputs) -> list[Tensor]:
    with eval_mode(model), torch.no_grad(), _KeepsDouble():
        outputs = output_tensors(inputs.call(model))
    if not outputs:
        raise ModelError(
            "The model returns no floating point tensor, so no change of it could be seen. "
            "Return the scores, not the classes."
        )
    return outputs


class _KeepsDouble(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Casts to a coarser type than float64 do nothing: their rounding would hide small errors."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        is_cast = func is torch.ops.aten._to_copy.default and args[0].dtype == torch.float64
        if is_cast and getattr(kwargs.get("dtype"), "is_floating_point", False):
            kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)


def _some(size: int, fraction: float, seed: int) -> list[int]:
    """A part of the channels, by chance; at least one is kept and one removed."""
    order = torch.randperm(size, generator=torch.Generator().manual_seed(PROBE_SEED + seed))
    kept = min(max(round(size * fraction), 1), size - 1)
    return sorted(order[:kept].tolist())


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
