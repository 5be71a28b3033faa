"""Training with a test every now and then, each preset on top of the bare loop."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import nn

from compressor.interfaces.evaluation import evaluating
from compressor.logs import get_logger
from compressor.training.recipes.loop import (
    Recipe,
    RecipeOptions,
    StepFunction,
    check_options,
    recipe,
)
from compressor.training.recipes.reporting import LOG_EVERY, TEST_EVERY, CallRecipe, StdoutLogger
from compressor.training.step import in_training_mode

if TYPE_CHECKING:
    from typing_extensions import Unpack

logger = get_logger(__name__)

CallFunction: TypeAlias = Callable[[], "Mapping[str, Any] | None"]


class WithTestOptions(RecipeOptions, total=False):
    """What every recipe takes that also tests; see `train_and_test`."""

    test_every: int
    log_every: int


def train_and_test(
    model: nn.Module,
    train_fn: StepFunction,
    test_fn: StepFunction,
    train_loader: Iterable[Any],
    test_loader: Iterable[Any],
    *,
    test_every: int = TEST_EVERY,
    log_every: int = LOG_EVERY,
    **options: Unpack[RecipeOptions],
) -> Recipe:
    """The bare loop, and another for testing: the recipe's `test_loop`.

    During a run of either loop `model` is in the mode that belongs to it, and tests compute no
    gradients; both are put back. Metrics of the tests are posted as "test/name". The metrics are
    written to the package's log, which `compressor.logs.set_verbosity("info")` shows.

    Args:
        model: is registered as "model", and trained in place.
        train_fn: of a training batch, as in `recipe`.
        test_fn: of a test batch; returns what the callbacks of `test_loop` are to see.
        train_loader: any iterable of batches that can be iterated again.
        test_loader: likewise.
        test_every: batches; -1 tests only when an epoch ends, when there always is a test.
        log_every: batches between lines of the log; -1: only when an epoch ends.
        options: of `recipe`.
    """
    check_options(train_and_test, options, RecipeOptions)
    loop = recipe(train_fn, train_loader, around=lambda: in_training_mode(model), **options)
    return _with_second_loop(
        loop, model, test_fn, test_loader, "test", run_every=test_every, log_every=log_every
    )


def train_and_call(
    model: nn.Module,
    train_fn: StepFunction,
    call_fn: CallFunction,
    loader: Iterable[Any],
    *,
    call_every: int = TEST_EVERY,
    log_every: int = LOG_EVERY,
    **options: Unpack[RecipeOptions],
) -> Recipe:
    """As `train_and_test`, but a function is called in place of a test: for generative models.

    Args:
        model: is registered as "model", and trained in place.
        train_fn: of a training batch, as in `recipe`.
        call_fn: of nothing, in eval mode, without gradients; what it returns is in the state of
            the recipe's `call_loop`, whose metrics are posted as "call/name".
        loader: any iterable of batches that can be iterated again.
        call_every: batches; -1 calls only when an epoch ends, when it always is called.
        log_every: batches between lines of the log; -1: only when an epoch ends.
        options: of `recipe`.
    """
    check_options(train_and_call, options, RecipeOptions)
    loop = recipe(train_fn, loader, around=lambda: in_training_mode(model), **options)
    _with_second_loop(
        loop,
        model,
        lambda _: call_fn(),
        (None,),
        "call",
        run_every=call_every,
        log_every=log_every,
    )
    loop.call_loop.callbacks.keeps_returned = True
    return loop


def _with_second_loop(
    loop: Recipe,
    model: nn.Module,
    step_fn: StepFunction,
    loader: Iterable[Any],
    name: str,
    *,
    run_every: int,
    log_every: int,
) -> Recipe:
    state = loop.trainer.state
    second = recipe(
        step_fn,
        loader,
        device=state.device,
        seed=state.seed,
        around=lambda: _judging(model),
    )
    loop.register("model", model)
    loop.register(f"{name}_loop", second)
    loop.callbacks.add_callbacks(
        [CallRecipe(second, run_every, prefix=name), StdoutLogger(log_every, to=logger)]
    )
    return loop


@contextmanager
def _judging(model: nn.Module) -> Iterator[None]:
    with evaluating(model), torch.no_grad():
        yield
