"""The page of the configuration: every option, from the dataclasses that read it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from types import NoneType, UnionType
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from compressor.config import (
    BudgetConfig,
    Config,
    ExecutorConfig,
    ExportConfig,
    TargetConfig,
    TrainerConfig,
)
from compressor.config.parts import CustomCompression, LayerCompression, QuantizationArgs
from compressor.config.trainer import FINE_TUNING_LR, INHERITED, DistillationConfig, EmaConfig
from compressor.interfaces.device import Device
from compressor.interfaces.optimizers import DEFAULT_LR, DEFAULT_OPTIMIZER, SchedulerConfig
from compressor.search.effort import FINAL_EPOCHS, TRIAL_EPOCHS
from docs.cards import described

HEAD = """# Options

Every option of the configuration, with its default and what it means. Made from the code by
`python -m docs.generate`.

The configuration is a mapping, a `Config`, or the path of a YAML file. All options may be left out;
where no default stands here, the section that the type leads to has them. `Config.from_dict` checks
a configuration without a model, and shows what it comes to:

```python
from compressor import Config
from compressor.errors import ConfigError

config = Config.from_dict({"delta": 1.0, "budget": {"minutes": 30}})
print(config.target, config.full_trainer)
try:
    Config.from_dict({"budget": {"minuets": 30}})
except ConfigError as error:
    print(error)  # Unknown key 'minuets' in budget. Did you mean 'minutes'? ...
```

In YAML it is the same, `None` being `null`:

```yaml
delta: 1.0
budget: {minutes: 30}
full_trainer:
  optimizer: {name: SGD, lr: 0.1}
  epochs: 50
```

What the words mean: [concepts](concepts.md). What the options make the search do:
[the search](search.md#how-far-it-goes).
"""

TRAINERS = f"""Both take the same options. What `fine_tuner` does not say of
{", ".join(f"`{name}`" for name in INHERITED)}
and of the optimizer it takes from `full_trainer`, the learning rate times {FINE_TUNING_LR:g}. The
other options it does not take: it has a schedule and epochs of its own.

Where `epochs` are left out, a trial has {TRIAL_EPOCHS} and a finalist {FINAL_EPOCHS}; with
`budget.minutes` both have as many as fit.

```python
config = Config.from_dict(
    {{
        "full_trainer": {{
            "optimizer": {{"name": "SGD", "lr": 0.1, "momentum": 0.9}},
            "scheduler": {{"name": "StepLR", "step_size": 10, "gamma": 0.1}},
            "epochs": 30,
            "gradient_clip_norm": 5.0,
        }},
        "fine_tuner": {{"epochs": 3}},
        "progress": False,  # no bars, also at a terminal
    }}
)
assert config.fine_tuner.gradient_clip_norm == 5.0
assert round(config.fine_tuner.optimizer["lr"], 6) == 0.01
assert config.fine_tuner.scheduler is None  # warm-up and cosine, as long as a trial is
```
"""

OPTIMIZER = f"""The name of a class of `torch.optim`, in any case, with its arguments; or an object
with a method `make(native_model)` that returns an optimizer. In `fine_tuner` `{{"lr": 0.01}}` alone
changes the rate of the full trainer's. Without any it is
`{dict(DEFAULT_OPTIMIZER)}` with a rate of {DEFAULT_LR:g}.
"""

SCHEDULER = """A class of `torch.optim.lr_scheduler` by its name, with its arguments; where it shall
not step after every epoch, write it as `factory` beside the `interval`. Left out, the rate warms up
linearly and falls as a cosine over however many epochs there are.

```python
schedulers = [
    {"name": "CosineAnnealingLR", "T_max": 30},
    {"factory": {"name": "LinearLR", "total_iters": 500}, "interval": "iteration"},
    {"name": "ReduceLROnPlateau", "mode": "max", "patience": 3},  # steps with the metric
]
for scheduler in schedulers:
    config = Config.from_dict({"full_trainer": {"scheduler": scheduler, "epochs": 30}})
    print(config.full_trainer.scheduler)
```

An object with a method `make(native_optimizer)` that returns a scheduler will do as well.
"""

FIXED = """```python
config = Config.from_dict(
    {
        "custom_compression": {
            "quantization_args": {"skip_layers": [0]},
            "layers": {"head": {"precision": 8}},
        }
    }
)
```
"""

ENDING = """## Other spellings

What scripts for the older engine say is understood, [key by key](migrating.md). Common ones, which
some of these pages use:
"""

# Older spellings, beside the same in ours. A test reads both.
SPELLINGS: tuple[tuple[dict[str, Any], dict[str, Any]], ...] = (
    ({"full_trainer": {"eval_key": "top1"}}, {"eval_key": "top1"}),
    ({"full_trainer": {"eval_split": "val"}}, {"eval_split": "val"}),
    ({"fine_tuner": {"loop_params": {"epochs": 3}}}, {"fine_tuner": {"epochs": 3}}),
    ({"export": {"format": "onnx"}}, {"export": {"formats": ["onnx"]}}),
    ({"export": "jit"}, {"export": {"formats": ["torchscript"]}}),
    ({"export": {"kwargs": {"precision": "fp16"}}}, {"export": {"precision": "fp16"}}),
    ({"onnx_precision": "fp16"}, {"export": {"precision": "fp16"}}),
    ({"horovod": True}, {"use_horovod": True}),
    ({"target": "eager"}, {"target": {"runtime": "eager"}}),
)


class Part(NamedTuple):
    """A section of the page: the options of one dataclass."""

    heading: str
    cls: type
    text: str = ""  # above the table
    depth: int = 2  # of the heading


PARTS = (
    Part("The run", Config),
    Part("full_trainer and fine_tuner", TrainerConfig, TRAINERS),
    Part("scheduler", SchedulerConfig, SCHEDULER, 3),
    Part("ema", EmaConfig, depth=3),
    Part("distillation", DistillationConfig, depth=3),
    Part("target", TargetConfig),
    Part("budget", BudgetConfig),
    Part("export", ExportConfig),
    Part("executor", ExecutorConfig, 'Its `kind` alone will do: `"executor": "ray"`.\n'),
    Part("custom_compression", CustomCompression, FIXED),
    Part("quantization_args", QuantizationArgs, depth=3),
    Part("layers", LayerCompression, depth=3),
)
SECTIONS = {part.cls: part.heading.replace(" ", "-") for part in PARTS}

WORDS: Mapping[Any, str] = {
    bool: "`True`, `False`",
    int: "whole number",
    float: "number",
    str: "text",
    Device: '`"CPU"`, `"GPU"`',
}
# Where what is written is not what is kept.
WRITTEN = {
    (Config, "external_training_loop"): "`ExternalTrainingLoop`, `None`",
    (Config, "executor"): '`"inline"`, `"ray"`, [mapping](#executor)',
    (Config, "target"): "name of a runtime, [mapping](#target)",
    (TrainerConfig, "optimizer"): "name, [mapping](#optimizer), factory, `None`",
    (TrainerConfig, "scheduler"): "name, [mapping](#scheduler), factory, `None`",
    (TrainerConfig, "ema"): "`True`, `False`, [mapping](#ema)",
    (TrainerConfig, "distillation"): "`True`, `False`, [mapping](#distillation)",
    (SchedulerConfig, "factory"): "name, mapping, factory",
}
DEFAULTS = {
    (Config, "device"): "GPU where there is one",
    (TrainerConfig, "ema"): "`False`",
    (TrainerConfig, "distillation"): "`True`",
}


def options_page() -> str:
    """A table for each part of the configuration."""
    lines = [HEAD]
    for part in PARTS:
        lines += [
            f"{'#' * part.depth} {part.heading}",
            "",
            " ".join(described(part.cls).text.split()),
            "",
        ]
        lines += [part.text] if part.text else []
        lines += ["| option | type | default | what it means |", "|---|---|---|---|"]
        lines += [*_rows(part.cls), ""]
        if part.cls is TrainerConfig:
            lines += ["### optimizer", "", OPTIMIZER]
    return "\n".join([*lines, ENDING, *_spellings()]) + "\n"


def _rows(cls: type) -> Iterator[str]:
    meanings = described(cls, "Attributes").arguments
    hints = get_type_hints(cls)
    for item in dataclasses.fields(cls):
        kind = WRITTEN.get((cls, item.name)) or written(hints[item.name])
        default = DEFAULTS.get((cls, item.name)) or _default(item)
        cells = (f"`{item.name}`", kind, default, meanings[item.name])
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def written(hint: Any) -> str:
    """How a value of this type is written.

    >>> written(float | None), written(tuple[int, ...])
    ('number, `None`', 'list of whole numbers')
    >>> written(Literal["max", "min"])
    '`"max"`, `"min"`'
    """
    origin, options = get_origin(hint), get_args(hint)
    if origin is Literal:
        return ", ".join(f'`"{word}"`' for word in options)
    if origin in (Union, UnionType):
        words = [written(option) for option in options if option is not NoneType]
        return ", ".join([*words, *["`None`"] * (NoneType in options)])
    if origin is tuple and options[-1] is Ellipsis:
        return f"list of {_several(options[0])}"
    if origin is tuple:
        return f"({', '.join(map(written, options))})"
    if origin is not None:
        return f"mapping of names to {_several(options[1])}"
    return WORDS.get(hint) or f"[mapping](#{SECTIONS[hint]})"


def _several(hint: Any) -> str:
    return f"{written(hint)}s" if hint in (int, float, str) else written(hint)


def _default(item: dataclasses.Field[Any]) -> str:
    """As it is written; "" where it has a section of its own, or there is none."""
    value = item.default
    if item.default_factory is not dataclasses.MISSING:
        value = item.default_factory()
    if value is dataclasses.MISSING or dataclasses.is_dataclass(value):
        return ""
    return f"`{list(value) if isinstance(value, tuple) else value!r}`".replace("'", '"')


def _spellings() -> Iterator[str]:
    yield from ("| also understood | for |", "|---|---|")
    for theirs, ours in SPELLINGS:
        yield f"| `{theirs}` | `{ours}` |".replace("'", '"')
