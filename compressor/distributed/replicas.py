"""A model whose gradients `DistributedDataParallel` reduces, while the backward pass goes on."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from compressor.errors import ConfigError
from compressor.logs import get_logger

if TYPE_CHECKING:
    from compressor.distributed.torch_context import TorchDistributed

logger = get_logger(__name__)


class TorchReplica:
    """A model that is wrapped once it is known which of its parameters are trained.

    The first batch runs on the model itself, and its gradients are averaged after it. What had none
    in any process then is left out of the wrapping, which would wait for it, and averaged after
    each batch, should it have one later. What had one in some processes only rules wrapping out.
    Parameters that are frozen or thawed between two batches make it begin anew.

    A batch that may be given up and begun anew, on all processes alike, must not have a last
    micro-batch: nothing is sent before `finish` then, and the model stays unwrapped.

    Args:
        context: the processes.
        model: has the same parameters in all of them.
    """

    def __init__(self, context: TorchDistributed, model: nn.Module) -> None:
        self._context = context
        self._model = model
        self._trained = _trained(model)
        self._wrapped: Wrapped | None = None
        self._unused: list[str] | None = None  # in the first batch; None: it is still to come
        self._apart: list[nn.Parameter] = []  # what the wrapping leaves out
        self._may_wrap = True
        self._has_last = False  # in this batch some micro-batch was the last

    @property
    def runner(self) -> nn.Module:
        """The model, from the second batch on wrapped."""
        if _trained(self._model) != self._trained:
            self.close()
            self._trained, self._unused, self._may_wrap = _trained(self._model), None, True
        if self._wrapped is None and self._unused is not None and self._may_wrap:
            self._wrap(self._unused)
        return self._model if self._wrapped is None else self._wrapped

    def accumulating(self, is_last: bool) -> AbstractContextManager[object]:
        """Holds forward and backward of a micro-batch; `is_last` of the batch may communicate."""
        self._has_last = self._has_last or is_last
        if self._wrapped is None or is_last:
            return nullcontext()
        quiet: AbstractContextManager[object] = self._wrapped.no_sync()
        return quiet

    def finish(self) -> None:
        """Set the gradients to the mean over all; where one has none, it counts 0.

        Raises:
            ConfigError: if a parameter got no gradient, which it has got before.
        """
        has_last, self._has_last = self._has_last, False
        if self._wrapped is not None and has_last and self._wrapped.is_reducing:
            self._check_reduced(self._wrapped)
            self._wrapped.is_reducing = False
            if self._apart:
                self._average(self._apart)
            return
        parameters = [p for p in self._model.parameters() if p.requires_grad]
        counts = self._average(parameters)
        if self._unused is None and has_last:
            self._learn(parameters, counts)

    def close(self) -> None:
        """Take the wrapping's hooks off the parameters."""
        if self._wrapped is not None:
            self._wrapped._remove_autograd_hooks()  # type: ignore[no-untyped-call]
            self._wrapped = None
        self._apart = []

    def _average(self, parameters: list[nn.Parameter]) -> list[int]:
        """Of each parameter, in how many processes it had a gradient."""
        counts = self._context.counts([p.grad is not None for p in parameters])
        gradients: list[Tensor] = []
        for parameter, count in zip(parameters, counts, strict=True):
            if count:
                if parameter.grad is None:
                    parameter.grad = parameter.new_zeros(parameter.shape)
                gradients.append(parameter.grad)
        self._context.average(gradients)
        return counts

    def _learn(self, parameters: list[nn.Parameter], counts: list[int]) -> None:
        """From the first batch: what is used by all, by none, by some."""
        names = {id(parameter): name for name, parameter in self._model.named_parameters()}
        found = [(names[id(p)], count) for p, count in zip(parameters, counts, strict=True)]
        partly = [name for name, count in found if 0 < count < self._context.world_size]
        self._unused = [name for name, count in found if not count]
        self._may_wrap = not partly and any(counts)
        if partly and not self._context.has_told_of_branches:
            self._context.has_told_of_branches = True
            logger.info(
                "Only some processes use %r in a batch: gradients are sent after the backward "
                "pass, not during it.",
                partly[0],
            )

    def _wrap(self, unused: list[str]) -> None:
        parameters = dict(self._model.named_parameters())
        self._apart = [parameters[name] for name in unused]
        names = _every_name(self._model, self._apart)
        leave_out: Any = DistributedDataParallel._set_params_and_buffers_to_ignore_for_model
        leave_out(self._model, names)
        try:
            self._wrapped = Wrapped(self._model)
        finally:  # it was read
            del self._model._ddp_params_and_buffers_to_ignore
            for tensor in (*self._model.parameters(), *self._model.buffers()):
                vars(tensor).pop("_ddp_ignored", None)

    def _check_reduced(self, wrapped: Wrapped) -> None:
        try:
            wrapped._check_reducer_finalized()  # type: ignore[no-untyped-call]
        except RuntimeError as error:
            apart = {id(parameter) for parameter in self._apart}
            odd = [
                name
                for name, p in self._model.named_parameters()
                if p.requires_grad and p.grad is None and id(p) not in apart
            ]
            raise ConfigError(
                f"{odd[0] if odd else 'A parameter'!r} got no gradient in this batch, and has got "
                "one before: the other processes wait for it. Let every batch use it, freeze it "
                "(requires_grad_(False)), or let gradients be sent after the backward pass "
                "(micro_batch_size='auto'). If it will not be used again, start anew and resume."
            ) from error


class Wrapped(DistributedDataParallel):
    """`DistributedDataParallel` that has the attributes of the model in it, for loss functions."""

    def __init__(self, module: nn.Module) -> None:
        # The processes agree already; they were compared, so nothing is to be sent here.
        super().__init__(module, init_sync=False)
        self.broadcast_buffers = False  # as an argument, torch 2.15 warns of it
        self.is_reducing = False

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "module":  # not there yet
                raise
            return getattr(self.module, name)

    @property
    def is_reducing(self) -> bool:
        """Whether the backward pass that follows the last forward pass reduces gradients."""
        return self.require_forward_param_sync

    @is_reducing.setter
    def is_reducing(self, value: bool) -> None:
        self.require_forward_param_sync = value  # a forward pass that is to be reduced sets it


def _every_name(model: nn.Module, parameters: list[nn.Parameter]) -> list[str]:
    """All names of each; those of the root's own also as the wrapping writes them, with a dot."""
    wanted = {id(parameter) for parameter in parameters}
    named = model.named_parameters(remove_duplicate=False)
    names = [name for name, parameter in named if id(parameter) in wanted]
    return [*names, *(f".{name}" for name in names if "." not in name)]


def _trained(model: nn.Module) -> list[int]:
    return [id(parameter) for parameter in model.parameters() if parameter.requires_grad]
