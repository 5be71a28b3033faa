"""Linear layers in eight bits under torch.compile, beside plain torch and beside ONNX Runtime.

A transformer encoder of random weights: its speed does not depend on them, and its error on random
inputs says how coarse a format is. With --device cuda the rows of ONNX Runtime, which runs on the
CPU, are left out, and those of floats of eight bits are there if the GPU multiplies them.

python -m benchmarks.quantization_inductor --threads 1        (needs: pip install torchao)
"""

from __future__ import annotations

import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import nn

from benchmarks.common import finish, make_parser
from compressor.export.post_training import PostTraining
from compressor.interfaces.inputs import ModelInputs
from compressor.profiling.latency import eager_call, interleave
from compressor.targets import (
    Deployed,
    EagerTarget,
    InductorTarget,
    OnnxRuntimeModel,
    OnnxRuntimeTarget,
    Target,
)

TOKENS, WIDTH, HEADS = 64, 256, 4


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=1)
    arguments = parser.parse_args()
    started = time.monotonic()
    torch.manual_seed(arguments.seed)
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 4 * WIDTH, dropout=0.0, batch_first=True)
    depth = 1 if arguments.quick else 4
    model = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False).eval()
    inputs = ModelInputs((torch.randn(max(2, arguments.batch_size), TOKENS, WIDTH),))
    place = (arguments.device, arguments.threads, arguments.batch_size)
    targets: list[Target] = [EagerTarget(*place), InductorTarget(*place)]
    if arguments.device == "cpu":
        targets.append(OnnxRuntimeTarget(*place))
    with tempfile.TemporaryDirectory() as folder:
        deployed, seconds = deploy(model, inputs, targets, Path(folder))
        times = measure(deployed, inputs.with_batch(arguments.batch_size), targets[0])
    with torch.no_grad():
        expected = inputs.call(model)
    rows = [
        {
            "runtime and format": name,
            "batch": arguments.batch_size,
            "ms": times[name],
            "eager / this": times["eager float"] / times[name],
            "relative error": relative_error(each.module, inputs, expected),
            "MB": each.size_bytes / 1e6,
            "deployed in s": seconds[name],
        }
        for name, each in deployed.items()
    ]
    ratios = {str(row["runtime and format"]): float(row["eager / this"]) for row in rows}
    summary = {f"{name.replace(' ', '_')}_ratio": ratio for name, ratio in ratios.items()}
    finish(rows, summary, arguments, started)


def deploy(
    model: nn.Module, inputs: ModelInputs, targets: list[Target], folder: Path
) -> tuple[dict[str, Deployed], dict[str, float]]:
    """The model in float and in each dynamic format and those of weights, and the seconds taken."""
    layers = PostTraining(model, inputs).layers
    deployed: dict[str, Deployed] = {}
    seconds: dict[str, float] = {}
    for target in targets:
        formats = sorted(form for form in target.formats if form.startswith(("dynamic", "weight_")))
        if isinstance(target, OnnxRuntimeTarget):
            formats = ["dynamic_int8"]
        for form in ("", *formats):
            name = f"{target.name} {form or 'float'}"
            wanted = dict.fromkeys(layers, target.format(form)) if form else {}
            started = time.monotonic()
            deployed[name] = target.deploy(model, inputs, folder / name, formats=wanted)
            seconds[name] = time.monotonic() - started
    return deployed, seconds


def measure(deployed: dict[str, Deployed], inputs: ModelInputs, target: Target) -> dict[str, float]:
    """Milliseconds of one call of each, in turns."""
    with ExitStack() as stack:
        calls = {}
        for name, each in deployed.items():
            if isinstance(each.module, OnnxRuntimeModel):
                calls[name] = each.module.bind(inputs)
            else:
                call = eager_call(each.module, inputs, threads=target.threads)
                calls[name] = stack.enter_context(call)
                calls[name]()  # compiled for this batch size
        times = interleave(calls, device=target.device)
    return {name: timing.best_ms for name, timing in times.items()}


@torch.no_grad()
def relative_error(module: nn.Module, inputs: ModelInputs, expected: torch.Tensor) -> float:
    place = next((p.device for p in module.parameters() if p.numel()), torch.device("cpu"))
    result = inputs.to(place).call(module).cpu()
    return float((result - expected).norm() / expected.norm())


if __name__ == "__main__":
    main()
