"""The pages of the API reference: which name is on which page. mkdocstrings fills them."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

import compressor
from compressor import functional

DOTTED = "::: "
WIDTH = 88
IN_FULL = (
    "Arguments, types and errors follow on the site (`mkdocs serve --config-file "
    "docs/site/mkdocs.yml`, with what the extra `docs` installs). In Python `help(name)` says the "
    "same."
)


class Page(NamedTuple):
    """One page of the reference."""

    title: str
    intro: str
    names: Sequence[str]  # public, or "module:Name"


REFERENCE = {
    "engine": Page(
        "Engine, configuration, result",
        "What [the quickstart](../quickstart.md) uses. The options of `config`, with examples: "
        "[options](../options.md).",
        (
            "Engine",
            "TorchFramework",
            "Config",
            "compressor.config:TargetConfig",
            "compressor.config:BudgetConfig",
            "compressor.config:ExportConfig",
            "compressor.config:ExecutorConfig",
            "compressor.config:TrainerConfig",
            "compressor.config.trainer:DistillationConfig",
            "compressor.config.trainer:EmaConfig",
            "Result",
            "compressor.result:Certificate",
            "compressor.result:Interval",
            "compressor.result:Agreement",
            "compressor.result:Parity",
            "compressor.result:VariantRecord",
            "compressor.result:Cost",
            "compressor.result:Plan",
            "compressor.result:Choice",
        ),
    ),
    "interfaces": Page(
        "What you supply",
        "How a batch becomes a call, the loss, the evaluation, optimizers, your own training loop: "
        "[the guide](../guides/data.md).",
        (
            "ForwardPass",
            "TorchForwardPass",
            "LossFunction",
            "EvaluationFunction",
            "TorchEvaluationFunction",
            "Accuracy",
            "TopK",
            "EvalLossFunction",
            "NativeOptimizerFactory",
            "NativeSchedulerFactory",
            "DefaultTorchNativeSchedulerFactory",
            "ExternalTrainingLoop",
            "Device",
            "compressor.interfaces.inputs:ModelInputs",
        ),
    ),
    "structure": Page(
        "Prune, save and load, count",
        "Without the engine: [the guide](../structure.md).",
        (
            "prune",
            "Pruned",
            "save",
            "load",
            "profile",
            "compare",
            "compressor.profiling.profile:Profile",
            "compressor.profiling.profile:Comparison",
            "compressor.structure.channels:find_groups",
            "compressor.structure.cutting:keep_many",
        ),
    ),
    "deployment": Page(
        "Folders for the hub, cards, reports",
        "[Deploying](../deploy.md), and [what a run writes](../result.md).",
        (
            "compressor.export.hub:save_pretrained",
            "compressor.export.hub:from_pretrained",
            "compressor.export.hub:push_to_hub",
            "compressor.export.onnx:export_onnx",
            "compressor.report.card:write_card",
            "compressor.report.html:write_report",
        ),
    ),
    "quantization": Page(
        "Quantize",
        "Without the engine: [the guide](../quantization.md).",
        ("quantize", "Quantized"),
    ),
    "training": Page(
        "Trainer, events, algorithms",
        "[The guide](../training.md); each algorithm has [a page](../algorithms.md).",
        (
            "Trainer",
            "TaskModel",
            "ClassifierTask",
            "Evaluator",
            "Event",
            "EventEngine",
            "State",
            "Algorithm",
            "Callback",
            "compressor.training:Window",
            "compressor.training.recipes:finetune_compressed",
            "compressor.training.recipes:distill",
        ),
    ),
    "extending": Page(
        "Techniques and targets",
        "What you subclass to add one: [the guide](../guides/extending.md).",
        (
            "compressor.techniques:Technique",
            "compressor.techniques:TechniqueContext",
            "compressor.techniques:Stage",
            "compressor.techniques:apply_plan",
            "compressor.targets:Target",
            "compressor.targets:Deployed",
            "compressor.errors:CompressorError",
        ),
    ),
    "functional": Page(
        "Functions of the training methods",
        "`from compressor import functional as cf`: the methods as plain functions, for a loop of "
        "your own. `import compressor.functional` loads torch.",
        tuple(f"compressor.functional:{name}" for name in functional.__all__),
    ),
}


def index_page() -> str:
    """Every public name, where it is described, and its first sentence."""
    lines = [
        "# API",
        "",
        "The names of `compressor`, and what they return and take. All of them are loaded when",
        "they are first used: `import compressor` does not import torch. Anything that is not here",
        "may change without notice. Made from the code by `python -m docs.generate`.",
        "",
        "| name | what it is |",
        "|---|---|",
    ]
    for file, page in REFERENCE.items():
        if file == "functional":
            continue
        for name in page.names:
            if ":" not in name:
                summary = _summary(_find(name))
                lines.append(f"| [`{name}`]({file}.md) | {summary} |")
    lines += [
        "",
        f"[{REFERENCE['functional'].title}](functional.md): `compressor.functional`.",
        "",
    ]
    return "\n".join(lines)


def reference_page(file: str) -> str:
    """One page: a line for each name, then a directive that the site replaces by all of it."""
    page = REFERENCE[file]
    lines = [f"# {page.title}", "", page.intro, "", "```python", *_imports(page.names), "```", ""]
    lines += ["| name | what it is |", "|---|---|"]
    for name in page.names:
        found = _find(name)
        lines.append(f"| `{found.__name__}` | {_summary(found)} |")
    lines += ["", IN_FULL, ""]
    for name in page.names:
        found = _find(name)
        lines += [f"{DOTTED}{found.__module__}.{found.__qualname__}", ""]
    return "\n".join(lines).rstrip() + "\n"


def _imports(names: Sequence[str]) -> list[str]:
    """The lines that a reader writes to have all of a page."""
    homes: dict[str, list[str]] = {}
    for name in names:
        module, _, attribute = name.rpartition(":")
        homes.setdefault(module or "compressor", []).append(attribute)
    if list(homes) == ["compressor.functional"]:
        return ["from compressor import functional as cf"]
    return [_wrapped(module, attributes) for module, attributes in sorted(homes.items())]


def _wrapped(module: str, attributes: Sequence[str]) -> str:
    line = f"from {module} import {', '.join(attributes)}"
    if len(line) <= WIDTH:
        return line
    return f"from {module} import (\n" + "".join(f"    {each},\n" for each in attributes) + ")"


def _find(name: str) -> Any:
    module, _, attribute = name.rpartition(":")
    return getattr(importlib.import_module(module) if module else compressor, attribute)


def _summary(item: object) -> str:
    first = (inspect.getdoc(item) or "").partition("\n\n")[0]
    return " ".join(first.split()).replace("|", "\\|")
