"""From a batch of the user's loader to a call of the model: the only place that knows the form."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from compressor.errors import ConfigError, DataError
from compressor.interfaces.data import leaves, map_leaves, move, sample_count
from compressor.interfaces.device import Device
from compressor.seeding import generator

Pattern: TypeAlias = Sequence[int | str]
DEFAULT_PATTERN: Pattern = (0, "_")


class PatternError(ConfigError, TypeError):
    """A `model_input_pattern` that cannot be meant, or a forward pass without what it needs."""


class ForwardPass(ABC):
    """How a batch becomes a call of the model.

    A place in `model_input_pattern` is that of an element in the batch, the number there is the
    place of the model's argument; '_' leaves an element out. With (1, 0, '_', 2) a batch
    (a, b, c, d) becomes `model(b, a, d)`. A pattern of length 1 takes the whole batch as the
    input, ('_',) calls the model without inputs.

    Subclasses that forget `super().__init__()` work as if nothing had been given to it.

    Args:
        model_input_pattern: None stands for (0, '_'), unless `extract_model_inputs` is overridden.
        expecting_common_inputs: the inputs are tensors in any nesting of tuple, list and dict. If
            not, `create_random_model_inputs` must be overridden.

    Raises:
        PatternError: (a TypeError) numbers that are not 0, 1, …, each once; a missing override.
    """

    _pattern: Pattern | None = None
    _expects_common_inputs: bool = True

    def __init__(
        self, model_input_pattern: Pattern | None = None, expecting_common_inputs: bool = True
    ) -> None:
        if model_input_pattern is not None:
            _check_pattern(model_input_pattern)
            self._pattern = tuple(model_input_pattern)
        self._expects_common_inputs = expecting_common_inputs
        is_own = type(self).create_random_model_inputs not in _DEFAULTS
        if not expecting_common_inputs and not is_own:
            raise PatternError(
                f"{type(self).__name__} has expecting_common_inputs=False and no "
                "create_random_model_inputs. Override it, or expect common inputs."
            )

    @property
    def model_input_pattern(self) -> Pattern:
        """The pattern that was given, or the default."""
        return DEFAULT_PATTERN if self._pattern is None else self._pattern

    @property
    def expecting_common_inputs(self) -> bool:
        """Whether the inputs are tensors in common containers."""
        return self._expects_common_inputs

    def perform(self, model: Any, batch: Any, device: Device | torch.device | str) -> Any:
        """Call `model`, which is on `device`, on the inputs in `batch`."""
        return self.model_call(model, self.extract_model_inputs(batch), Device.of(device))

    def random_perform(
        self, model: Any, batch_size: int, device: Device | torch.device | str
    ) -> Any:
        """Call `model`, which is on `device`, on random inputs."""
        return self.model_call(
            model, self.create_random_model_inputs(batch_size), Device.of(device)
        )

    def extract_model_inputs(self, batch: Any) -> Any:
        """The inputs in `batch`: a tuple of arguments, by the pattern.

        Raises:
            DataError: if the batch does not fit the pattern.

        >>> TorchForwardPass((1, 0, "_", 2)).extract_model_inputs(("a", "b", "c", "d"))
        ('b', 'a', 'd')
        """
        pattern = self.model_input_pattern
        if len(pattern) == 1:
            return () if pattern[0] == "_" else (batch,)
        if not isinstance(batch, (tuple, list)):
            keys = f" with the keys {list(batch)}" if isinstance(batch, Mapping) else ""
            raise DataError(
                f"The batch is a {type(batch).__name__}{keys}, and model_input_pattern="
                f"{tuple(pattern)} needs a tuple. Write a TorchForwardPass with your own "
                "extract_model_inputs, or (0,) for the whole batch."
            )
        if len(batch) != len(pattern):
            raise DataError(
                f"The batch has {len(batch)} elements, and model_input_pattern={tuple(pattern)} "
                f"has {len(pattern)}. Write one number or '_' for each element."
            )
        chosen = [(place, item) for place, item in zip(pattern, batch, strict=True) if place != "_"]
        return tuple(item for _, item in sorted(chosen, key=lambda pair: pair[0]))

    @abstractmethod
    def model_call(self, model: Any, x: Any, device: Device) -> Any:
        """Call `model`, which is on `device`, with `x` as `extract_model_inputs` returned it."""

    @abstractmethod
    def create_random_model_inputs(self, batch_size: int) -> Any:
        """Random inputs that `model_call` takes."""

    @abstractmethod
    def get_model_input_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shapes of all tensors in the inputs, without the batch axis."""

    def infer_sampler(self, batch: Any) -> None:  # noqa: B027
        """Learn from a batch what random inputs look like; nothing to learn by default."""


class TorchForwardPass(ForwardPass):
    """`ForwardPass` for torch: moves the inputs, knows how to draw similar ones."""

    _sample: Any = None

    def model_call(self, model: nn.Module, x: Any, device: Device) -> Any:
        """Call `model` with `x` on `device`: a tuple is the arguments, a dict the keywords."""
        x = move(x, Device.of(device).torch_device, non_blocking=True)
        if isinstance(x, (tuple, list)):
            return model(*x)
        return model(**x) if isinstance(x, Mapping) else model(x)

    def infer_sampler(self, batch: Any) -> None:
        """Remember the inputs in `batch`: random ones are drawn like them."""
        inputs = self.extract_model_inputs(batch)
        self._sample = map_leaves(_detached, inputs)

    def create_random_model_inputs(self, batch_size: int) -> Any:
        """Inputs of the form, types and range of the sample; the same each time.

        Tensors whose dimension 0 is not the batch, and what is no tensor, are the sample's own.

        Raises:
            DataError: before `infer_sampler`.
        """
        sample = self._known_sample()
        size, random = sample_count(sample), generator(0, "random inputs")

        def draw(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor) or not leaf.dim() or len(leaf) != size:
                return leaf
            return random_like(leaf, (batch_size, *leaf.shape[1:]), random)

        return map_leaves(draw, sample)

    def get_model_input_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shapes of all tensors in the inputs, without the batch axis.

        Raises:
            DataError: before `infer_sampler`.
        """
        tensors = [leaf for leaf in leaves(self._known_sample()) if isinstance(leaf, Tensor)]
        return tuple(tuple(tensor.shape[1:]) for tensor in tensors)

    def _known_sample(self) -> Any:
        if self._sample is None:
            raise DataError(
                "The shapes of the inputs are not known yet. Call infer_sampler(batch) with a "
                "batch of your loader first."
            )
        return self._sample


def random_like(sample: Tensor, shape: Sequence[int], random: torch.Generator) -> Tensor:
    """A tensor of `sample`'s type, uniform over its range: class indices stay valid.

    Args:
        sample: of any type; without a finite range 0 to 1 is taken.
        shape: of the result.
        random: draws, on the CPU.
    """
    if sample.dtype == torch.bool:
        return torch.rand(shape, generator=random) < 0.5
    if sample.is_complex():
        parts = torch.view_as_real(sample.to(torch.complex64))
        drawn = random_like(parts, (*shape, 2), random)
        return torch.view_as_complex(drawn).to(sample.dtype)
    if sample.is_floating_point():
        low, high = _range(sample.float())
        return (torch.rand(shape, generator=random) * (high - low) + low).to(sample.dtype)
    low, high = _range(sample.long())
    drawn = torch.rand(shape, generator=random, dtype=torch.float64) * (high - low + 1)
    return (drawn.floor() + low).clamp(low, high).to(sample.dtype)


def _range(sample: Tensor) -> tuple[float, float]:
    if not sample.numel():
        return 0, 1
    low, high = sample.min().item(), sample.max().item()
    is_usable = torch.isfinite(torch.tensor([low, high])).all() and (
        low < high or not sample.is_floating_point()
    )
    return (low, high) if is_usable else (0, 1)


def _detached(leaf: Any) -> Any:
    return leaf.detach().cpu().clone() if isinstance(leaf, Tensor) else leaf


def _check_pattern(pattern: Pattern) -> None:
    if isinstance(pattern, str) or not isinstance(pattern, Sequence) or not pattern:
        raise PatternError(
            f"model_input_pattern={pattern!r} is not a tuple. Write one like (0, '_'); for a dict "
            "batch, subclass TorchForwardPass and override extract_model_inputs(batch)."
        )
    for item in pattern:
        if item != "_" and (not isinstance(item, int) or isinstance(item, bool)):
            raise PatternError(
                f"model_input_pattern={tuple(pattern)} contains {item!r}. "
                "Write the position of the model's argument, or '_' to leave an element out."
            )
    numbers = sorted(item for item in pattern if isinstance(item, int))
    if numbers != list(range(len(numbers))):
        raise PatternError(
            f"model_input_pattern={tuple(pattern)} names the arguments {numbers}. "
            f"Number them {list(range(len(numbers)))}, each once."
        )


_DEFAULTS = (ForwardPass.create_random_model_inputs, TorchForwardPass.create_random_model_inputs)
