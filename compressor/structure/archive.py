"""A compressed model in a folder: structure.json and model.safetensors. No pickle.

The structure is the difference from the reference; any instance of the reference's class, trained
or not, gets the model back. The weights are packed: zeros and palettes make the file smaller.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor, nn

from compressor.errors import CheckpointError
from compressor.files import write_bytes
from compressor.interfaces.instances import check_module
from compressor.structure.describe import diff, rebuild
from compressor.structure.origin import fingerprint, origin_of, remember_origin
from compressor.structure.packing import pack, unpack
from compressor.structure.trace import in_eval

STRUCTURE_FILE = "structure.json"
WEIGHTS_FILE = "model.safetensors"
MODEL_OF_A_RUN = Path("exports", "model")  # in the folder of a run of the engine
PLAIN_FORMAT, PACKED_FORMAT = 1, 2  # 1 is read by versions that cannot unpack


def save(
    model: nn.Module, folder: str | os.PathLike[str], *, reference: nn.Module | None = None
) -> Path:
    """Write `model`, compressed from `reference`, into `folder`, which is made if it is not there.

    Each file is whole or absent after a crash, and the structure, written last, holds the checksum
    of the weights: a mixture of two saves is refused by `load`.

    Args:
        model: not changed.
        folder: for the two files.
        reference: the model before it was compressed, or another of its class and sizes. Models
            that `Engine.run`, `prune` and `load` returned know it, and so do their copies, trained
            or not.

    Returns:
        The folder.

    Raises:
        ModelError: if the model has something that cannot be described, or it does not know what it
            was compressed from and no `reference` is given.
        CheckpointError: if its state dict holds something that is not a tensor.
    """
    check_module("model", model)
    if reference is not None:
        check_module("reference", reference)
    folder = Path(folder)
    files = to_bytes(model, reference=reference)
    folder.mkdir(parents=True, exist_ok=True)
    for name in (WEIGHTS_FILE, STRUCTURE_FILE):
        write_bytes(folder / name, files[name])
    return folder


def load(folder: str | os.PathLike[str], reference: nn.Module) -> nn.Module:
    """The model that `save` wrote, on the device of `reference`, in eval mode. See `save`.

    Args:
        folder: written by `save`.
        reference: an instance of the reference's class with its sizes; its weights do not matter.

    Raises:
        CheckpointError: if a file is missing, truncated or altered, or of another reference.
        ModelError: if the reference is a class, or no module.
    """
    check_module("reference", reference)
    names = (STRUCTURE_FILE, WEIGHTS_FILE)
    return _restore({name: _read(Path(folder) / name) for name in names}, reference, str(folder))


def to_bytes(model: nn.Module, *, reference: nn.Module | None = None) -> dict[str, bytes]:
    """What `save` writes, by the name of the file, for another process or machine.

    Raises:
        ModelError: as `save`.
        CheckpointError: as `save`.
    """
    if reference is None:
        noted = origin_of(model)
        cut_from, identity = noted.outline, noted.fingerprint
    else:
        cut_from, identity = reference, fingerprint(reference)
    structure = diff(cut_from, model)
    tensors, aliases = _distinct_tensors(model)
    packed = _pack(tensors)
    weights = safetensors.torch.save(packed)
    document = {
        "format": PLAIN_FORMAT if packed.keys() == tensors.keys() else PACKED_FORMAT,
        "reference": identity,
        "weights_sha256": hashlib.sha256(weights).hexdigest(),
        "aliases": aliases,
        "difference": structure,
    }
    return {WEIGHTS_FILE: weights, STRUCTURE_FILE: json.dumps(document, indent=1).encode()}


def from_bytes(files: Mapping[str, bytes], reference: nn.Module) -> nn.Module:
    """The model of which `to_bytes` made `files`, which may hold others; as `load`.

    Raises:
        CheckpointError: as `load`.
    """
    for name in (STRUCTURE_FILE, WEIGHTS_FILE):
        if name not in files:
            raise CheckpointError(f"{name} is missing. Give all that `to_bytes` made.")
    return _restore(files, reference, "memory")


def packed_size_bytes(model: nn.Module) -> int:
    """Size of the weights file that `save` writes for `model`.

    Raises:
        CheckpointError: as `save`.
    """
    return len(safetensors.torch.save(_pack(_distinct_tensors(model)[0])))


def _versioned(model: nn.Module, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """`tensors` with the versions of the modules, without which some take them for outdated."""
    state = model.state_dict()
    versions = state._metadata  # type: ignore[attr-defined]
    state = OrderedDict(tensors)
    state._metadata = versions  # type: ignore[attr-defined]
    return state


def _pack(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: part for name, value in tensors.items() for key, part in pack(name, value).items()}


def _distinct_tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The state dict with each tensor once, and the other names of those that have several."""
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first_name: dict[tuple[Any, ...], str] = {}
    for name, value in model.state_dict().items():
        if not isinstance(value, Tensor):
            raise CheckpointError(
                f"The state dict has {name!r}, a {type(value).__name__}; only tensors are saved. "
                "Remove its `get_extra_state`, or keep the state in a buffer."
            )
        key = (value.data_ptr(), value.dtype, tuple(value.shape), value.stride(), value.device)
        first = first_name.setdefault(key, name) if value.numel() else name
        if first == name:
            tensors[name] = value.detach().cpu().contiguous().clone()
        else:
            aliases[name] = first
    return tensors, aliases


def _restore(files: Mapping[str, bytes], reference: nn.Module, source: str) -> nn.Module:
    document = _parse_structure(files[STRUCTURE_FILE], source)
    mine = fingerprint(reference)
    if document["reference"] != mine:
        raise CheckpointError(
            f"The model in {source} was compressed from {document['reference']}, and the "
            f"reference given is {mine}. Give an instance of the same class and sizes."
        )
    tensors = unpack(_parse_weights(files[WEIGHTS_FILE], document["weights_sha256"], source))
    for alias, name in document["aliases"].items():
        tensors[alias] = tensors[name]
    model = rebuild(reference, document["difference"])
    try:
        model.load_state_dict(_versioned(model, tensors), strict=True)
    except RuntimeError as error:
        raise CheckpointError(
            f"The weights in {source} do not fit the structure beside them: {error} "
            "Save the model again."
        ) from error
    remember_origin(model, reference)
    return in_eval(model)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        way_out = "Give the folder that `save` wrote."
        of_a_run = path.parent / MODEL_OF_A_RUN
        if (of_a_run / STRUCTURE_FILE).is_file():
            way_out = (
                f"This is the folder of a run, and its model is in {str(of_a_run)!r}: give that."
            )
        raise CheckpointError(f"{path} is missing. {way_out}") from error


def _parse_structure(content: bytes, source: str) -> dict[str, Any]:
    path = Path(source) / STRUCTURE_FILE
    try:
        document = json.loads(content)
        complete = {"format", "reference", "weights_sha256", "aliases", "difference"} <= set(
            document
        )
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path} is truncated or altered: {error}. Save it again.") from error
    if not complete or document["format"] not in (PLAIN_FORMAT, PACKED_FORMAT):
        raise CheckpointError(
            f"{path} is not a structure of format {PLAIN_FORMAT} or {PACKED_FORMAT}. "
            "Read it with the version that wrote it."
        )
    return dict(document)


def _parse_weights(content: bytes, sha256: str, source: str) -> dict[str, Tensor]:
    path = Path(source) / WEIGHTS_FILE
    if hashlib.sha256(content).hexdigest() != sha256:
        raise CheckpointError(
            f"{path} is truncated or altered: its checksum is not the one in {STRUCTURE_FILE}. "
            "Save the model again, or restore both files from one copy."
        )
    try:
        return safetensors.torch.load(content)
    except SafetensorError as error:
        raise CheckpointError(f"{path} is not a safetensors file: {error}.") from error
