"""An optimizer's state by the names of the parameters: it follows surgery, and goes into files."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Adagrad, Optimizer

from compressor.errors import CheckpointError, SurgeryError
from compressor.interfaces.data import map_leaves
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


def check_complete(optimizer: Optimizer | None, model: nn.Module) -> None:
    """Do nothing if `optimizer` steps parameters of `model` only, and all that it stepped before.

    Raises:
        SurgeryError: if a parameter was exchanged behind its back: it would never be trained.
    """
    if optimizer is None:
        return
    try:
        check_bound(optimizer, model)
    except SurgeryError as error:
        raise SurgeryError(
            "A parameter of the model was exchanged since the trainer was made, so that the new "
            "one would never be trained. Change the model through `trainer.state.edit`, or make a "
            "new trainer."
        ) from error


def rebind(optimizer: Optimizer, before: Names, model: nn.Module, edit: Edit) -> None:
    """Let `optimizer` follow `edit`, in place: moments are sliced, dropped, or begin with 0.

    Groups keep their options. An added parameter that requires grad joins the group of the one
    with the most similar name: it begins like it, then it ends like it.

    Args:
        optimizer: bound to the parameters before the edit; so remain its schedulers.
        before: `parameter_names` before the edit.
        model: after the edit.
        edit: what happened.
    """
    after = dict(model.named_parameters(remove_duplicate=False))
    groups: dict[str, dict[str, Any]] = {}  # name before the edit -> its group
    for group in optimizer.param_groups:
        old_parameters, parameters = list(group["params"]), group["params"]
        parameters.clear()  # the list stays the same object: LBFGS keeps it
        for old in old_parameters:
            groups.update(dict.fromkeys(before[id(old)], group))
            moments = optimizer.state.pop(old, None)
            name = next((n for n in before[id(old)] if _is_heir(n, old, after, edit)), None)
            if name is None:
                continue
            parameters.append(after[name])
            moments = _slice_moments(moments, old.shape, edit.sliced.get(name, ()))
            if moments:
                optimizer.state[after[name]] = moments
    _add(optimizer, groups, after, edit)


def optimizer_state(optimizer: Optimizer, model: nn.Module) -> dict[str, Any]:
    """What `optimizer` remembers, by parameter name, for `load_optimizer_state`.

    Tensors are not copied: the next step changes them.
    """
    names = parameter_names(model)
    groups, state = [], {}
    for group in optimizer.param_groups:
        groups.append({**group, "params": [names[id(each)][0] for each in group["params"]]})
        for parameter in group["params"]:
            if parameter in optimizer.state:
                values = dict(optimizer.state[parameter])
                entry = {"shape": list(parameter.shape), "values": values}
                state[names[id(parameter)][0]] = entry
    return {"groups": groups, "state": state}


def load_optimizer_state(optimizer: Optimizer, model: nn.Module, saved: Mapping[str, Any]) -> None:
    """Give `optimizer` what `optimizer_state` took, in place.

    Its groups hold the same parameters in the same order as then, with the options of then, so
    that it goes on bit by bit. It does not share tensors with `saved`.

    Raises:
        CheckpointError: if it steps other parameters, or of other shapes; torch's own loading goes
            by position, takes any shape, and fails at the next step. A parameter that does not
            require grad may be in only one of them. Nothing is loaded then.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    pairs = list(_pairs(optimizer.param_groups, saved["groups"]))
    names = [name for group in saved["groups"] for name in group["params"]]
    _check_in_model(names, parameters)
    _check_same(optimizer, [parameters[name] for name in names], model)
    _check_shapes(saved["state"], parameters)
    for group, saved_group in pairs:  # in the list that is there: LBFGS keeps it
        group["params"][:] = [parameters[name] for name in saved_group["params"]]
    index = {name: position for position, name in enumerate(names)}
    state = {name: map_leaves(_cloned, entry["values"]) for name, entry in saved["state"].items()}
    optimizer.load_state_dict(
        {
            "param_groups": [
                {**group, "params": [index[name] for name in group["params"]]}
                for group in saved["groups"]
            ],
            "state": {index[name]: values for name, values in state.items()},
        }
    )
    for name, values in state.items():
        _keep_dtype_of_scalars(optimizer.state[parameters[name]], values)


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
    optimizer: Optimizer,
    groups: Mapping[str, dict[str, Any]],
    after: Mapping[str, nn.Parameter],
    edit: Edit,
) -> None:
    bound = {id(each) for group in optimizer.param_groups for each in group["params"]}
    # Sorted, so that the order in the optimizer, and with it every sum over it, is reproducible.
    for name in sorted(edit.added):
        parameter = after[name]
        if groups and parameter.requires_grad and id(parameter) not in bound:
            group = groups[_most_similar(name, groups)]
            group["params"].append(parameter)
            bound.add(id(parameter))
            if isinstance(optimizer, Adagrad):  # steps nothing that its constructor did not see
                alone = [{**group, "params": [parameter]}]
                start = group["initial_accumulator_value"]
                begun = Adagrad(alone, initial_accumulator_value=start)
                optimizer.state[parameter] = begun.state[parameter]


def _most_similar(name: str, others: Collection[str]) -> str:
    if name in others:
        return name
    return max(others, key=lambda o: (_common_length(name, o), _common_length(name[::-1], o[::-1])))


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


def _check_in_model(names: Sequence[str], parameters: Mapping[str, nn.Parameter]) -> None:
    unknown = [name for name in names if name not in parameters]
    if unknown:
        raise CheckpointError(
            f"The saved optimizer steps {unknown[0]!r}, which the model does not have. "
            "Resume with the model that the fit ended with."
        )
    first: dict[int, str] = {}
    for name in names:
        if (other := first.setdefault(id(parameters[name]), name)) != name:
            raise CheckpointError(
                f"The saved optimizer steps {other!r} and {name!r}, which are one parameter of "
                "this model. Resume with the model that the fit ended with."
            )


def _check_same(optimizer: Optimizer, theirs: Sequence[nn.Parameter], model: nn.Module) -> None:
    mine = [each for group in optimizer.param_groups for each in group["params"]]
    both = {id(each) for each in mine} & {id(each) for each in theirs}
    odd = [each for each in (*mine, *theirs) if each.requires_grad and id(each) not in both]
    if odd:
        names = parameter_names(model)
        raise CheckpointError(
            "The saved optimizer and this one do not step the same parameters: "
            f"{names[id(odd[0])][0]!r} is only in one of them. Resume with the optimizer that the "
            "fit began with."
        )


def _check_shapes(state: Mapping[str, Any], parameters: Mapping[str, nn.Parameter]) -> None:
    for name, entry in state.items():
        shape = list(parameters[name].shape)
        if shape != entry["shape"]:
            raise CheckpointError(
                f"The saved optimizer state of {name!r} is for shape {entry['shape']}, and the "
                f"parameter has {shape}. Resume with the model that the fit ended with."
            )


def _cloned(leaf: Any) -> Any:
    return leaf.detach().clone() if isinstance(leaf, Tensor) else leaf


def _keep_dtype_of_scalars(loaded: dict[str, Any], saved: Mapping[str, Any]) -> None:
    """Undo what torch does to all but `step`: NAdam's product of a half precision parameter."""
    for key, value in saved.items():
        if isinstance(value, Tensor) and not value.dim() and key != "step":
            loaded[key] = value.to(loaded[key].device)
