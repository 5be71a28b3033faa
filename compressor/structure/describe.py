"""The difference between a reference and a compressed model as JSON, and the way back.

The JSON and the weights rebuild the compressed model on any instance of the reference's class: no
pickle, and no code but torch's layers and this package's is named in it.
"""

from __future__ import annotations

import importlib
import types
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from compressor.errors import CheckpointError, ModelError
from compressor.structure import surgery
from compressor.structure.trace import copy_model

FORMAT = 1
ALLOWED_PACKAGES = ("torch.nn.", "compressor.")
_CODE = (types.FunctionType, types.BuiltinFunctionType, type)
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))


def diff(reference: nn.Module, model: nn.Module) -> dict[str, Any]:
    """What makes `model` another structure than `reference`, as JSON. Values are not compared.

    Raises:
        ModelError: if `model` has something that cannot be described: a new class of another
            package, a module that the reference does not have, an attribute that is not plain data.
    """
    old, new = _modules(reference), _modules(model)
    replaced: dict[str, Any] = {}
    changed: dict[str, Any] = {}
    forced = _newly_untied(reference, model)
    for name, module in model.named_modules():
        if _is_within(name, replaced):
            continue
        if name not in old:
            raise ModelError(
                f"The model has a module {name!r} that the reference does not have. "
                "Put new modules inside one that replaces a module of the reference."
            )
        if type(module) is not type(old[name]):
            replaced[name] = _record(name, module)
        elif change := _change(name, old[name], module, forced):
            changed[name] = change
    removed = [name for name in old if name not in new and not _is_within(name, replaced)]
    _check_shared(old, new, replaced)
    return {
        "format": FORMAT,
        "replaced": replaced,
        "changed": changed,
        "removed": [name for name in removed if not _is_within(name, removed)],
        "tied": _ties(model),
    }


def rebuild(reference: nn.Module, difference: Mapping[str, Any]) -> nn.Module:
    """A model of the structure that `diff` described, made from a copy of `reference`.

    The tensors that differ are filled with NaN (zero, if not floating point): load the weights with
    `load_state_dict(strict=True)`.

    Raises:
        CheckpointError: if `difference` is of another model or format, or names a class that is
            neither torch's nor ours.
    """
    if difference.get("format") != FORMAT:
        raise CheckpointError(
            f"The structure is of format {difference.get('format')!r}, not {FORMAT}. "
            "Read it with the version that wrote it."
        )
    model = copy_model(reference)
    first = next(model.parameters(), torch.empty(0))
    try:
        for name in difference["removed"]:
            surgery.remove(model, name)
        for name, record in difference["replaced"].items():
            if name:
                surgery.replace(model, name, _build(record).to(first.device))
            else:
                model = _build(record).to(first.device)
        for name, change in difference["changed"].items():
            _apply_change(model, name, change, first.device)
        for names in difference["tied"]:
            shared = _tensor_of(model, names[0])
            for alias in names[1:]:
                surgery.set_tensor(model, alias, shared)
    except CheckpointError:
        raise
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"The structure does not fit a {type(reference).__name__} of this shape: {error} "
            "Give the reference that the model was made from."
        ) from error
    return model


def _modules(model: nn.Module) -> dict[str, nn.Module]:
    return dict(model.named_modules(remove_duplicate=False))


def _is_within(name: str, others: Any) -> bool:
    """Whether `name` is inside one of `others`; '' holds everything."""
    return any(name != other and (not other or name.startswith(f"{other}.")) for other in others)


def _record(name: str, module: nn.Module) -> dict[str, Any]:
    """All that makes `module`, but the values of its tensors."""
    cls = type(module)
    if _find_class(cls.__module__, cls.__qualname__) is not cls:
        raise ModelError(
            f"The new module {name!r} is a {cls.__module__}.{cls.__qualname__}, which a file must "
            "not name. Build new modules from torch.nn or from this package's layers."
        )
    attributes = {key: value for key, value in vars(module).items() if key not in _OF_EVERY_MODULE}
    return {
        "class": f"{cls.__module__}:{cls.__qualname__}",
        "attributes": {key: _encode(value, f"{name}.{key}") for key, value in attributes.items()},
        "parameters": {key: _spec(value) for key, value in module._parameters.items()},
        "buffers": {
            key: _buffer_spec(module, key, value, f"{name}.{key}")
            for key, value in module._buffers.items()
        },
        "children": {
            key: _record(f"{name}.{key}", child) for key, child in module.named_children()
        },
    }


def _find_class(module_name: str, class_name: str) -> type[nn.Module] | None:
    """A layer class of torch or of this package; None for anything else."""
    if not f"{module_name}.".startswith(ALLOWED_PACKAGES):
        return None
    try:
        found = getattr(importlib.import_module(module_name), class_name, None)
    except ImportError:
        return None
    return found if isinstance(found, type) and issubclass(found, nn.Module) else None


def _change(name: str, old: nn.Module, new: nn.Module, forced: frozenset[str]) -> dict[str, Any]:
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
        key: _encode(value, f"{name}.{key}")
        for key, value in vars(new).items()
        if key not in _OF_EVERY_MODULE and _is_plain(value) and vars(old).get(key) != value
    }
    parameters = {
        key: _spec(value)
        for key, value in new._parameters.items()
        if _spec(value) != _spec(old._parameters.get(key)) or _join(name, key) in forced
    }
    buffers = {
        key: _buffer_spec(new, key, value, _join(name, key))
        for key, value in new._buffers.items()
        if _spec(value) != _spec(old._buffers.get(key))
    }
    parts = {"attributes": attributes, "parameters": parameters, "buffers": buffers}
    return {part: values for part, values in parts.items() if values}


def _code_of(value: Any) -> Any:
    """Equal for the functions that one line of source made, such as a block's lambda."""
    return getattr(value, "__code__", value)


def _join(name: str, key: str) -> str:
    return f"{name}.{key}" if name else key


def _spec(tensor: Tensor | None) -> dict[str, Any] | None:
    if tensor is None:
        return None
    spec: dict[str, Any] = {"shape": list(tensor.shape), "dtype": str(tensor.dtype)[6:]}
    if isinstance(tensor, nn.Parameter):
        spec["requires_grad"] = tensor.requires_grad
    return spec


def _buffer_spec(
    module: nn.Module, key: str, value: Tensor | None, name: str
) -> dict[str, Any] | None:
    if value is not None and key in module._non_persistent_buffers_set:
        raise ModelError(
            f"The buffer {name!r} changed, and its values are in no state dict. "
            "Register it with persistent=True."
        )
    return _spec(value)


def _is_plain(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))


def _encode(value: Any, name: str) -> Any:
    if not _is_plain(value):
        raise ModelError(
            f"The attribute {name!r} of a new module is a {type(value).__name__}, which JSON does "
            "not hold. Keep numbers, strings and tuples of them in modules that replace others."
        )
    if isinstance(value, tuple):
        return {"tuple": [_encode(item, name) for item in value]}
    return [_encode(item, name) for item in value] if isinstance(value, list) else value


def _decode(value: Any) -> Any:
    if isinstance(value, Mapping):
        return tuple(_decode(item) for item in value["tuple"])
    return [_decode(item) for item in value] if isinstance(value, list) else value


def _ties(model: nn.Module) -> list[list[str]]:
    """Names of each parameter that distinct modules hold, the first one first."""
    names: dict[int, list[str]] = defaultdict(list)
    for prefix, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                names[id(parameter)].append(_join(prefix, key))
    return [aliases for aliases in names.values() if len(aliases) > 1]


def _newly_untied(reference: nn.Module, model: nn.Module) -> frozenset[str]:
    """Names that share a parameter in `reference`, and not the same way in `model`."""
    kept = _ties(model)
    return frozenset(name for names in _ties(reference) if names not in kept for name in names)


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


def _build(record: Mapping[str, Any]) -> nn.Module:
    """A module from its record, without running its constructor."""
    module_name, _, class_name = record["class"].partition(":")
    cls = _find_class(module_name, class_name)
    if cls is None:
        raise CheckpointError(
            f"The structure names {record['class']!r}, which is no layer of torch or of this "
            "package. Do not load files that you do not trust."
        )
    module: nn.Module = cls.__new__(cls)
    nn.Module.__init__(module)
    for key, value in record["attributes"].items():
        setattr(module, key, _decode(value))
    for key, spec in record["parameters"].items():
        module.register_parameter(key, _parameter(spec, torch.device("cpu")))
    for key, spec in record["buffers"].items():
        module.register_buffer(key, _filled(spec, torch.device("cpu")))
    for key, child in record["children"].items():
        module.add_module(key, _build(child))
    return module


def _apply_change(
    model: nn.Module, name: str, change: Mapping[str, Any], device: torch.device
) -> None:
    module = surgery.get(model, name)
    for key, value in change.get("attributes", {}).items():
        setattr(module, key, _decode(value))
    for key, spec in change.get("parameters", {}).items():
        surgery.set_tensor(model, _join(name, key), _parameter(spec, device))
    for key, spec in change.get("buffers", {}).items():
        surgery.set_tensor(model, _join(name, key), _filled(spec, device))


def _parameter(spec: Mapping[str, Any] | None, device: torch.device) -> nn.Parameter | None:
    values = _filled(spec, device)
    if spec is None or values is None:
        return None
    return nn.Parameter(values, requires_grad=spec["requires_grad"])


def _filled(spec: Mapping[str, Any] | None, device: torch.device) -> Tensor | None:
    """A tensor that shows when its values are not loaded."""
    if spec is None:
        return None
    dtype = getattr(torch, spec["dtype"])
    value = float("nan") if dtype.is_floating_point or dtype.is_complex else 0
    return torch.full(spec["shape"], value, dtype=dtype, device=device)


def _tensor_of(model: nn.Module, name: str) -> Tensor | None:
    owner, _, key = name.rpartition(".")
    return surgery.get(model, owner)._parameters[key]
