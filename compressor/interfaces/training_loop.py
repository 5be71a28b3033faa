"""A user's own training function, with the three changes of its arguments that the engine needs."""

from __future__ import annotations

import copy
from collections.abc import Callable, MutableMapping
from typing import Any

from torch import nn

from compressor.errors import ConfigError


class ExternalTrainingLoop:
    """Trains by `train_function(model, train_args) -> model` in place of the built-in trainer.

    Override a `modify_args_*` method when the arguments have other names. Fine-tuning is only
    possible when `modify_args_for_finetuning` is overridden, or by a number of epochs.

    Args:
        train_function: takes a model and the arguments, and returns the trained model.
        train_args: a `Namespace`, a dict, or any object with attributes; never changed.
    """

    def __init__(
        self, train_function: Callable[[nn.Module, Any], nn.Module], train_args: Any
    ) -> None:
        self.train_function = train_function
        self.train_args = train_args

    def copy_args(self) -> Any:
        """A deep copy of the arguments: what is changed for one training is not kept."""
        return copy.deepcopy(self.train_args)

    def modify_args_for_validation(self, args: Any, validation: bool) -> Any:
        """Switch validation during the training on or off."""
        return self._modify_args(args, "validation", validation)

    def modify_args_for_epochs(self, args: Any, epochs: int) -> Any:
        """Set how many epochs are trained."""
        return self._modify_args(args, "epochs", epochs)

    def modify_args_for_finetuning(self, args: Any) -> Any:
        """Set what a short fine-tuning needs: fewer epochs, a lower learning rate.

        Raises:
            NotImplementedError: unless overridden.
        """
        raise NotImplementedError

    @property
    def can_finetune(self) -> bool:
        """Whether `modify_args_for_finetuning` is overridden."""
        base = ExternalTrainingLoop.modify_args_for_finetuning
        return type(self).modify_args_for_finetuning is not base

    def train(
        self,
        model: nn.Module,
        epochs: int | None = None,
        validation: bool = True,
        finetuning: bool = False,
    ) -> nn.Module:
        """Call the function on a copy of the arguments.

        Args:
            model: is trained, perhaps in place.
            epochs: how many; None leaves what the arguments say.
            validation: whether the function may evaluate on the way.
            finetuning: use the arguments for fine-tuning; they win over `epochs`.

        Returns:
            The trained model.

        Raises:
            ConfigError: if the function returns no model.
        """
        args = self.copy_args()
        # A method that returns nothing has changed what it was given.
        if finetuning and self.can_finetune:
            args = _given(self.modify_args_for_finetuning(args), args)
        elif epochs is not None:
            args = _given(self.modify_args_for_epochs(args, epochs), args)
        args = _given(self.modify_args_for_validation(args, validation), args)
        trained: object = self.train_function(model, args)
        if not isinstance(trained, nn.Module):
            raise ConfigError(
                f"The external training function returned a {type(trained).__name__}. "
                "Return the trained model."
            )
        return trained

    @staticmethod
    def _modify_args(args: Any, key: str, value: Any) -> Any:
        """Set an argument that is there, in place.

        Raises:
            ConfigError: if there is no argument `key`.
        """
        is_mapping = isinstance(args, MutableMapping)
        is_known = key in args if is_mapping else hasattr(args, key)
        if not is_known:
            raise ConfigError(
                f"The external training loop's arguments have no {key!r}. "
                f"Add it, or override modify_args_for_{key} to set what your function reads."
            )
        if is_mapping:
            args[key] = value
        else:
            setattr(args, key, value)
        return args


def _given(returned: Any, args: Any) -> Any:
    return args if returned is None else returned
