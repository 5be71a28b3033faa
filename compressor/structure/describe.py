"""The difference between a reference and a compressed model as JSON, and the way back.

The JSON and the weights rebuild the compressed model on any instance of the reference's class: no
pickle, and no code but torch's layers and this package's is named in it. Of the values it holds
those of changed buffers that are in no state dict.
"""

from __future__ import annotations

import copy
import types
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from compressor.errors import CheckpointError, ModelError
from compressor.structure import surgery
from compressor.structure.programs import programmed
from compressor.structure.record import (
    OF_EVERY_MODULE,
    buffer_spec,
    build,
    decode,
    encode,
    is_plain,
    make_parameter,
    make_tensor,
    record_of,
    tensor_spec,
)
from compressor.structure.surgery import Edit
from compressor.structure.trace import copy_model

FORMAT = 1
_CODE = (types.FunctionType, types.BuiltinFunctionType, type)
_METRIC_METHODS = ("update", "compute", "reset")
_UNTOLD = object()  # in an outline: an attribute that is neither plain data nor code


class Outline(nn.Module):
    """A module of an `outline`: not an instance of its class, whose methods may need more."""

    outlined_class: type[nn.Module]


def diff(reference: nn.Module, model: nn.Module) -> dict[str, Any]:
    """What makes `model` another structure than `reference`, as JSON. Values are not compared.

    Metrics that are submodules (with `update`, `compute` and `reset`, and nothing to train) are
    passed over: what differs in them is what they have seen.

    Args:
        reference: the model before it was edited, or the `outline` that was taken of it then.
        model: after.

    Raises:
        ModelError: if `model` has something that cannot be described: a new class of another
            package, a module that the reference does not have, an attribute that is not plain data.
    """
    old, new = _modules(reference), _modules(model)
    replaced: dict[str, Any] = {}
    changed: dict[str, Any] = {}
    ties = _ties(model)
    untied = _newly_untied(_ties(reference), ties)
    metrics = [name for name, module in new.items() if name in old and _is_metric(name, module)]
    for name, module in model.named_modules():
        if _is_within(name, replaced) or name in metrics or _is_within(name, metrics):
            continue
        if name not in old:
            raise ModelError(
                f"The model has a module {name!r} that the reference does not have. "
                "Put new modules inside one that replaces a module of the reference."
            )
        if _class_of(module) != _class_of(old[name]):
            replaced[name] = record_of(name, module)
        elif change := _change(name, old[name], module, untied):
            changed[name] = change
    passed = [*replaced, *metrics]
    removed = [name for name in old if name not in new and not _is_within(name, passed)]
    _check_shared(old, new, replaced)
    return {
        "format": FORMAT,
        "replaced": replaced,
        "changed": changed,
        "removed": [name for name in removed if not _is_within(name, removed)],
        "tied": ties,
    }


def outline(model: nn.Module) -> Outline:
    """What `diff` needs of `model` as it is now, whatever is done to it later. Not to be called.

    Modules of the same names, with the same ties. Tensors are on the meta device and take no
    memory; of the attributes, plain data and code is kept.
    """
    modules: dict[int, Outline] = {}
    tensors: dict[int, Any] = {}
    for module in model.modules():
        outlined = modules[id(module)] = Outline()
        outlined.outlined_class = programmed.base_class(module)
        for key, value in vars(module).items():
            if key not in OF_EVERY_MODULE:
                is_told = is_plain(value) or isinstance(value, _CODE)
                vars(outlined)[key] = copy.deepcopy(value) if is_told else _UNTOLD
        for kept, store in (
            (outlined._parameters, module._parameters),
            (outlined._buffers, module._buffers),
        ):
            for key, tensor in store.items():
                if id(tensor) not in tensors:
                    tensors[id(tensor)] = _on_meta(tensor)
                kept[key] = tensors[id(tensor)]
    for module in model.modules():
        for key, child in module._modules.items():
            modules[id(module)]._modules[key] = None if child is None else modules[id(child)]
    return modules[id(model)]


def rebuild(reference: nn.Module, difference: Mapping[str, Any]) -> nn.Module:
    """A model of the structure that `diff` described, made from a copy of `reference`.

    The tensors that differ are filled with NaN (zero, if not floating point), but for buffers that
    are in no state dict: load the weights with `load_state_dict(strict=True)`.

    Raises:
        CheckpointError: if `difference` is of another model or format, or names a class that is
            neither torch's nor ours.
    """
    _check_format(difference)
    if "" not in difference["replaced"]:
        model = copy_model(reference)
        apply_difference(model, difference)
        return model
    first = next(reference.parameters(), torch.empty(0))
    with _misfits_named(reference):
        model = build(difference["replaced"][""]).to(first.device)
        _tie(model, difference["tied"])
    return model


def apply_difference(model: nn.Module, difference: Mapping[str, Any]) -> Edit:
    """Give `model` the structure that `diff` described, in place; an error leaves it as it was.

    The tensors that differ are filled with NaN (zero, if not floating point), but for buffers that
    are in no state dict: load the weights with `load_state_dict(strict=True)`. A parameter of which
    only `requires_grad` differs is the same object afterwards.

    Args:
        model: as the reference of `diff` was.
        difference: of `diff`.

    Returns:
        What happened to the parameters, for the trainer to follow.

    Raises:
        CheckpointError: if `difference` is of another model or format, names a class that is
            neither torch's nor ours, or replaces the whole model.
    """
    _check_format(difference)
    if "" in difference["replaced"]:
        raise CheckpointError(
            f"The structure replaces the whole {type(model).__name__} by a "
            f"{difference['replaced']['']['class']}, which cannot be done in place. "
            "Make a new model with `rebuild`."
        )
    flags: list[tuple[nn.Parameter, bool]] = []
    with _misfits_named(model), surgery.whole_or_not_at_all(model):
        edit = _apply(model, difference, flags)
    for parameter, requires_grad in flags:
        parameter.requires_grad_(requires_grad)
    return edit


def _check_format(difference: Mapping[str, Any]) -> None:
    if difference.get("format") != FORMAT:
        raise CheckpointError(
            f"The structure is of format {difference.get('format')!r}, not {FORMAT}. "
            "Read it with the version that wrote it."
        )


@contextmanager
def _misfits_named(reference: nn.Module) -> Iterator[None]:
    try:
        yield
    except CheckpointError:
        raise
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"The structure does not fit a {type(reference).__name__} of this shape: {error} "
            "Give the reference that the model was made from."
        ) from error


def _apply(
    model: nn.Module, difference: Mapping[str, Any], flags: list[tuple[nn.Parameter, bool]]
) -> Edit:
    """Edit `model` but for the flags of its parameters, which are gathered in `flags`."""
    device = next(model.parameters(), torch.empty(0)).device
    untied = _newly_untied(_ties(model), difference["tied"])
    edit = Edit()
    for name in difference["removed"]:
        edit = edit.then(surgery.remove(model, name))
    for name, record in difference["replaced"].items():
        edit = edit.then(surgery.replace(model, name, build(record).to(device)))
    for name, change in difference["changed"].items():
        module = surgery.get(model, name)
        if "program" in change:
            surgery.reprogram(model, name, decode(change["program"]))
        for key, value in change.get("attributes", {}).items():
            setattr(module, key, decode(value))
        for key, spec in change.get("parameters", {}).items():
            parameter, full_name = module._parameters.get(key), _join(name, key)
            if parameter is not None and spec is not None and full_name not in untied:
                flag = spec["requires_grad"]
                if {**spec, "requires_grad": parameter.requires_grad} == tensor_spec(parameter):
                    flags.append((parameter, flag))
                    continue
            edit = edit.then(surgery.set_tensor(model, full_name, make_parameter(spec, device)))
        for key, spec in change.get("buffers", {}).items():
            surgery.set_tensor(model, _join(name, key), make_tensor(spec, device))
    return edit.then(_tie(model, difference["tied"]))


def _tie(model: nn.Module, ties: Sequence[Sequence[str]]) -> Edit:
    edit = Edit()
    for names in ties:
        owner, _, key = names[0].rpartition(".")
        shared = surgery.get(model, owner)._parameters[key]
        for alias in names[1:]:
            edit = edit.then(surgery.set_tensor(model, alias, shared))
    return edit


def _modules(model: nn.Module) -> dict[str, nn.Module]:
    return dict(model.named_modules(remove_duplicate=False))


def _class_of(module: nn.Module) -> object:
    """Equal for modules of one class, of which torch makes a new one for each that it computes."""
    cls = module.outlined_class if isinstance(module, Outline) else programmed.base_class(module)
    is_computed = cls.__module__ == parametrize.__name__ and "parametrizations" in module._modules
    return ("parametrized", cls.__bases__[0]) if is_computed else cls


def _is_metric(name: str, module: nn.Module) -> bool:
    methods = (getattr(type(module), method, None) for method in _METRIC_METHODS)
    is_trained = any(parameter.requires_grad for parameter in module.parameters())
    return bool(name) and all(map(callable, methods)) and not is_trained


def _is_within(name: str, others: Collection[str]) -> bool:
    """Whether `name` is inside one of `others`; '' holds everything."""
    return any(name != other and (not other or name.startswith(f"{other}.")) for other in others)


def _change(name: str, old: nn.Module, new: nn.Module, untied: frozenset[str]) -> dict[str, Any]:
    """What differs between two modules of one class.

    Raises:
        ModelError: if a function differs, such as a patched `forward`.
    """
    for key, value in vars(new).items():
        if isinstance(value, _CODE) and _code_of(vars(old).get(key)) != _code_of(value):
            raise ModelError(
                f"The function {_join(name, key)!r} is not the reference's, and a file cannot hold "
                "code. Write it as a method of the class, or as a module of its own."
            )
    attributes = {
        key: encode(value, _join(name, key))
        for key, value in vars(new).items()
        if key not in OF_EVERY_MODULE
        and is_plain(value)
        and not _is_same(vars(old).get(key, _UNTOLD), value)
    }
    parameters = {
        key: tensor_spec(value)
        for key, value in new._parameters.items()
        if tensor_spec(value) != tensor_spec(old._parameters.get(key)) or _join(name, key) in untied
    }
    buffers = {
        key: buffer_spec(new, key)
        for key, value in new._buffers.items()
        if tensor_spec(value) != tensor_spec(old._buffers.get(key))
    }
    parts = {"attributes": attributes, "parameters": parameters, "buffers": buffers}
    if programmed.is_programmed(new) and programmed.ATTRIBUTE in attributes:
        parts = {"program": attributes.pop(programmed.ATTRIBUTE), **parts}
    return {part: values for part, values in parts.items() if values}


def _code_of(value: Any) -> Any:
    """Equal for the functions that one line of source made, such as a block's lambda."""
    return getattr(value, "__code__", value)


def _is_same(old: Any, plain: Any) -> bool:
    return is_plain(old) and old == plain  # a tensor would be compared entry by entry


def _join(name: str, key: str) -> str:
    return f"{name}.{key}" if name else key


def _ties(model: nn.Module) -> list[list[str]]:
    """Names of each parameter that distinct modules hold, the first one first."""
    names: dict[int, list[str]] = defaultdict(list)
    for prefix, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                names[id(parameter)].append(_join(prefix, key))
    return [aliases for aliases in names.values() if len(aliases) > 1]


def _newly_untied(
    reference: Sequence[Sequence[str]], kept: Sequence[Sequence[str]]
) -> frozenset[str]:
    """Names that share a parameter in the ties `reference`, and not the same way in `kept`."""
    return frozenset(name for names in reference if names not in kept for name in names)


def _check_shared(
    old: Mapping[str, nn.Module], new: Mapping[str, nn.Module], replaced: Mapping[str, Any]
) -> None:
    """A module that hangs in two places of one model must do so in the other."""
    first_old: dict[int, str] = {}
    first_new: dict[int, str] = {}
    for name in new:
        if name not in old or _is_within(name, replaced):
            continue
        was = first_old.setdefault(id(old[name]), name)
        now = first_new.setdefault(id(new[name]), name)
        if was != now:
            raise ModelError(
                f"{name!r} is the same module as {was!r} in the reference, and as {now!r} in the "
                "model. Replace a shared module everywhere, with `surgery.replace`."
            )
    for root in replaced:
        places = [name for name, module in new.items() if module is new[root]]
        inside = {id(module) for module in new[root].modules()}
        for name, module in new.items():
            if id(module) in inside and name not in places and not _is_within(name, places):
                raise ModelError(
                    f"{name!r} is a module of the new {root!r} as well, and both would come back "
                    "as modules of their own. Share modules within one new module only."
                )


def _on_meta(tensor: Tensor | None) -> Tensor | None:
    if tensor is None or is_lazy(tensor):
        return tensor
    empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
    is_parameter = isinstance(tensor, nn.Parameter)
    return nn.Parameter(empty, requires_grad=tensor.requires_grad) if is_parameter else empty
