"""Linear layers in eight bits in torch, through torchao: no other file has names of that library.

Tried with torchao 0.18 beside torch 2.15; 0.17 has other defaults. Weights have a scale for each
output channel, and dynamic activations one for each token, where ONNX Runtime has one for all: what
a format does to a model is therefore found with torchao's own layers, not with our simulation.
"""

from __future__ import annotations

import importlib.util
import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from compressor.errors import CheckpointError, ModelError, suggest
from compressor.files import write_bytes
from compressor.logs import get_logger
from compressor.optional import require
from compressor.quantization.affine import spread
from compressor.quantization.plan import TensorPlan
from compressor.structure import surgery
from compressor.structure.attention.replace import is_replaceable, make_prunable
from compressor.structure.packing import pack, unpack

logger = get_logger(__name__)

INTEGERS = frozenset({"dynamic_int8", "weight_int8"})
FP8 = frozenset({"dynamic_fp8", "weight_fp8"})
FP8_CAPABILITY = (8, 9)  # Ada, Hopper and later multiply such floats
SIZE = 64  # of the matrices that are multiplied to see whether sums are cut
CUDA_MULTIPLE = 16  # of both widths, for the kernels of CUDA


def is_installed() -> bool:
    """Whether torchao is here; it is not imported."""
    return importlib.util.find_spec("torchao") is not None


def formats_on(device: torch.device) -> frozenset[str]:
    """The formats, by name, that linear layers can have on a device; none without torchao."""
    if not is_installed():
        return frozenset()
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= FP8_CAPABILITY:
        return INTEGERS | FP8
    return INTEGERS


def is_possible(layer: nn.Module | None, device: torch.device) -> bool:
    """Whether there are kernels for `layer`: it is linear, and on CUDA of even widths.

    An `nn.MultiheadAttention` stands for its projections; see `quantize_linear`.
    """
    if type(layer) is nn.MultiheadAttention and is_replaceable(layer):
        widths: tuple[int, ...] = (layer.embed_dim, layer.kdim or 0, layer.vdim or 0)
    elif isinstance(layer, nn.Linear):
        widths = (layer.in_features, layer.out_features)
    else:
        return False
    return device.type != "cuda" or all(width % CUDA_MULTIPLE == 0 for width in widths)


@cache
def is_saturating(device: torch.device) -> bool:
    """Whether torch's products of int8 are wrong for large numbers on a device.

    So they are on CPUs without VNNI, which add pairs of them in 16 bits.
    """
    if device.type != "cpu":
        return False
    numbers = torch.full((SIZE, SIZE), 127, dtype=torch.int8)
    return bool((torch._int_mm(numbers, numbers) != 127 * 127 * SIZE).any())


def quantize_linear(model: nn.Module, formats: Mapping[str, str]) -> None:
    """Give linear layers of `model` weights in eight bits, in place; it cannot be trained then.

    `nn.MultiheadAttention` first becomes what it equals, made of linear layers: torch's own reads
    the weight of its `out_proj` as no torchao tensor can be read, and the fast path of torch's
    transformer layers cannot be compiled around such tensors. Its name stands for its projections
    of queries, keys and values.

    A layer that CUDA has no kernel for stays in float.

    Args:
        model: in evaluation mode, on the device where it will run.
        formats: of layers, by name; some of `formats_on`.

    Raises:
        MissingDependencyError: if torchao is not installed.
        ModelError: if there is no such linear layer; the message has the nearest name.
    """
    opened = _open_attention(model)
    layers = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    wanted: dict[str, set[str]] = {}
    for given, form in formats.items():
        for name in _names_now(given, opened):
            if name not in layers:
                raise ModelError(
                    f"There is no linear layer {given!r} to quantize. {suggest(given, layers)}"
                )
            device = layers[name].weight.device
            if is_possible(layers[name], device):
                wanted.setdefault(form, set()).add(name)
            else:
                logger.info("%s stays in float: CUDA has no kernel for its widths.", name)
    torchao = require("torchao.quantization", extra="torchao")
    for form, names in wanted.items():
        device = layers[min(names)].weight.device
        torchao.quantize_(model, _config(form, device), lambda _, name, names=names: name in names)


def clamp_weights(model: nn.Module, weights: Mapping[str, TensorPlan]) -> None:
    """Cut weights, in place, to the range of the steps that they were trained with.

    torchao finds a weight's scale by its largest value over 127.5, so that is where they are cut:
    what was trained to be cut then has the same scale, and what was not has a finer one.

    Args:
        model: in float.
        weights: by path of the parameter.
    """
    with torch.no_grad():
        for path, plan in weights.items():
            if plan.scheme.has_integers:
                weight = model.get_parameter(path)
                most = spread(plan.scale.to(weight.device), weight, plan.scheme) * (
                    plan.scheme.qmax + 0.5
                )
                weight.clamp_(-most, most)


def save(model: nn.Module, formats: Mapping[str, str], path: Path) -> Path:
    """Write the weights of `model`, which `quantize_linear` made with `formats`, as one file.

    It is a safetensors file, packed as that of `structure.archive`; for `restore`.
    """
    tensors = {
        key: part
        for name, tensor in _plain_tensors(model).items()
        for key, part in pack(name, tensor).items()
    }
    metadata = {"formats": json.dumps(dict(formats))}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, safetensors.torch.save(tensors, metadata))
    return path


def restore(model: nn.Module, path: Path) -> None:
    """Make `model`, in place, the one whose weights `save` wrote, bit for bit.

    Args:
        model: of the same structure, in float; its weights do not matter.
        path: of the file.

    Raises:
        CheckpointError: if the file is missing, damaged, or of another model or torchao.
        MissingDependencyError: if torchao is not installed.
    """
    try:
        with safe_open(path, "pt") as file:
            formats = json.loads(file.metadata()["formats"])
            tensors = unpack({key: file.get_tensor(key) for key in file.keys()})
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path} is missing or damaged: {error!r}. Export the model again."
        ) from error
    quantize_linear(model, formats)
    own = _plain_tensors(model)
    shapes, stored = ({k: t.shape for k, t in item.items()} for item in (own, tensors))
    if shapes != stored:
        names = sorted(key for key in {*shapes, *stored} if shapes.get(key) != stored.get(key))
        raise CheckpointError(
            f"{path} does not fit the model in {', '.join(names[:3])}. Give the model that it was "
            "written with, and the same torchao; or export it again."
        )
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(tensors[name])


@contextmanager
def without_cache_warning() -> Iterator[None]:
    """Compile what torchao made without a warning that only torchao can act on.

    torch 2.15 says once of each class of tensors that its cache has no stable key for it.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".* does not implement _stable_hash_for_caching")
        yield


def _config(form: str, device: torch.device) -> Any:
    torchao = require("torchao.quantization", extra="torchao")
    # Settings of the compiler are for the whole process, and so not for a library to set.
    if form == "dynamic_int8":
        return torchao.Int8DynamicActivationInt8WeightConfig(
            set_inductor_config=False, reduce_range=is_saturating(device)
        )
    classes = {
        "weight_int8": "Int8WeightOnlyConfig",
        "dynamic_fp8": "Float8DynamicActivationFloat8WeightConfig",
        "weight_fp8": "Float8WeightOnlyConfig",
    }
    return getattr(torchao, classes[form])(set_inductor_config=False)


def _open_attention(model: nn.Module) -> list[str]:
    """Names of the attention modules that were replaced."""
    names = [
        name
        for name, module in model.named_modules()
        if name and type(module) is nn.MultiheadAttention and is_replaceable(module)
    ]
    for name in names:
        surgery.replace(model, name, make_prunable(model.get_submodule(name)))
    return names


def _names_now(name: str, opened: list[str]) -> list[str]:
    """Of the layers that a layer has become."""
    owner, _, last = name.rpartition(".")
    if name in opened:
        return [f"{name}.{part}" for part in "qkv"]
    return [f"{owner}.out"] if owner in opened and last == "out_proj" else [name]


def _plain_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every tensor of the state dict once; in place of torchao's, those that they are made of."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, value in model.state_dict(keep_vars=True).items():
        if id(value) in seen:
            continue
        seen.add(id(value))
        if is_traceable_wrapper_subclass(value):
            parts, _ = value.__tensor_flatten__()
            found |= {f"{name}.{part}": getattr(value, part) for part in parts}
        else:
            found[name] = value
    return found
