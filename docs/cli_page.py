"""The page of the command line, from the program itself."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from typer.models import ArgumentInfo

from compressor.cli.endings import CODES
from compressor.cli.main import app

HEAD = """# Command line

Made from the program by `python -m docs.generate`. `compressor --help` and
`compressor COMMAND --help` say the same; `compressor --install-completion` completes commands and
options in your shell.

![A run on the console](images/console.svg)

The picture is of a real run (`python -m docs.console_picture`) on a machine that was busy with
other things, so its latencies are no figures to quote.

## A job

A job file says what is compressed, and how:

```yaml
factory: train.py:make_job     # or package.module:function
arguments: {width: 32}         # its keywords
config:                        # as `Config.from_yaml` reads it
  delta: 1.0
  optimization: latency
  budget: {minutes: 30}
```

The factory, here in `train.py` beside it, makes the model and the data:

```python
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def make_job(width):
    points = torch.randn(512, 16)  # here stand your data
    data = TensorDataset(points, (points.sum(dim=1) > 0).long())
    loader = DataLoader(data, batch_size=64)
    model = nn.Sequential(nn.Linear(16, width), nn.ReLU(), nn.Linear(width, 2))  # and your weights
    return {"model": model, "data": {"train": loader, "test": loader}}
```

It returns a mapping of what `Engine` takes: `model` and `data`, and where the defaults (of a
classifier) do not fit `forward_pass`, `eval_func`, `loss_function_cls` and `loss_function_kwargs`;
or an `Engine`. A `config` among them, a mapping or the path of a YAML file, lies under that of the
job file. A factory with a parameter `run_dir` is given the folder of the run.

Where the job file names another file, its path begins in the folder of the job file, and so does
that of a `config`; without a job file they begin where the command is typed. There begin `run_dir`
and `export.root_path` too.

```bash
compressor run job.yaml                                   # in runs/job, unless it names a run_dir
compressor run job.yaml --set budget.minutes=5 --dry-run  # every step on two batches
compressor run train.py:make_job --run-dir runs/small     # the factory alone
torchrun --nproc_per_node 2 -m compressor run job.yaml    # in two processes
compressor resume runs/job                                # go on after a crash or Ctrl-C
compressor compare runs/job runs/small                    # their certificates side by side
compressor export runs/job --format onnx --to deploy      # --format torchscript makes that file
```

`run` writes `job.json` into the folder: what `resume` reads, and what `export` makes missing files
by. A run that a script of yours started has none: start the script again with the same `run_dir`.

At a terminal one live view shows the phase, the variant that is made, the metric against its budget
and how long it should still take; log lines pass above it. Elsewhere the same comes as plain lines.
Both go to stderr, and with `--json` nothing but JSON goes to stdout.

## Exit codes
"""


def cli_page() -> str:
    """Jobs, exit codes, and every command with its options."""
    lines = [HEAD, "| code | when |", "|---|---|"]
    lines += [f"| {code} | {said} |" for code, said in CODES.items()]
    for command in app.registered_commands:
        assert command.callback is not None
        name = command.name or command.callback.__name__
        lines += ["", f"## compressor {name}", ""]
        lines += _paragraphs(inspect.getdoc(command.callback) or "")
        lines += ["| | what it means | default |", "|---|---|---|", *_rows(command.callback)]
    return "\n".join(lines) + "\n"


def _paragraphs(text: str) -> list[str]:
    return [line for part in text.split("\n\n") for line in (" ".join(part.split()), "")]


def _rows(command: Callable[..., Any]) -> Iterator[str]:
    hints = get_type_hints(command, include_extras=True)
    for name, parameter in inspect.signature(command).parameters.items():
        kind, info = get_args(hints[name])
        value = parameter.default
        is_told = not any(value is none for none in (None, False, inspect.Parameter.empty))
        shown = f"`{str(value).lower()}`" if is_told else ""
        yield f"| `{_name(name, kind, info)}` | {info.help} | {shown} |"


def _name(name: str, kind: Any, info: Any) -> str:
    """As it is written on the command line."""
    words = [word for hint in (kind, *get_args(kind)) for word in _words(hint)]
    choices = f" {'|'.join(words)}".replace("|", r"\|") if words else ""
    if isinstance(info, ArgumentInfo):
        return info.metavar or choices.strip()
    # Of what is written in `Annotated`, typer takes the first name for a default until it is used.
    given = [each for each in (info.default, *(info.param_decls or ())) if isinstance(each, str)]
    long = name.replace("_", "-")
    options = "`, `".join(given or [f"--{long}"])
    if kind is bool:
        return options if given else f"{options}` or `--no-{long}"
    return f"{options}{choices or f' {info.metavar or _metavar(kind)}'}"


def _words(hint: Any) -> tuple[str, ...]:
    return get_args(hint) if get_origin(hint) is Literal else ()


def _metavar(kind: Any) -> str:
    """What stands for the value."""
    kinds = {kind, *get_args(kind)}
    return "N" if int in kinds else "PATH" if Path in kinds else "TEXT"
