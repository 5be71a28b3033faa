"""A technique of one's own, in one file: neurons that do nearly the same are merged into one.

Behind a ReLU, a neuron that reads in the direction of another gives a multiple of what that one
gives, so the layer behind can read the other instead. The class says where it can act (`choices`)
and how (`apply`); registered, it is used by its name. The engine senses its damage, weighs it
against int8, fine-tunes, exports and certifies, as with any technique of its own. Three lines in
`tests/examples/test_custom_technique.py` hold it to the contract of all techniques.

python examples/custom_technique.py
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from digits_data import make_loaders, train
from torch import Tensor, nn

from compressor import Engine, Result, TorchFramework
from compressor.report.console import render
from compressor.result import Choice
from compressor.structure import surgery
from compressor.techniques import TECHNIQUES, Lost, Stage, Technique, TechniqueContext
from compressor.training.card import Card

KEPT_FRACTIONS = (0.75, 0.5, 0.25, 0.125)


@TECHNIQUES.register
class NeuronMerging(Technique):
    """Fewer neurons in a linear layer that feeds another one through a ReLU."""

    name = "neuron_merging"
    stage = Stage.RANK  # behind pruning and block removal: of the neurons that these left
    card = Card(
        summary="Merges neurons of a linear layer that read in nearly the same direction.",
        source="Srinivas and Babu (2015), Data-free parameter pruning for deep neural networks",
        functional=None,
        use_when="An MLP is wider than its task needs, and there is little data to fine-tune on.",
        avoid_when="Beside channel_pruning, which narrows the same layers by other means.",
        cost="A matrix of the neurons' cosines, gone through once for each neuron that goes.",
    )

    def choices(self, model: nn.Module, context: TechniqueContext) -> Iterator[Choice]:
        """Widths for every linear layer whose neurons can be merged."""
        for site, reader in mergeable_layers(model, context):
            neurons, step = surgery.get(model, site).out_features, context.width_multiple
            widths = {int(fraction * neurons) // step * step for fraction in KEPT_FRACTIONS}
            for width in sorted(widths, reverse=True):
                if width >= context.min_width:
                    yield Choice(
                        technique=self.name,
                        site=site,
                        setting={"width": width, "reader": reader},
                        label=f"{width} of {neurons} neurons",
                        modules=(site, reader),
                    )

    def apply(self, model: nn.Module, choices: Sequence[Choice], context: TechniqueContext) -> None:
        """Replace both layers of each choice by narrower ones, in place."""
        for choice in choices:
            site, reader = choice.site, choice.setting["reader"]
            first, second = surgery.get(model, site), surgery.get(model, reader)
            kept, reading = merge_neurons(
                first.weight.detach(), first.bias, second.weight.detach(), choice.setting["width"]
            )
            bias = None if first.bias is None else first.bias[kept]
            surgery.replace(model, site, make_linear(first.weight[kept], bias))
            surgery.replace(model, reader, make_linear(reading, second.bias))


def mergeable_layers(model: nn.Module, context: TechniqueContext) -> Iterator[tuple[str, str]]:
    """Names of linear layers, and of the one that alone reads each through a ReLU."""
    uses = Counter(id(weight) for _, weight in model.named_parameters(remove_duplicate=False))
    for parent, module in model.named_modules():
        if not isinstance(module, nn.Sequential):
            continue  # what else happens to the outputs is not known
        children = [
            (f"{parent}.{key}".lstrip("."), child) for key, child in module._modules.items()
        ]
        for i in range(len(children) - 2):
            (site, first), (_, between), (reader, second) = children[i : i + 3]
            if not (type(first) is type(second) is nn.Linear and isinstance(between, nn.ReLU)):
                continue
            if uses[id(first.weight)] > 1 or uses[id(second.weight)] > 1:
                context.lost.append(Lost(NeuronMerging.name, site, "its weights are shared"))
            else:
                yield site, reader


def merge_neurons(
    weight: Tensor, bias: Tensor | None, reading: Tensor, width: int
) -> tuple[Tensor, Tensor]:
    """Merge one neuron after the other into its likest, until `width` are left.

    Args:
        weight: (neurons, inputs).
        bias: (neurons,).
        reading: (outputs, neurons), the weight of the layer behind.
        width: 1 or more.

    Returns:
        Numbers of the neurons that stay, and how they are read: (outputs, width).
    """
    rows = weight if bias is None else torch.cat([weight, bias.detach()[:, None]], dim=1)
    sizes = rows.norm(dim=1).clamp_min(1e-12)  # a dead neuron has none
    cosines = (rows @ rows.T / sizes.outer(sizes)).clamp(0, 1)
    reading, stays = reading.clone(), torch.ones_like(sizes, dtype=torch.bool)
    for _ in range(len(rows) - width):
        told = sizes * reading.norm(dim=0)
        lost = told[:, None] * (1 - cosines.square()).sqrt()  # of a row, when it goes to a column
        lost[~stays] = lost[:, ~stays] = torch.inf
        gone, other = divmod(int(lost.fill_diagonal_(torch.inf).argmin()), len(rows))
        share = cosines[gone, other] * sizes[gone] / sizes[other]
        reading[:, other] += share * reading[:, gone]
        stays[gone] = False
    kept = stays.nonzero().flatten()
    return kept, reading[:, kept]


def make_linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.detach().clone())
    layer.bias = None if bias is None else nn.Parameter(bias.detach().clone())
    return layer


def make_mlp(width: int) -> nn.Module:
    layers = [nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()]
    return nn.Sequential(nn.Flatten(), *layers, nn.Linear(width, 10))


def main(argv: Sequence[str] | None = None) -> Result:
    arguments = parse_arguments(argv)
    torch.manual_seed(arguments.seed)
    is_quick = arguments.quick
    data = make_loaders()
    engine = Engine(
        framework=TorchFramework(),
        data=data,
        model=train(make_mlp(64 if is_quick else 512), data["train"], epochs=4 if is_quick else 20),
        config={
            "delta": arguments.delta,
            "optimization": "compression",
            "techniques": ["neuron_merging", "quantization"],
            "device": "CPU",
            "budget": {"trials": 1 if is_quick else 4},
            "full_trainer": {
                "optimizer": {"name": "AdamW", "lr": 3e-3},
                "epochs": 2 if is_quick else 20,
            },
            "fine_tuner": {"loop_params": {"epochs": 1 if is_quick else 5}},
            "export": {"formats": ["onnx"]},
            "run_dir": str(arguments.run_dir),
            "seed": arguments.seed,
        },
    )
    engine.run()
    render(engine.result)
    for choice in engine.result.plan:
        print(f"  {choice.technique:<17} {choice.site:<8} {choice.label}")
    return engine.result


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--delta", type=float, default=1.0, help="points of accuracy to give up")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--run-dir", type=Path, default=Path("runs", "custom-technique"))
    parser.add_argument("--quick", action="store_true", help="a small network, one trial")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
