"""What one call of a model takes, as a value that can be moved, resized and replayed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, Dataset

from compressor.errors import DataError, ModelError

IMAGE_DIMS = 3
IMAGE_CHANNELS = (1, 3, 4)


@dataclass(frozen=True)
class ModelInputs:
    """The arguments of one call of a model: tensors in any nesting of tuple, list and dict."""

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, value: Any) -> ModelInputs:
        """`value` as inputs: a tuple is the arguments, a dict the keywords, all else is one.

        Raises:
            DataError: if it is a loader, a dataset or an iterator, not the inputs of one call.
        """
        if isinstance(value, ModelInputs):
            return value
        if isinstance(value, (DataLoader, Dataset, Iterator)):
            raise DataError(
                f"The inputs are a {type(value).__name__}, and those of one call of the model are "
                "wanted, without labels. Take them from a batch: batch = next(iter(loader)), then "
                "give batch[0], or whatever of it the model is called with."
            )
        if isinstance(value, tuple):
            return cls(args=value)
        if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
            return cls(kwargs=dict(value))
        return cls(args=(value,))

    def call(self, model: Callable[..., Any]) -> Any:
        """Call `model` with these arguments."""
        return model(*self.args, **self.kwargs)

    def map(self, function: Callable[[Tensor], Tensor]) -> ModelInputs:
        """The same arguments with `function` applied to every tensor."""
        args, kwargs = pytree.tree_map_only(Tensor, function, (self.args, dict(self.kwargs)))
        return ModelInputs(args, kwargs)

    def tensors(self) -> list[Tensor]:
        """All tensors, in the order in which an exported graph takes them."""
        leaves = pytree.tree_leaves((self.args, dict(self.kwargs)))
        return [leaf for leaf in leaves if isinstance(leaf, Tensor)]

    def to(self, device: torch.device | str) -> ModelInputs:
        """The same arguments on `device`; copies from pinned memory to a GPU do not block."""
        is_gpu = torch.device(device).type == "cuda"  # a copy to the CPU could be read too early
        return self.map(lambda tensor: tensor.to(device, non_blocking=is_gpu))

    def double(self) -> ModelInputs:
        """The same arguments with floating point tensors in float64."""
        return self.map(lambda tensor: tensor.double() if tensor.is_floating_point() else tensor)

    def float(self) -> ModelInputs:
        """The same arguments with floating point tensors in float32."""
        return self.map(lambda tensor: tensor.float() if tensor.is_floating_point() else tensor)

    @property
    def batch_size(self) -> int:
        """Length of dimension 0 of the first tensor that has one, else 1.

        A list of images (C, H, W), as torchvision's detectors take, is a batch of its length.
        """
        if self.image_count is not None:
            return self.image_count
        return next((len(tensor) for tensor in self.tensors() if tensor.dim()), 1)

    @property
    def image_count(self) -> int | None:
        """How many images (C, H, W) it has in a list; None if it is no such call.

        A graph that was traced with a list takes as many: there is no dimension of the batch.
        """
        images = _image_list(self.args)
        return None if images is None else len(images)

    def with_batch(self, size: int) -> ModelInputs:
        """`size` samples: the first ones, or all of them repeated.

        Tensors whose dimension 0 is not the batch (scalars, shared tables) stay as they are.
        """
        now = self.batch_size
        images = _image_list(self.args)
        if images is not None:
            some = [images[i % now] for i in range(size)]
            return ModelInputs(tuple(some if a is images else a for a in self.args), self.kwargs)

        def resize(tensor: Tensor) -> Tensor:
            if not tensor.dim() or len(tensor) != now:
                return tensor
            repeats = -(-size // now)
            return tensor.repeat(repeats, *[1] * (tensor.dim() - 1))[:size].contiguous()

        return self.map(resize)

    def part(self, start: int, size: int) -> ModelInputs:
        """The samples from `start` on, `size` of them or as many as there are.

        Tensors whose dimension 0 is not the batch stay as they are. A list of images is one part:
        a graph takes all of them.
        """
        if self.image_count is not None:
            return self
        whole = self.batch_size
        return self.map(
            lambda tensor: (
                tensor[start : start + size] if tensor.dim() and len(tensor) == whole else tensor
            )
        )

    def parts(self, size: int) -> Iterator[ModelInputs]:
        """All samples in order, `size` at a time."""
        for start in range(0, 1 if self.image_count else self.batch_size, size):
            yield self.part(start, size)


def _image_list(args: tuple[Any, ...]) -> list[Tensor] | None:
    """The first argument, if it is a list of (C, H, W) images."""
    first = args[0] if args else None
    if not isinstance(first, list) or not first:
        return None
    are_images = all(
        isinstance(image, Tensor) and image.dim() == IMAGE_DIMS and len(image) in IMAGE_CHANNELS
        for image in first
    )
    return first if are_images else None


def record_inputs(model: nn.Module, call: Callable[[nn.Module], Any]) -> ModelInputs:
    """The arguments that `model` receives when `call(model)` runs it for the first time.

    Raises:
        ModelError: if `call` never calls the model.
    """
    seen: list[ModelInputs] = []

    def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(ModelInputs(args, kwargs))

    handle = model.register_forward_pre_hook(note, with_kwargs=True, prepend=True)
    try:
        with torch.no_grad():
            call(model)
    finally:
        handle.remove()
    if not seen:
        raise ModelError(
            "The forward pass never called the model. `model_call(model, x, device)` must call "
            "`model(...)` itself, not one of its methods."
        )
    return seen[0]


def output_tensors(outputs: Any) -> list[Tensor]:
    """The floating point tensors of a model's outputs, in a fixed order."""
    leaves = pytree.tree_leaves(outputs)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def tensor_bytes(tensor: Tensor) -> bytes:
    """The raw content of `tensor`, whatever its dtype."""
    flat = tensor.detach().cpu().contiguous().flatten()
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def device_of(model: nn.Module) -> torch.device:
    """Where the first parameter or buffer lies; the CPU for a model without any."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")
