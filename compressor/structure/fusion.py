"""Batch norms folded into the layer before them, and modules that do nothing left out.

In evaluation mode a batch norm is a scale and a shift of each channel, which the weight and bias of
the convolution or linear layer before it take in. Pairs are found by running the model, and kept if
the model computes the same without them, in float64. So a model whose path depends on its inputs
must not be folded: only the path that ran is checked.
"""

from __future__ import annotations

import weakref
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.parametrize import is_parametrized

from compressor.errors import ModelError
from compressor.interfaces.inputs import ModelInputs, output_tensors
from compressor.structure import surgery
from compressor.structure.trace import copy_model, eval_mode, run, watch

LAYERS = frozenset({nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d}) | frozenset(
    {nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d}
)
NORMS = frozenset({nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm})
FROZEN_NORM = "torchvision.ops.misc.FrozenBatchNorm2d"  # by name: torchvision need not be here
IDLE = frozenset({nn.Identity, surgery.Skip})
DROPOUTS = frozenset({nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout})
SAMPLES = 2  # of the inputs; a fold does not depend on the batch
TOLERANCE = {torch.float64: 1e-8}  # relative to the largest output
WIDE_TOLERANCE = 1e-4  # of a model that does not run in float64


@dataclass(frozen=True)
class Fusion:
    """What was left out of a model.

    Attributes:
        folded: (layer, norm) names of the batch norms that are now in a layer's weight.
        removed: names of modules that did nothing.
    """

    folded: tuple[tuple[str, str], ...]
    removed: tuple[str, ...]


@contextmanager
def folded(model: nn.Module, inputs: ModelInputs) -> Iterator[Fusion]:
    """Inside the `with`, `model` is as after `fold`; at its end it has its old modules, to train.

    Raises:
        ModelError: as `fold`.
    """
    with surgery.undone(model):
        yield fold(model, inputs)


def fold(model: nn.Module, inputs: ModelInputs) -> Fusion:
    """Fold batch norms and leave idle modules out of `model`, in place, for inference alone.

    What remains computes what `model` computes in evaluation mode. Layers that are shared, tied,
    parametrized, hooked or called more than once stay as they are. To undo it, use `folded`.

    Args:
        model: on the device of `inputs`.
        inputs: of one call.

    Raises:
        ModelError: if the model does not run on `inputs`, or cannot be copied.
    """
    inputs = inputs.with_batch(min(inputs.batch_size, SAMPLES))
    pairs = _pairs(model, inputs)
    idle = _idle(model)
    if not pairs and not idle:
        return Fusion((), ())
    judge = _Judge(model, inputs)
    kept = _accepted(judge, pairs)
    removed = idle if judge.accepts(kept, idle) else []
    _fold_pairs(model, kept)
    _leave_out(model, removed)
    return Fusion(tuple(kept), tuple(removed))


def fold_batchnorm(
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    *,
    groups: int = 1,
    transposed: bool = False,
) -> tuple[Tensor, Tensor]:
    """Weight and bias of a layer that is followed by `y * scale + shift` of each output channel.

    Args:
        weight: (out, in / groups, …), of a transposed convolution (in, out / groups, …).
        bias: (out,), None is zero.
        scale: (out,).
        shift: (out,).
        groups: of the convolution.
        transposed: the layer is a transposed convolution.
    """
    ones = [1] * (weight.dim() - 2)
    if transposed:
        blocks = weight.double().view(groups, -1, *weight.shape[1:])
        folded_weight = (blocks * scale.view(groups, 1, -1, *ones)).flatten(0, 1)
    else:
        folded_weight = weight.double() * scale.view(-1, 1, *ones)
    folded_bias = shift if bias is None else bias.double() * scale + shift
    return folded_weight.to(weight.dtype), folded_bias.to(weight.dtype)


def norm_scale_and_shift(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """What a batch norm with running statistics does in evaluation mode, (channels,) in float64."""
    named: Any = norm
    return scale_and_shift(
        named.weight, named.bias, named.running_mean, named.running_var, named.eps
    )


def scale_and_shift(
    weight: Tensor | None, bias: Tensor | None, mean: Tensor, variance: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """The same from its tensors, each (channels,)."""
    deviation = (variance.double() + eps).sqrt()
    scale = 1 / deviation if weight is None else weight.detach().double() / deviation
    shift = -mean.double() * scale
    return scale, shift if bias is None else shift + bias.detach().double()


class _Judge:
    """Says whether a fold leaves the outputs as they are, on a copy in float64 if that runs."""

    def __init__(self, model: nn.Module, inputs: ModelInputs) -> None:
        self._model, self._inputs = copy_model(model).double(), inputs.double()
        try:
            self._expected = self._outputs()
        except ModelError:
            self._model, self._inputs = copy_model(model), inputs
            self._expected = self._outputs()

    def accepts(self, pairs: Sequence[tuple[str, str]], removed: Sequence[str] = ()) -> bool:
        with surgery.undone(self._model):
            _fold_pairs(self._model, pairs)
            _leave_out(self._model, removed)
            try:
                outputs = self._outputs()
            except ModelError:
                return False
        return len(outputs) == len(self._expected) and all(map(_is_near, outputs, self._expected))

    def _outputs(self) -> list[Tensor]:
        with eval_mode(self._model), torch.no_grad():
            return [tensor.clone() for tensor in output_tensors(run(self._model, self._inputs))]


def _accepted(judge: _Judge, pairs: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Those that leave the outputs as they are; one wrong pair is found by halving."""
    if not pairs or judge.accepts(pairs):
        return pairs
    if len(pairs) == 1:
        return []
    half = len(pairs) // 2
    return [*_accepted(judge, pairs[:half]), *_accepted(judge, pairs[half:])]


def _is_near(output: Tensor, expected: Tensor) -> bool:
    if output.shape != expected.shape:
        return False
    tolerance = TOLERANCE.get(expected.dtype, WIDE_TOLERANCE)
    scale = float(expected.nan_to_num().abs().max()) if expected.numel() else 1.0
    return torch.allclose(output, expected, rtol=0, atol=tolerance * max(scale, 1), equal_nan=True)


def _pairs(model: nn.Module, inputs: ModelInputs) -> list[tuple[str, str]]:
    """(layer, norm) names where the norm reads the very tensor that the layer wrote."""
    modules = dict(model.named_modules())
    alone = _alone(model)
    calls: Counter[str] = Counter()
    written: dict[int, tuple[str, weakref.ref[Tensor], int]] = {}
    pairs: list[tuple[str, str]] = []

    def note(name: str, received: ModelInputs, outputs: Any) -> None:
        calls[name] += 1
        module = modules[name]
        if isinstance(module, tuple(LAYERS)) and isinstance(outputs, Tensor):
            written[id(outputs)] = (name, weakref.ref(outputs), outputs._version)
        elif _is_norm(module) and received.tensors():
            source = received.tensors()[0]
            layer, tensor, version = written.get(id(source), ("", lambda: None, 0))
            is_same = tensor() is source and source._version == version
            if is_same and _fits(modules[layer], module, source):
                pairs.append((layer, name))

    watch(model, inputs, note)
    return [pair for pair in pairs if all(calls[name] == 1 and name in alone for name in pair)]


def _is_norm(module: nn.Module) -> bool:
    """Whether it is a batch norm that uses its running statistics."""
    if type(module) in NORMS:
        return cast(nn.BatchNorm2d, module).running_mean is not None
    return f"{type(module).__module__}.{type(module).__qualname__}" == FROZEN_NORM


def _fits(layer: nn.Module, norm: nn.Module, between: Tensor) -> bool:
    """Whether the norm's channels are the layer's outputs."""
    if isinstance(layer, nn.Linear) and between.dim() != 2:  # dimension 1 is another one
        return False
    made = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
    return len(cast(Tensor, norm.running_mean)) == made


def _alone(model: nn.Module) -> set[str]:
    """Modules that hang in one place, share no tensor, and compute none: no hooks on them."""
    places: dict[int, list[str]] = defaultdict(list)
    for name, module in model.named_modules(remove_duplicate=False):
        for owned in (module, *module.parameters(recurse=False)):
            places[id(owned)].append(name)
    return {
        name
        for name, module in model.named_modules()
        if not (is_parametrized(module) or module._forward_hooks or module._forward_pre_hooks)
        and all(
            len(places[id(owned)]) == 1 for owned in (module, *module.parameters(recurse=False))
        )
    }


def _idle(model: nn.Module) -> list[str]:
    """Modules that give their input back in evaluation mode, where that takes a call."""
    return [
        name
        for name, module in model.named_modules()
        if name
        and type(module) in IDLE | DROPOUTS
        and (type(module) in DROPOUTS or _in_sequence(model, name))
    ]


def _in_sequence(model: nn.Module, name: str) -> bool:
    return type(surgery.get(model, name.rpartition(".")[0])) is nn.Sequential


def _fold_pairs(model: nn.Module, pairs: Sequence[tuple[str, str]]) -> None:
    for name, norm_name in pairs:
        layer, norm = cast(_ConvNd, surgery.get(model, name)), surgery.get(model, norm_name)
        scale, shift = norm_scale_and_shift(norm)
        is_conv = isinstance(layer, _ConvNd)
        weight, bias = fold_batchnorm(
            layer.weight.detach(),
            None if layer.bias is None else layer.bias.detach(),
            scale,
            shift,
            groups=layer.groups if is_conv else 1,
            transposed=is_conv and layer.transposed,
        )
        flag = layer.weight.requires_grad
        surgery.set_tensor(model, f"{name}.weight", nn.Parameter(weight, requires_grad=flag))
        surgery.set_tensor(model, f"{name}.bias", nn.Parameter(bias, requires_grad=flag))
        _leave_out(model, [norm_name])


def _leave_out(model: nn.Module, names: Sequence[str]) -> None:
    for name in names:
        if _in_sequence(model, name):
            surgery.remove(model, name)
        else:
            surgery.replace(model, name, nn.Identity())
