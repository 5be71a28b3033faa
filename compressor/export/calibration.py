"""What a user gives to calibrate on, as calls of the model; what is none of them is refused."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.data import Dataset

from compressor.errors import DataError, ModelError, first_line
from compressor.interfaces.inputs import ModelInputs
from compressor.interfaces.instances import check_module
from compressor.structure.trace import FORWARD_FAILURES, eval_mode

EXAMPLES = 2  # samples of the batch that the model is traced with


def check_model(model: nn.Module) -> None:
    """Refuse a model that computes in another type than the simulation and the file do.

    Raises:
        ModelError: if it is no module, or no parameter is float32; with the type.
    """
    check_module("model", model)
    kinds = {p.dtype for p in model.parameters() if p.is_floating_point()}
    if kinds and torch.float32 not in kinds:
        names = ", ".join(sorted(str(kind) for kind in kinds))
        raise ModelError(
            f"The parameters of the model are {names}, and quantization starts from float32. "
            "Write quantize(copy.deepcopy(model).float(), …), with batches of float32."
        )


def read_calibration(
    calibration: Iterable[Any], model: nn.Module
) -> tuple[ModelInputs, Iterable[ModelInputs]]:
    """A small batch to trace with, and all batches, on the CPU.

    Args:
        calibration: batches; see `quantize`. Of an iterator the first is taken and given again. Of
            lists of images, as detectors take them, the whole first is to trace with.
        model: on the CPU; called once, with the small batch.

    Raises:
        DataError: if it is no list of batches, there is none, or the model does not take them.
    """
    _check_kind(calibration)
    batches: Iterator[ModelInputs] = (_read(batch) for batch in calibration)
    first = next(batches, None)
    if first is None:
        raise DataError(
            "There is no calibration batch. Give at least one batch of training inputs."
        )
    if not first.batch_size:
        raise DataError("The first calibration batch has no sample. Give batches of one or more.")
    some = first if first.image_count else first.with_batch(EXAMPLES)
    _check_call(model, first, some, is_dataset=isinstance(calibration, Dataset))
    others = (_of_length(batch, first, number) for number, batch in enumerate(batches, 2))
    return some, chain([first], others)


def _check_kind(calibration: Any) -> None:
    name = type(calibration).__name__
    if isinstance(calibration, np.ndarray):
        raise DataError(
            "`calibration` is a numpy array, not a list of batches of tensors. Write "
            "torch.from_numpy(calibration).split(32)."
        )
    if isinstance(calibration, (Tensor, ModelInputs, Mapping)):
        raise DataError(
            f"`calibration` is a {name}, not a list of batches. Write it in brackets: [...]."
        )
    is_iterable = hasattr(calibration, "__iter__") or hasattr(calibration, "__getitem__")
    if isinstance(calibration, str) or not is_iterable:
        raise DataError(
            f"`calibration` is of type {name}, not batches of inputs. Give a list of tensors, or "
            "a DataLoader."
        )


def _read(batch: Any) -> ModelInputs:
    inputs = ModelInputs.of(batch)
    leaves = pytree.tree_leaves((inputs.args, dict(inputs.kwargs)))
    if any(isinstance(leaf, np.ndarray) for leaf in leaves):
        raise DataError(
            "A calibration batch is, or has, a numpy array. Write torch.from_numpy(array), as the "
            "model is called."
        )
    if not inputs.tensors():
        raise DataError(
            f"A calibration batch, of type {type(batch).__name__}, has no tensor. Give what the "
            "model is called with: a tensor, a tuple of arguments, or a dict of keywords."
        )
    return inputs.to("cpu")


def _of_length(batch: ModelInputs, first: ModelInputs, number: int) -> ModelInputs:
    """`batch`, if it has as many images in a list as the graph takes."""
    if batch.image_count != first.image_count:
        counts = [each.image_count or "no" for each in (batch, first)]
        raise DataError(
            f"Calibration batch {number} is a list of {counts[0]} images, and the first has "
            f"{counts[1]}: a file takes as many as it was made with. Give lists of one length."
        )
    return batch


def _check_call(
    model: nn.Module, whole: ModelInputs, some: ModelInputs, *, is_dataset: bool
) -> None:
    try:
        with eval_mode(model), torch.no_grad():
            some.call(model)
    except FORWARD_FAILURES as error:
        kinds = ", ".join(f"{tuple(t.shape)} {t.dtype}" for t in whole.tensors())
        hint = "Give batches as the model is called with, samples along dimension 0."
        if is_dataset:
            hint = "A Dataset gives single samples: write DataLoader(dataset, batch_size=32)."
        elif len(whole.tensors()) > 1:
            hint = (
                "A batch is the arguments of one call, without labels: of a loader of inputs and "
                "labels write [x for x, _ in loader]. Each tensor as long as the first is taken "
                "for one of samples."
            )
        raise DataError(
            f"The model does not run on the first samples of the first calibration batch, which is "
            f"{kinds}: {first_line(error)} {hint}"
        ) from error
