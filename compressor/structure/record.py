"""A module as JSON without its tensors' values, and back without running its constructor.

Only layers of torch and of this package are written and read.
"""

from __future__ import annotations

import base64
import importlib
import zlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from compressor.errors import CheckpointError, ModelError
from compressor.structure.programs.programmed import (
    ATTRIBUTE,
    base_class,
    is_programmed,
    set_program,
)

ALLOWED_PACKAGES = ("torch.nn.", "compressor.")
ORIGIN = "compressor_origin"  # an attribute; see `structure.origin`
OF_EVERY_MODULE = frozenset(vars(nn.Module())) | {ORIGIN}


def record_of(name: str, module: nn.Module) -> dict[str, Any]:
    """All that makes `module`, but the values of its tensors.

    Raises:
        ModelError: if it, or a module in it, is of a class that a file must not name, or has
            an attribute that is not plain data.
    """
    return _record(name, "", module, {})


def build(record: Mapping[str, Any]) -> nn.Module:
    """The module of `record_of`, its tensors on the CPU and filled as by `make_tensor`.

    Raises:
        CheckpointError: if a class is neither torch's nor ours.
    """
    return _build(record, "", {})


def tensor_spec(tensor: Tensor | None) -> dict[str, Any] | None:
    """Shape and dtype; of a parameter also whether it requires grad."""
    if tensor is None:
        return None
    spec: dict[str, Any] = {"shape": list(tensor.shape), "dtype": str(tensor.dtype)[6:]}
    if isinstance(tensor, nn.Parameter):
        spec["requires_grad"] = tensor.requires_grad
    return spec


def buffer_spec(module: nn.Module, key: str) -> dict[str, Any] | None:
    """`tensor_spec` of a buffer, and the values of one that is in no state dict."""
    value = module._buffers[key]
    spec = tensor_spec(value)
    if value is not None and spec is not None and key in module._non_persistent_buffers_set:
        spec["values"] = _encode_values(value)
    return spec


def make_parameter(spec: Mapping[str, Any] | None, device: torch.device) -> nn.Parameter | None:
    """A parameter of this spec, filled as by `make_tensor`."""
    values = make_tensor(spec, device)
    if spec is None or values is None:
        return None
    return nn.Parameter(values, requires_grad=spec["requires_grad"])


def make_tensor(spec: Mapping[str, Any] | None, device: torch.device) -> Tensor | None:
    """A tensor of its values where the spec has them, else of NaN (0 if not floating point).

    NaN shows that values have not been loaded.
    """
    if spec is None:
        return None
    dtype = getattr(torch, spec["dtype"])
    if "values" in spec:
        return _decode_values(spec["values"], dtype).reshape(spec["shape"]).to(device)
    value = float("nan") if dtype.is_floating_point or dtype.is_complex else 0
    return torch.full(spec["shape"], value, dtype=dtype, device=device)


def is_plain(value: Any) -> bool:
    """Whether it is a number, a string or None, or tuples and lists of them."""
    if isinstance(value, (tuple, list)):
        return all(map(is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))


def encode(value: Any, name: str) -> Any:
    """JSON for a plain attribute.

    Raises:
        ModelError: if it is not plain.
    """
    if isinstance(value, tuple) and is_plain(value):
        return {"tuple": [encode(item, name) for item in value]}
    if isinstance(value, list) and is_plain(value):
        return [encode(item, name) for item in value]
    if value is None or isinstance(value, bool):
        return value
    for kind in (int, float):
        if isinstance(value, kind):
            return kind(value)  # of numpy's float64 and the like, which a checkpoint refuses
    if isinstance(value, str):
        return str.__str__(value)
    raise ModelError(
        f"The attribute {name!r} of a new module is a {type(value).__name__}, which JSON does "
        "not hold. Keep numbers, strings and tuples of them in modules that replace others."
    )


def decode(value: Any) -> Any:
    """The inverse of `encode`."""
    if isinstance(value, Mapping):
        return tuple(decode(item) for item in value["tuple"])
    return [decode(item) for item in value] if isinstance(value, list) else value


def _record(name: str, inner: str, module: nn.Module, seen: dict[int, str]) -> dict[str, Any]:
    """As `record_of`; `inner` is the name inside the outermost module, `seen` those before it."""
    if id(module) in seen:
        return {"same_as": seen[id(module)]}
    seen[id(module)] = inner
    is_parametrized = parametrize.is_parametrized(module)
    cls = (
        parametrize.type_before_parametrizations(module) if is_parametrized else base_class(module)
    )
    if _find_class(cls.__module__, cls.__qualname__) is not cls:
        raise ModelError(
            f"The new module {name!r} is a {cls.__module__}.{cls.__qualname__}, which a file must "
            "not name. Build new modules from torch.nn or from this package's layers."
        )
    attributes = {key: value for key, value in vars(module).items() if key not in OF_EVERY_MODULE}
    own_program = attributes.pop(ATTRIBUTE) if is_programmed(module) else None
    parameters = {key: tensor_spec(value) for key, value in module._parameters.items()}
    children = dict(module._modules)
    parametrized: dict[str, dict[str, Any]] = {}
    if is_parametrized:
        for key, chain in _parametrizations(children.pop("parametrizations")).items():
            parameters[key] = tensor_spec(_original(chain, f"{name}.{key}"))
            modules = [
                _record(f"{name}.{key}", f"{inner}.{key}.{number}", each, seen)
                for number, each in enumerate(chain)
            ]
            parametrized[key] = {"modules": modules, "unsafe": chain.unsafe}
    return {
        **({"program": encode(own_program, name)} if own_program else {}),
        **({"parametrized": parametrized} if parametrized else {}),
        "class": f"{cls.__module__}:{cls.__qualname__}",
        "attributes": {key: encode(value, f"{name}.{key}") for key, value in attributes.items()},
        "parameters": parameters,
        "buffers": {key: buffer_spec(module, key) for key in module._buffers},
        "children": {
            key: None if child is None else _record(f"{name}.{key}", f"{inner}.{key}", child, seen)
            for key, child in children.items()
        },
    }


def _build(record: Mapping[str, Any], inner: str, built: dict[str, nn.Module]) -> nn.Module:
    if "same_as" in record:
        return built[record["same_as"]]
    module_name, _, class_name = record["class"].partition(":")
    cls = _find_class(module_name, class_name)
    if cls is None:
        raise CheckpointError(
            f"The structure names {record['class']!r}, which is no layer of torch or of this "
            "package. Do not load files that you do not trust."
        )
    module = built[inner] = cls.__new__(cls)
    nn.Module.__init__(module)
    for key, value in record["attributes"].items():
        setattr(module, key, decode(value))
    if "program" in record:
        set_program(module, decode(record["program"]))
    for key, spec in record["parameters"].items():
        module.register_parameter(key, make_parameter(spec, torch.device("cpu")))
    for key, spec in record["buffers"].items():
        value = make_tensor(spec, torch.device("cpu"))
        module.register_buffer(key, value, persistent=spec is None or "values" not in spec)
    for key, child in record["children"].items():
        module.add_module(key, None if child is None else _build(child, f"{inner}.{key}", built))
    for key, chain in record.get("parametrized", {}).items():
        for number, each in enumerate(chain["modules"]):
            parametrization = _build(each, f"{inner}.{key}.{number}", built)
            # unsafe: of NaN there is nothing to check
            parametrize.register_parametrization(module, key, parametrization, unsafe=True)
        _parametrizations(module.parametrizations)[key].unsafe = chain["unsafe"]
    return module


def _parametrizations(held: Any) -> dict[str, Any]:
    """Name of a tensor -> the chain of modules that computes it."""
    return dict(held.items())


def _original(chain: Any, name: str) -> nn.Parameter:
    """What a parametrization computes a tensor from.

    Raises:
        ModelError: if that is several tensors, or a buffer.
    """
    original = chain._parameters.get("original")
    if isinstance(original, nn.Parameter):
        return original
    raise ModelError(
        f"{name!r} is computed by a parametrization from more than one parameter, or from none, "
        "which a file does not hold. Bake it in first: torch.nn.utils.parametrize."
        f"remove_parametrizations(module, {name.rpartition('.')[2]!r})."
    )


def _encode_values(tensor: Tensor) -> str:
    """The entries of a tensor, bit by bit: most such buffers are tables, which compress well."""
    entries = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return base64.b64encode(zlib.compress(entries.numpy().tobytes())).decode("ascii")


def _decode_values(text: str, dtype: torch.dtype) -> Tensor:
    """The inverse of `_encode_values`, flat.

    Raises:
        ValueError: if the text was altered.
    """
    try:
        content = zlib.decompress(base64.b64decode(text, validate=True))
    except zlib.error as error:
        raise ValueError(f"the values of a buffer are damaged: {error}") from error
    return (
        torch.frombuffer(bytearray(content), dtype=dtype)
        if content
        else torch.empty(0, dtype=dtype)
    )


def _find_class(module_name: str, class_name: str) -> type[nn.Module] | None:
    """A layer class of torch or of this package; None for anything else."""
    if not f"{module_name}.".startswith(ALLOWED_PACKAGES):
        return None
    try:
        found = getattr(importlib.import_module(module_name), class_name, None)
    except ImportError:
        return None
    return found if isinstance(found, type) and issubclass(found, nn.Module) else None
