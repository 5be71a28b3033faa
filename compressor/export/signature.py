"""How the flat tensors of an exported file map to the arguments and results of the model's call."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from compressor.errors import ExportError, first_line
from compressor.interfaces.inputs import ModelInputs

METADATA_KEY = "compressor.signature"


@dataclass(frozen=True)
class Signature:
    """The call of a model, kept in its file: what goes in, what comes out, in which order.

    Attributes:
        parameters: names of the positional parameters of `forward`, so that an argument may be
            given by position or by keyword, whichever way the model was exported.
        inputs: paths of the tensors (`x`, `batch/mask`, `*0`), in the order of the file's inputs.
        outputs: the structure of the results, as `torch.utils._pytree` writes it.
        constants: leaves of the results that are no tensors, by their position.
    """

    parameters: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: str
    constants: Mapping[int, Any]

    @classmethod
    def of(cls, model: nn.Module, inputs: ModelInputs, outputs: Any) -> Signature:
        """The signature of one call of `model`.

        Raises:
            ExportError: if the outputs hold something that JSON cannot say.
        """
        parameters = _positional_parameters(model)
        leaves, spec = pytree.tree_flatten(outputs)
        constants = {i: leaf for i, leaf in enumerate(leaves) if not isinstance(leaf, Tensor)}
        try:
            json.dumps(list(constants.values()))
            return cls(
                parameters,
                tuple(_keyed(parameters, inputs)),
                pytree.treespec_dumps(spec),
                constants,
            )
        except (TypeError, NotImplementedError) as error:
            raise ExportError(
                f"The model's output {type(outputs).__name__} cannot be described in a file: "
                f"{first_line(error)} Return tensors in tuples, lists and dicts."
            ) from error

    def flatten(self, inputs: ModelInputs) -> list[Tensor]:
        """The tensors of a call in the order of the file's inputs.

        Raises:
            ExportError: if the call has other tensors than the exported one had.
        """
        given = _keyed(self.parameters, inputs)
        if given.keys() != set(self.inputs):
            raise ExportError(
                f"The exported model takes the tensors {list(self.inputs)}, not {list(given)}. "
                "Call it with the arguments that it was exported with."
            )
        return [given[key] for key in self.inputs]

    def unflatten(self, tensors: Sequence[Any]) -> Any:
        """The results as the model returns them, from the file's outputs in their order."""
        spec = pytree.treespec_loads(self.outputs)
        flowing = iter(tensors)
        leaves = [
            self.constants[i] if i in self.constants else next(flowing)
            for i in range(spec.num_leaves)
        ]
        return pytree.tree_unflatten(leaves, spec)

    def input_names(self) -> list[str]:
        """Names for the file's inputs: `input`, or the arguments' names, or `input_0`, …."""
        keys = [key.rpartition("/")[2] for key in self.inputs]
        is_plain = [key.isidentifier() and keys.count(key) == 1 for key in keys]
        return _names(
            "input", [key if ok else None for key, ok in zip(keys, is_plain, strict=True)]
        )

    def output_names(self) -> list[str]:
        """Names for the file's outputs: `output`, or the keys of a flat dict, or `output_0`, …."""
        spec = pytree.treespec_loads(self.outputs)
        count = spec.num_leaves
        keys: list[Any] = list(spec.context) if spec.type is dict else []
        is_flat = len(keys) == count and all(isinstance(key, str) for key in keys)
        named = keys if is_flat else [None] * count
        taken = set(self.input_names())
        free = [f"output_{name}" if name in taken else name for name in named]
        return _names("output", [name for i, name in enumerate(free) if i not in self.constants])

    def to_json(self) -> str:
        """Text for the file's metadata."""
        return json.dumps(
            {
                "parameters": self.parameters,
                "inputs": self.inputs,
                "outputs": self.outputs,
                "constants": list(self.constants.items()),
            }
        )

    @classmethod
    def from_json(cls, text: str) -> Signature:
        """The inverse of `to_json`."""
        values = json.loads(text)
        return cls(
            tuple(values["parameters"]),
            tuple(values["inputs"]),
            values["outputs"],
            dict(values["constants"]),
        )


def _positional_parameters(model: nn.Module) -> tuple[str, ...]:
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(model.forward).parameters.values()
    return tuple(parameter.name for parameter in parameters if parameter.kind in kinds)


def _keyed(parameters: Sequence[str], inputs: ModelInputs) -> dict[str, Tensor]:
    """The tensors of a call by the path to them; an argument's path begins with its name."""
    named = {
        parameters[i] if i < len(parameters) else f"*{i - len(parameters)}": value
        for i, value in enumerate(inputs.args)
    }
    leaves, _ = pytree.tree_flatten_with_path({**named, **inputs.kwargs})
    return {_path(path): leaf for path, leaf in leaves if isinstance(leaf, Tensor)}


def _path(keys: Sequence[Any]) -> str:
    parts = (getattr(key, "key", getattr(key, "idx", getattr(key, "name", key))) for key in keys)
    return "/".join(str(part) for part in parts)


def _names(prefix: str, proposed: Sequence[str | None]) -> list[str]:
    if len(proposed) == 1:
        return [prefix]
    return [name or f"{prefix}_{i}" for i, name in enumerate(proposed)]
