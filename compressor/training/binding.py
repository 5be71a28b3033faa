"""An optimizer's state by the names of the parameters: it follows surgery, and goes into files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from compressor.errors import CheckpointError, SurgeryError
from compressor.structure.surgery import Edit, Slice

Names = Mapping[int, tuple[str, ...]]


def parameter_names(model: nn.Module) -> dict[int, tuple[str, ...]]:
    """`id` of each parameter -> its names; a tied one has several."""
    names: dict[int, tuple[str, ...]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[id(parameter)] = (*names.get(id(parameter), ()), name)
    return names


def check_bound(optimizer: Optimizer, model: nn.Module) -> None:
    """Do nothing if every parameter that `optimizer` steps is one of `model`.

    Raises:
        SurgeryError: if one is not: it would be trained in vain, and its successor not at all.
    """
    names = parameter_names(model)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if id(parameter) not in names:
                raise SurgeryError(
                    f"The optimizer steps a parameter of shape {tuple(parameter.shape)}, which is "
                    "not the model's. Make it from the model's parameters, and change the model "
                    "during training only through `state.edit`."
                )


def rebind(optimizer: Optimizer, before: Names, model: nn.Module, edit: Edit) -> None:
    """Let `optimizer` follow `edit`, in place: moments are sliced, dropped, or begin with 0.

    Groups keep their options. An added parameter that requires grad joins the group of the one
    with the most similar name.

    Args:
        optimizer: bound to the parameters before the edit; so remain its schedulers.
        before: `parameter_names` before the edit.
        model: after the edit.
        edit: what happened.
    """
    after = dict(model.named_parameters(remove_duplicate=False))
    groups: dict[str, list[nn.Parameter]] = {}  # name before the edit -> list of its group
    for group in optimizer.param_groups:
        old_parameters, parameters = list(group["params"]), group["params"]
        parameters.clear()  # the list stays the same object: LBFGS keeps it
        for old in old_parameters:
            groups.update(dict.fromkeys(before[id(old)], parameters))
            moments = optimizer.state.pop(old, None)
            name = next((n for n in before[id(old)] if _is_heir(n, old, after, edit)), None)
            if name is None:
                continue
            parameters.append(after[name])
            moments = _slice_moments(moments, old.shape, edit.sliced.get(name, ()))
            if moments:
                optimizer.state[after[name]] = moments
    _add(groups, after, edit)


def optimizer_state(optimizer: Optimizer, model: nn.Module) -> dict[str, Any]:
    """What `optimizer` remembers, by parameter name, for `load_optimizer_state`."""
    names = parameter_names(model)
    return {
        "groups": [
            {**group, "params": [names[id(parameter)][0] for parameter in group["params"]]}
            for group in optimizer.param_groups
        ],
        "state": {
            names[id(parameter)][0]: {"shape": list(parameter.shape), "values": dict(values)}
            for parameter, values in optimizer.state.items()
        },
    }


def load_optimizer_state(optimizer: Optimizer, model: nn.Module, saved: Mapping[str, Any]) -> None:
    """Give `optimizer` what `optimizer_state` took, in place.

    Raises:
        CheckpointError: if it steps other parameters, or of other shapes; torch's own loading goes
            by position, takes any shape, and fails at the next step.
    """
    names = parameter_names(model)
    index: dict[str, int] = {}
    shapes: dict[str, list[int]] = {}
    groups = []
    for group, saved_group in _pairs(optimizer.param_groups, saved["groups"]):
        mine = [names[id(parameter)][0] for parameter in group["params"]]
        if set(mine) != set(saved_group["params"]):
            odd = sorted(set(mine) ^ set(saved_group["params"]))
            raise CheckpointError(
                f"The saved optimizer and this one do not step the same parameters: {odd[0]!r} is "
                "only in one of them. Resume with the optimizer that the fit began with."
            )
        for name, parameter in zip(mine, group["params"], strict=True):
            shapes[name] = list(parameter.shape)
            index[name] = len(index)
        groups.append({**saved_group, "params": [index[name] for name in mine]})
    for name, entry in saved["state"].items():
        if shapes[name] != entry["shape"]:
            raise CheckpointError(
                f"The saved optimizer state of {name!r} is for shape {entry['shape']}, and the "
                f"parameter has {shapes[name]}. Resume with the model that the fit ended with."
            )
    state = {index[name]: dict(entry["values"]) for name, entry in saved["state"].items()}
    optimizer.load_state_dict({"param_groups": groups, "state": state})


def cut(value: Tensor, cuts: Sequence[Slice]) -> Tensor:
    """What is left of `value` after the cuts of its parameter: a new tensor."""
    for dim, kept in cuts:
        value = value.index_select(dim, torch.tensor(kept, device=value.device))
    return value


def _is_heir(name: str, old: Tensor, after: Mapping[str, nn.Parameter], edit: Edit) -> bool:
    """Whether what is now called `name` goes on from `old`."""
    return name in after and (after[name] is old or name in edit.sliced)


def _slice_moments(
    moments: Mapping[str, Any] | None, shape: torch.Size, cuts: Sequence[Slice]
) -> dict[str, Any] | None:
    """Tensors of the parameter's shape are cut like it, single values stay.

    Factored moments (Adafactor) have another shape; then all begin anew, as halves do not fit.
    """
    if not moments or not cuts:
        return dict(moments) if moments else None
    values = {}
    for key, value in moments.items():
        if isinstance(value, Tensor) and value.shape == shape and value.dim():
            value = cut(value, cuts)
        elif isinstance(value, Tensor) and value.numel() > 1:
            return None
        values[key] = value
    return values


def _add(
    groups: Mapping[str, list[nn.Parameter]], after: Mapping[str, nn.Parameter], edit: Edit
) -> None:
    # Sorted, so that the order in the optimizer, and with it every sum over it, is reproducible.
    for name in sorted(edit.added):
        parameter = after[name]
        bound = {id(p) for parameters in groups.values() for p in parameters}
        if groups and parameter.requires_grad and id(parameter) not in bound:
            nearest = max(groups, key=lambda other: _common_length(name, other))
            groups[nearest].append(parameter)


def _common_length(a: str, b: str) -> int:
    """How many characters two names begin with in common."""
    same = (x == y for x, y in zip(a, b, strict=False))
    return sum(1 for _ in takewhile(bool, same))


def _pairs(mine: Sequence[Any], saved: Sequence[Any]) -> zip[tuple[Any, Any]]:
    if len(mine) != len(saved):
        raise CheckpointError(
            f"The saved optimizer has {len(saved)} parameter groups and this one {len(mine)}. "
            "Resume with the optimizer that the fit began with."
        )
    return zip(mine, saved, strict=True)
