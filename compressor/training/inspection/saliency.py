"""Where a classifier looks: gradients of a class's score at the image (Simonyan et al., 2014).

"Deep Inside Convolutional Networks: Visualising Image Classification Models and Saliency Maps".
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from compressor.errors import ModelError
from compressor.interfaces.evaluation import evaluating


def input_gradients(call: Callable[[Tensor], Tensor], inputs: Tensor, targets: Tensor) -> Tensor:
    """How much each pixel moves the score of a class: |d score / d pixel|, its largest channel.

    The gradients of parameters are not touched. A module is put into eval mode meanwhile; any other
    `call` must treat the samples independently, which batch norm in training mode does not.

    Args:
        call: inputs to logits (N, K).
        inputs: (N, C, H, W) or (N, H, W), of floats.
        targets: (N,) of int64: the class of each sample whose score is looked at.

    Returns:
        (N, H, W), 0 to 1: each map is divided by its maximum. All 0 where nothing moves the score.

    Raises:
        ModelError: if there is no gradient: images of integers, or outputs that do not depend on
            them differentiably.

    >>> maps = input_gradients(lambda x: x.flatten(1), torch.ones(1, 1, 1, 2), torch.tensor([1]))
    >>> maps.tolist()
    [[[0.0, 1.0]]]
    """
    if not inputs.is_floating_point():
        raise ModelError(
            f"Images of {inputs.dtype} have no gradient. "
            "Let the loader give floats, not the model convert them."
        )
    mode = evaluating(call) if isinstance(call, nn.Module) else nullcontext()
    with mode, torch.inference_mode(False), torch.enable_grad():
        leaf = inputs.detach().clone().requires_grad_(True)
        # The clones: a tensor made in inference mode cannot be part of a graph.
        scores = call(leaf).gather(1, targets.clone()[:, None])
        if not scores.requires_grad:
            raise _no_gradient()
        # Not backward(): that would add to the gradients of the parameters.
        (gradients,) = torch.autograd.grad(scores.sum(), leaf, allow_unused=True)
    if gradients is None:
        raise _no_gradient()
    return _normalise(gradients.abs().amax(1) if gradients.dim() == 4 else gradients.abs())


def _normalise(maps: Tensor) -> Tensor:
    """Each map (N, H, W) divided by its maximum."""
    maps = maps.float().nan_to_num(0.0, 0.0, 0.0)
    largest = maps.amax((1, 2), keepdim=True)
    return maps / largest.clamp(min=torch.finfo(maps.dtype).tiny)


def _no_gradient() -> ModelError:
    return ModelError(
        "The outputs do not depend on the images differentiably. "
        "Leave out no_grad, detach and rounding between them."
    )
