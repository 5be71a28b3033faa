"""The bare loop: a function of the batch that does the training, and four hooks around it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypedDict

import torch
from torch import Tensor, nn

from compressor.distributed import run_on_main
from compressor.errors import CheckpointError, ConfigError, suggest
from compressor.interfaces.data import map_leaves
from compressor.interfaces.device import Device
from compressor.training.checkpoint import LATEST, check_plain
from compressor.training.clock import DurationLike, parse_total
from compressor.training.recipes.hooks import RESERVED, RecipeCallbacks
from compressor.training.saving import read_together
from compressor.training.setup import DeviceLike, torch_device
from compressor.training.step import ManualStep
from compressor.training.trainer import Trainer

if TYPE_CHECKING:
    from typing_extensions import Unpack

StepFunction: TypeAlias = Callable[[Any], "Mapping[str, Any] | None"]


class RecipeOptions(TypedDict, total=False):
    """What every recipe takes; see `Recipe`."""

    device: torch.device | Device | str
    seed: int
    save_dir: str | Path | None
    save_interval: DurationLike
    autoresume: bool


class BareOptions(RecipeOptions, total=False):
    """What `recipe` takes; see `Recipe`."""

    around: Callable[[], AbstractContextManager[Any]]


def recipe(step_fn: StepFunction, loader: Iterable[Any], **options: Unpack[BareOptions]) -> Recipe:
    """A loop that calls `step_fn` on every batch, and the hooks of callbacks.

    Args:
        step_fn: of a batch on the recipe's device; does forward, backward and what else is to be
            done. What it returns, a dict or nothing, goes into the recipe's state, its tensors
            detached; those of more than one element are gone from there when a run ends.
        loader: any iterable of batches that can be iterated again.
        options: of `Recipe`: `device`, `seed`, `save_dir`, `save_interval`, `autoresume`, `around`.

    Raises:
        ConfigError: what contradicts itself, or an unknown option.

    >>> seen = []
    >>> loop = recipe(lambda batch: {"loss": batch.sum()}, [torch.ones(2)] * 3)
    >>> class Watch:
    ...     def on_batch_end(self, state):
    ...         seen.append((state["iters"], state["loss"].item()))
    >>> loop.callbacks.add_callbacks([Watch()])
    >>> loop.run(1)["epoch"], seen
    (1, [(1, 2.0), (2, 2.0), (3, 2.0)])
    """
    check_options(recipe, options, BareOptions)
    return Recipe(step_fn, loader, **options)


def check_options(function: Callable[..., Any], options: Mapping[str, Any], known: Any) -> None:
    """Do nothing if all `options` of `function` are keys of the TypedDict `known`.

    Raises:
        ConfigError: if one is not; it names the function.
    """
    for name in options:
        if name not in known.__optional_keys__:
            named = inspect.signature(function).parameters.values()
            own = [each.name for each in named if each.kind is each.KEYWORD_ONLY]
            raise ConfigError(
                f"{function.__name__} has no option {name!r}. "
                f"{suggest(name, [*own, *known.__optional_keys__])}"
            )


class Recipe:
    """A loop over batches with callbacks; make one with `recipe`, or with a preset.

    What was registered by `register` is an attribute. Everything is bit-equal after a resume, also
    within an epoch, as far as it is registered or the state of a callback.

    Args:
        step_fn: as in `recipe`.
        loader: any iterable of batches that can be iterated again.
        device: where batches, and what is registered, go.
        seed: of all that is drawn in the loop.
        save_dir: folder of the checkpoint; None writes none.
        save_interval: between checkpoints: '1ep', '500ba'. One always follows the end.
        autoresume: `run` goes on from the checkpoint of `save_dir`, if there is one.
        around: gives a context that every run is in.

    Attributes:
        trainer: runs the loop.
        callbacks: see `RecipeCallbacks`.

    Raises:
        ConfigError: what contradicts itself.
    """

    trainer: Trainer
    callbacks: RecipeCallbacks

    def __init__(
        self,
        step_fn: StepFunction,
        loader: Iterable[Any],
        *,
        device: torch.device | Device | str = "cpu",
        seed: int = 0,
        save_dir: str | Path | None = None,
        save_interval: DurationLike = "1ep",
        autoresume: bool = False,
        around: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        if autoresume and save_dir is None:
            raise ConfigError("autoresume needs a folder of checkpoints. Give save_dir.")
        own = vars(self)  # beside __setattr__, which asks what is registered
        own["callbacks"] = callbacks = RecipeCallbacks()
        own["trainer"] = Trainer(
            nn.Module(),  # what is trained is registered, or only known to `step_fn`
            ManualStep(lambda batch: callbacks.note_returned(_check_returned(step_fn(batch)))),
            train_dataloader=loader,
            max_duration=0,
            algorithms=[self.callbacks],
            device=device,
            seed=seed,
            save_dir=save_dir,
            save_interval=save_interval,
        )
        self.trainer.state.values = self.callbacks.state
        own["_checkpoint"] = None if save_dir is None else Path(save_dir) / LATEST
        own["_autoresume"] = autoresume
        own["_around"] = around

    @property
    def state(self) -> dict[str, Any]:
        """What the callbacks see: see `RecipeCallbacks.state`."""
        return self.callbacks.state

    def register(self, name: str, value: Any) -> None:
        """Make `value` the attribute `name`: saved, restored, and moved with the recipe.

        Models, tensors that are no part of a graph, and other recipes keep their identity in all of
        this; plain values are what `recipe.<name>` then is, also when another is assigned to it.

        Raises:
            ConfigError: if `name` is taken or could not be an attribute, or `value` could not be
                saved.
        """
        registered = self.trainer.registered
        if name in registered and registered[name] is not value:
            raise ConfigError(
                f"Something else is registered as {name!r}. Choose another name, or assign: "
                f"recipe.{name} = ..."
            )
        self._register(name, value)

    def _register(self, name: str, value: Any) -> None:
        if hasattr(type(self), name) or name in vars(self):
            raise ConfigError(f"A recipe has its own {name!r}. Register the value by another name.")
        if not isinstance(value, Tensor) and not callable(getattr(value, "state_dict", None)):
            try:
                check_plain(value, name)
            except CheckpointError as error:
                raise ConfigError(
                    f"{error} Or give the object state_dict and load_state_dict methods."
                ) from error
        self.trainer.register(name, value)
        self.trainer.registered.to(self.trainer.state.device)

    def run(self, epochs: int) -> dict[str, Any]:
        """Train until `epochs` epochs are done in all, counting those of earlier runs.

        So `run(10)` after `run(5)` does five more, and a resumed recipe does what is left. What has
        listened is closed at the end, also when an error, which passes, is the end.

        Returns:
            The state.

        Raises:
            ConfigError: if `epochs` is no number of epochs.
        """
        state = self.trainer.state
        if self._autoresume and not state.clock.batch:
            self.resume()
        state.max_duration = parse_total(epochs)
        with self._around():
            self.trainer.fit()
        self.callbacks.count(state)
        return self.state

    def to(self, device: DeviceLike) -> Recipe:
        """Move what is registered, in place, and from now on the batches; returns the recipe."""
        state = self.trainer.state
        state.device = torch_device(device)
        self.trainer.registered.to(state.device)
        self.callbacks.to(state.device)
        return self

    def cuda(self) -> Recipe:
        """Move to the GPU."""
        return self.to("cuda")

    def cpu(self) -> Recipe:
        """Move to the CPU."""
        return self.to("cpu")

    def state_dict(self) -> dict[str, Any]:
        """All that a recipe made alike needs to go on: no batch, nor what the step returned."""
        return self.trainer.state_dict()

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Go on from where `state_dict` was taken.

        Raises:
            CheckpointError: if other things were registered, or other callbacks added; nothing is
                loaded then.
        """
        self.check(saved)
        self.trainer.load_state_dict(saved)
        self.callbacks.count(self.trainer.state)

    def resume(self, path: str | Path | None = None) -> bool:
        """Load the checkpoint at `path`, or that of `save_dir`; say whether there was one.

        Raises:
            CheckpointError: if it is truncated, altered, or of another recipe.
        """
        context = self.trainer.context
        if path is None:
            latest: Path | None = self._checkpoint
            if latest is None or not run_on_main(context, latest.exists):
                return False
            path = latest
        self.load_state_dict(read_together(context, Path(path)))
        return True

    def check(self, saved: Mapping[str, Any]) -> None:
        """Do nothing if `saved` is of a recipe like this.

        Raises:
            CheckpointError: if it is not.
        """
        registered, algorithms = self.trainer.registered, saved["algorithms"]
        if self.callbacks.key not in algorithms:
            raise CheckpointError(
                "The checkpoint is of a Trainer and not of a recipe. Name the recipe's own."
            )
        registered.check(saved["registered"])
        self.callbacks.check(algorithms[self.callbacks.key])
        for name in registered:
            if isinstance(registered[name], Recipe):
                registered[name].check(saved["registered"][name])

    def __getattr__(self, name: str) -> Any:
        """What is registered as `name`."""
        trainer = vars(self).get("trainer")
        if trainer is None or name not in trainer.registered:
            raise AttributeError(
                f"The recipe has no attribute {name!r}, and nothing is registered by that name."
            )
        return trainer.registered[name]

    def __setattr__(self, name: str, value: Any) -> None:
        """Register another value in place of the one that is registered as `name`.

        Raises:
            AttributeError: if there is none: it would not be saved.
        """
        if name not in self.trainer.registered:
            raise AttributeError(
                f"Nothing is registered as {name!r}. Call register({name!r}, ...), so that it is "
                "saved and restored."
            )
        self._register(name, value)


def _check_returned(returned: Any) -> Mapping[str, Any]:
    """What a step returned, with its tensors detached: the graph is not kept for the state."""
    if returned is None:
        return {}
    if not isinstance(returned, Mapping):
        raise ConfigError(
            f"The step returned a {type(returned).__name__}. Return a dict of what callbacks are "
            "to see, such as {'loss': loss}, or nothing."
        )
    taken = sorted(RESERVED & returned.keys())
    if taken:
        raise ConfigError(
            f"The step returned {taken[0]!r}, which is the recipe's own. Name it otherwise; to put "
            "a value among the metrics add the callback Log."
        )
    return {name: _detach(value) for name, value in returned.items()}


def _detach(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, (Mapping, tuple, list)):
        return map_leaves(lambda leaf: _detach(leaf), value)
    return value
