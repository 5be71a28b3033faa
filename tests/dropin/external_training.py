"""A user's own training function, and the loop that hands it to the engine."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import torch
from torch import nn

from compressor import ExternalTrainingLoop


def train(model: nn.Module, args: Namespace) -> nn.Module:
    """A few steps on the loader in `args`; prints as such functions do."""
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr0, momentum=0.9)
    for epoch in range(args.num_epochs):
        model.train()
        for batch in args.loader:
            optimizer.zero_grad()
            args.compute_loss(model, batch).backward()
            optimizer.step()
        print(f"epoch {epoch} at {args.lr0}", "" if args.noval else "validated")
    return model


class YoloTrainingLoop(ExternalTrainingLoop):
    """The function's arguments have names of their own."""

    def modify_args_for_validation(self, args: Any, validation: bool) -> Any:
        return self._modify_args(args, "noval", not validation)

    def modify_args_for_epochs(self, args: Any, epochs: int) -> Any:
        return self._modify_args(args, "num_epochs", epochs)

    def modify_args_for_finetuning(self, args: Any) -> Any:
        args = self._modify_args(args, "num_epochs", args.ft_epochs)
        return self._modify_args(args, "lr0", args.lr0 / 10)
