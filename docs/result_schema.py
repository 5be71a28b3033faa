"""The page on `result.json`, made from its schema."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import compressor.report

SCHEMA = Path(compressor.report.__file__).parent / "result.schema.json"
HEAD = """# result.json and report.html

Made from `compressor/report/result.schema.json` (JSON Schema, draft 2020-12) by
`python -m docs.generate`.

A run writes what it found to `run_dir/result.json`, and the same as a page to
`run_dir/report.html`. The page is one file without anything outside it: it opens by a double click,
without a network. It is made of `result.json` alone:

```python
import json
from pathlib import Path

from compressor.report.html import write_report


def rewrite(run_dir: Path) -> Path:
    values = json.loads((run_dir / "result.json").read_text())
    return write_report(values, run_dir / "report.html")
```

Hover a dot for its plan and figures, click it, or its row in the table, to see the plan in full.
The table sorts by its heads. Colours follow the system; the button at the top changes them.

![The report of the demo](images/report_desktop.png)

In dark colours, and on a phone:

![The same in dark colours](images/report_dark.png)

![The same on a phone](images/report_phone.png)

Further down: what each choice would cost, with dots on what was taken; every layer before and
after; and how the finalists were trained.

![The heat map of the damages](images/report_sensitivity.png)

![Layer by layer](images/report_layers.png)

![Training of the finalists](images/report_training.png)

The figures of the charts are in tables too, below each. Of a `result.json` that lacks something, or
has an odd value somewhere, the page shows the rest.

The pictures are of a run of `python -m docs.screenshots --trials 5`, while other programs ran: its
milliseconds are larger than those of a quiet machine, its ratios are those of one moment.
"""


def result_page() -> str:
    """A table for each kind of object in `result.json`."""
    schema = json.loads(SCHEMA.read_text())
    lines = [HEAD, *_section("The file", schema)]
    for name, part in schema["$defs"].items():
        lines += _section(name, part)
    return "\n".join(lines).rstrip() + "\n"


def _section(name: str, part: Mapping[str, Any]) -> Iterator[str]:
    yield from (f"## {name}", "", part["description"], "", "| key | type | what |", "|---|---|---|")
    required = part.get("required", ())
    for key, value in part["properties"].items():
        mark = "" if key in required else " (may be missing)"
        yield f"| `{key}` | {_type(value)} | {value['description']}{mark} |"
    yield ""


def _type(value: Mapping[str, Any]) -> str:
    if "$ref" in value:
        name = value["$ref"].rpartition("/")[2]
        return f"[{name}](#{name})"
    if "oneOf" in value:
        return " or ".join(map(_type, value["oneOf"]))
    if "enum" in value:
        return " or ".join(f'"{each}"' for each in value["enum"])
    if value.get("type") == "array":
        return f"list of {_type(value['items'])}"
    kinds = value["type"]
    return kinds if isinstance(kinds, str) else " or ".join(kinds)
