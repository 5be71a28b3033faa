"""One pass without gradients, in which the layers behind an edit make up for it.

Each layer, before it runs, gets the weights with which it gives what it gave in the unchanged model
as nearly as possible, from what it is given now. Where its output is added to another tensor, the
sum is what it aims at, so that a block makes up for the one that was removed before it (He et al.
2017, 1707.06168, section 3.3). A batch norm keeps its statistics behind such a layer; behind others
they change as those of what it is given did: what a small sample gets wrong, it gets wrong in the
unchanged model too.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from compressor.structure.factored import Factored
from compressor.structure.repair.linear_maps import (
    Fit,
    LinearMap,
    as_linear_map,
    fit_linear_map,
    inputs_at,
)
from compressor.structure.repair.moments import Moments, moments_of
from compressor.structure.repair.targets import Others, Target, norm_gain
from compressor.structure.run_record import RunRecord, first_tensor
from compressor.structure.trace import FORWARD_FAILURES, eval_mode

SUFFICIENT = 4096  # positions, for all layers but the widest
NO_MOMENTS: Mapping[str, Moments] = {}
TINY = 1e-12  # variance of a channel that is constant in the sample, which tells no scale
SMALL_GAIN = 1e-2  # of a norm's largest: behind less, a sum cannot be aimed at

T = TypeVar("T")


def repair(
    model: nn.Module,
    targets: Mapping[str, Target],
    record: RunRecord,
    call: Callable[[nn.Module], T],
    *,
    kept: Mapping[str, Tensor],
    since: int = 0,
    until: int | None = None,
    moments: Mapping[str, Moments] = NO_MOMENTS,
    frozen: Collection[str] = (),
    share: float = 1.0,
) -> T:
    """Repair `model` in place, while it runs once; what that run gives.

    Args:
        model: an edited copy of the one that `targets` and `record` are of.
        targets: of the layers; those that have none keep their weights.
        record: of a run of the unchanged model.
        call: runs the model on the inputs that `targets` are of.
        kept: which outputs of the unchanged layer each layer has; those not listed keep their
            weights.
        since: time in `record` from which on modules are repaired.
        until: time after which layers keep their weights; None is never.
        moments: of what the batch norms of the unchanged model are given on the same inputs; where
            they are not known, a norm takes those of the edited model as they are.
        frozen: names of layers that keep their weights.
        share: of the positions, which are used where there are many; fewer are faster.
    """
    modules = {
        name: module
        for name, module in model.named_modules()
        if record.counts[name] == 1 and record.start_of(name) >= since
    }
    targets = {
        name: targets[name]
        for name in modules
        if name in targets
        and name not in frozen
        and (until is None or record.start_of(name) <= until)
    }
    repairing = _Repair(model, targets, record, kept, moments, share)
    handles: list[Any] = []
    with eval_mode(model), torch.no_grad(), repairing.others.watched(dict(model.named_modules())):
        for name, module in modules.items():
            if isinstance(module, _BatchNorm):
                meet = partial(repairing.meet, name)
                handles.append(module.register_forward_pre_hook(meet, with_kwargs=True))
            elif name in repairing.layers:
                hook = partial(repairing.refit, name)
                layer = repairing.layers[name]
                handles.append(layer.register_forward_pre_hook(hook, with_kwargs=True))
        try:
            return call(model)
        finally:
            for handle in handles:
                handle.remove()


class _Repair:
    def __init__(
        self,
        model: nn.Module,
        targets: Mapping[str, Target],
        record: RunRecord,
        kept: Mapping[str, Tensor],
        moments: Mapping[str, Moments],
        share: float,
    ) -> None:
        self._moments = moments
        self._layer_before = {norm: layer for layer, norm in record.norms.items()}
        self._norms = {
            layer: (norm, module)
            for layer, norm in record.norms.items()
            if isinstance(module := _get(model, norm), _BatchNorm)
        }
        self._kept = kept
        self._targets = {name: _part(target, share) for name, target in targets.items()}
        self._constants: dict[str, Tensor] = {}  # what was to be added before a norm, by its name
        self.layers: dict[str, LinearMap] = {}
        for name in targets.keys() & kept.keys():
            layer = _linear_map_in(_get(model, name))
            if layer is not None and len(layer.weight) == len(kept[name]):
                self.layers[name] = layer
        drawn = {
            name: (self._targets[name].shape, self._targets[name].positions)
            for name in self.layers
            if self._targets[name].sums is not None
        }
        self.others = Others(record, self.layers, drawn)

    def refit(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Give a layer new weights, before it runs, if they are better."""
        del module
        try:
            self._refit(name, first_tensor((args, kwargs)))
        except FORWARD_FAILURES:
            return  # of another shape than in the unchanged model

    def meet(self, name: str, norm: _BatchNorm, args: Any, kwargs: Any) -> None:
        """Set the statistics of a batch norm, before it runs."""
        mean, variance = norm.running_mean, norm.running_var
        if mean is None or variance is None:
            return
        constant = self._constants.get(name)
        if constant is not None:
            mean.sub_(constant.to(mean))
            return
        value = first_tensor((args, kwargs))
        found = None if value is None else moments_of(value)
        if found is None:
            return
        before = self._moments_before(name, len(mean))
        if before is None:
            mean.copy_(found.mean)
            variance.copy_(found.variance)
        else:
            # By as many deviations as the sample is beside the statistics, it stays beside them.
            is_told = (before.variance > TINY) & (found.variance > TINY)
            scale = torch.where(is_told, found.variance / before.variance, 1.0)
            mean.copy_(found.mean + (mean.to(found.mean) - before.mean) * scale.sqrt())
            variance.mul_(scale.to(variance))

    def _moments_before(self, name: str, channels: int) -> Moments | None:
        """Of what the unchanged model gives the norm, in the channels that are left."""
        before = self._moments.get(name)
        if before is None or len(before.mean) == channels:
            return before
        rows = self._kept.get(self._layer_before.get(name, name))
        if rows is None or len(rows) != channels:
            return None
        rows = rows.to(before.mean.device)
        return Moments(before.mean[rows], before.variance[rows])

    def _refit(self, name: str, value: Tensor | None) -> None:
        layer, target = self.layers[name], self._targets[name]
        _, norm = self._norms.get(name, ("", None))
        if value is None:
            return
        inputs = inputs_at(layer, value, target.positions)
        weight = layer.weight.detach().to(inputs.dtype)
        weight = weight.reshape(len(inputs), -1, inputs.shape[2])
        fit = fit_linear_map(
            inputs,
            self._wanted(name, target, norm).to(inputs.dtype),
            weight,
            target.is_held,
            has_bias=layer.bias is not None or norm is not None,
        )
        if fit is not None:
            self._write(name, layer, fit)

    def _wanted(self, name: str, target: Target, norm: _BatchNorm | None) -> Tensor:
        """(positions, outputs) that the layer should give."""
        rows = self._kept[name].to(target.outputs.device)
        outputs, other = target.outputs[:, rows], self.others.values.get(name)
        if target.sums is None or other is None or other.shape != outputs.shape:
            return outputs
        wanted = target.sums[:, rows] - other
        if norm is None:
            return wanted
        assert norm.running_mean is not None
        gain = norm_gain(norm)
        wanted = wanted - (0 if norm.bias is None else norm.bias)
        wanted = wanted / gain + norm.running_mean
        return torch.where(gain.abs() > SMALL_GAIN * gain.abs().max(), wanted, outputs)

    def _write(self, name: str, layer: LinearMap, fit: Fit) -> None:
        layer.weight.copy_(fit.weight.flatten(0, 1).view_as(layer.weight))
        if layer.bias is not None:
            layer.bias.copy_(fit.bias)
        if name in self._norms:
            zeros = torch.zeros_like(fit.bias)
            self._constants[self._norms[name][0]] = fit.bias if layer.bias is None else zeros


def _linear_map_in(module: nn.Module | None) -> LinearMap | None:
    """The layer whose output is that of `module`: itself, or the last of a low-rank form."""
    if isinstance(module, Factored):
        module = module.layers[-1]
    return None if module is None else as_linear_map(module)


def _get(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


def _part(target: Target, share: float) -> Target:
    """The first `share` of the positions, and no fewer than suffice."""
    count = max(round(share * len(target.outputs)), SUFFICIENT)
    return Target(
        target.shape,
        tuple(numbers[:count] for numbers in target.positions),
        target.is_held[:count],
        target.outputs[:count],
        None if target.sums is None else target.sums[:count],
    )
