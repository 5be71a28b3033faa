"""Channels weighed by what the whole image shows (Hu et al., 2018, https://arxiv.org/abs/1709.01507)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from compressor.errors import ConfigError, ModelError
from compressor.structure import surgery
from compressor.structure.surgery import Edit
from compressor.training.algorithm import Algorithm
from compressor.training.algorithms.surgical import FIRST_AT_SETUP, GROUPED, changing_layers
from compressor.training.card import Card
from compressor.training.events import Event
from compressor.training.state import State


class ChannelGate(nn.Module):
    """A factor for each channel: 2 * sigmoid(fc2(relu(fc1(mean over the pixels)))).

    The paper's factor is half of that. Twice a sigmoid of 0 is 1: with `fc2` at zero, as it begins,
    the gate gives its input back to the bit, and learns from the first step on. Otherwise it is
    torchvision's `ops.SqueezeExcitation`, which a file of ours must not name.

    Args:
        channels: C.
        squeezed: channels between the two layers.
    """

    def __init__(self, channels: int, squeezed: int, **options: Any) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(channels, squeezed, 1, **options)
        self.fc2 = nn.Conv2d(squeezed, channels, 1, **options)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> the same."""
        means = x.mean((-2, -1), keepdim=True)
        factors: Tensor = 2 * self.fc2(self.fc1(means).relu()).sigmoid()
        return x * factors


class SqueezeExciteConv2d(nn.Conv2d):
    """A convolution with a `ChannelGate` behind it.

    Args:
        squeezed: channels between the two layers of the gate.
    """

    def __init__(self, *args: Any, squeezed: int, **options: Any) -> None:
        super().__init__(*args, **options)
        self.gate = ChannelGate(self.out_channels, squeezed, device=options.get("device"))

    @classmethod
    def around(
        cls, conv: nn.Conv2d, squeezed: int, generator: torch.Generator | None
    ) -> SqueezeExciteConv2d:
        """The convolution `conv`, gated, with the same parameter objects; it computes the same."""
        new = cls(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,
            stride=conv.stride,
            padding=conv.padding,
            dilation=conv.dilation,
            groups=conv.groups,
            bias=conv.bias is not None,
            padding_mode=conv.padding_mode,
            device="meta",
            squeezed=squeezed,
        )
        new.weight, new.bias = conv.weight, conv.bias
        new.gate.to(conv.weight.dtype).to_empty(device=conv.weight.device)
        for parameter in new.gate.parameters():
            nn.init.zeros_(parameter)
        drawn = torch.empty(new.gate.fc1.weight.shape)  # on the CPU: all devices get the same
        nn.init.kaiming_uniform_(drawn, nonlinearity="relu", generator=generator)
        with torch.no_grad():
            new.gate.fc1.weight.copy_(drawn)
        return new

    def forward(self, input: Tensor) -> Tensor:
        """(N, in, H, W) -> (N, out, H', W')."""
        gated: Tensor = self.gate(super().forward(input))
        return gated


def apply_squeeze_excite(
    model: nn.Module,
    latent_channels: float = 64,
    min_channels: int = 128,
    generator: torch.Generator | None = None,
) -> Edit:
    """Put a `ChannelGate` behind convolutions of `model`, in place.

    All parameters stay the same objects under the same names; those of the gates are new, below
    them: "conv1.gate.fc1.weight". Every gate begins as the identity, so that what the model
    computes stays. Done again, it changes nothing.

    Args:
        model: of any architecture.
        latent_channels: between the two layers of a gate; below 1, as a fraction of its channels.
        min_channels: convolutions with fewer inputs or outputs stay as they are.
        generator: for the first layers of the gates, on the CPU; None is torch's global one.

    Returns:
        What happened to the parameters: those of the gates are added.

    Raises:
        ConfigError: if `latent_channels` is not above 0.
        ModelError: if there is no convolution of that width.

    >>> model = nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU())
    >>> inputs = torch.rand(1, 8, 4, 4)
    >>> before = model(inputs)
    >>> edit = apply_squeeze_excite(model, latent_channels=0.5, min_channels=8)
    >>> model[0].gate.fc1.out_channels, torch.equal(model(inputs), before)
    (4, True)
    """
    if not latent_channels > 0:
        raise ConfigError(
            f"latent_channels={latent_channels} lets nothing through. Write a number of channels, "
            "or a fraction of them, above 0."
        )
    gates = [module for module in model.modules() if isinstance(module, ChannelGate)]
    inside = {id(layer) for gate in gates for layer in gate.children()}
    edit, is_gated = Edit(), bool(gates)
    for name, module in list(model.named_modules()):
        # Exactly the class: what convolves otherwise, such as a blurred one, is left alone.
        if (
            type(module) is nn.Conv2d
            and id(module) not in inside
            and _width(module) >= min_channels
        ):
            squeezed = _squeezed(module.out_channels, latent_channels)
            new = SqueezeExciteConv2d.around(module, squeezed, generator)
            edit, is_gated = edit.then(surgery.replace(model, name, new)), True
    if not is_gated:
        raise ModelError(
            f"The {type(model).__name__} has no plain nn.Conv2d of {min_channels} channels or more "
            "on both sides. Lower min_channels, or leave SqueezeExcite out."
        )
    return edit


class SqueezeExcite(Algorithm):
    """Applies `apply_squeeze_excite` before training.

    Beside `BlurPool`, which comes first, convolutions that are blurred have no gate.

    Args:
        latent_channels: between the two layers of a gate; below 1, as a fraction of its channels.
        min_channels: convolutions with fewer inputs or outputs stay as they are.
    """

    events = frozenset({Event.SETUP})
    before = FIRST_AT_SETUP
    after = ("BlurPool", "Factorize")
    conflicts = changing_layers("apply_squeeze_excite", *GROUPED)
    card = Card(
        summary="Weighs the channels of a convolution by what the whole image shows.",
        source="Hu et al. (2018), Squeeze-and-Excitation Networks",
        functional="apply_squeeze_excite",
        settings="`latent_channels` of a gate; `min_channels`: lower it for narrow networks.",
        use_when="A convolutional network is trained for long, and accuracy counts more than time. "
        "What a trained one computes stays, and it goes on from there.",
        avoid_when="The model is to be small or fast: gates are added, and each waits for the mean "
        "of its image; or their channels are to be pruned in the same fit.",
        cost="Two small layers, a mean and a product of each gated convolution, also at inference.",
    )

    def __init__(self, latent_channels: float = 64, min_channels: int = 128) -> None:
        self.latent_channels = latent_channels
        self.min_channels = min_channels

    def on(self, event: Event, state: State) -> None:
        """Replace."""
        state.edit(
            lambda model: apply_squeeze_excite(model, self.latent_channels, self.min_channels)
        )


def _width(conv: nn.Conv2d) -> int:
    return min(conv.in_channels, conv.out_channels)


def _squeezed(channels: int, latent_channels: float) -> int:
    return max(int(latent_channels if latent_channels >= 1 else latent_channels * channels), 1)
