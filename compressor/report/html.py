"""`report.html`: one page that shows a result, with all it needs in the file itself."""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from compressor.files import write_text
from compressor.report.charts import make_charts
from compressor.report.data import View
from compressor.report.words import amount, duration
from compressor.result import Result

TEMPLATES = Path(__file__).parent / "templates"
# Inside a script element only these can end it, or begin a comment; JSON has them as escapes too.
UNSAFE = str.maketrans({"<": "\\u003c", ">": "\\u003e", "&": "\\u0026"})


def write_report(values: Mapping[str, Any], path: Path) -> Path:
    """Write the page to `path`.

    Args:
        values: what `result.json` holds; of this schema or an older one.
        path: of the page.

    Raises:
        StudyError: if a newer version of this package wrote `values`.
        OSError: if it cannot be written.
    """
    write_text(path, render_page(values))
    return path


def render_page(values: Mapping[str, Any]) -> str:
    """The page as text.

    Raises:
        StudyError: if a newer version of this package wrote `values`.
    """
    view = View(Result.from_json(values))
    charts = make_charts(view)
    scripts = [_plotly(), (TEMPLATES / "report.js").read_text()]
    template = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    ).get_template("report.html.j2")
    data = {
        "charts": {key: {**vars(chart)} for key, chart in charts.items()},
        "variants": {variant.record.id: view.detail(variant) for variant in view.variants},
        "selected": _first_selected(view),
    }
    return template.render(
        view=view,
        charts=charts,
        selected=data["selected"],
        data=inline_json(data),
        style=Markup((TEMPLATES / "report.css").read_text()),
        scripts=[Markup(script) for script in scripts],
        hashes=[_hash(script) for script in scripts],
        amount=amount,
        duration=duration,
        version=view.result.info.get("versions", {}).get("compressor", ""),
    )


def inline_json(value: Any) -> Markup:
    r"""JSON that may stand in a script element; what is no finite number is null.

    >>> print(inline_json({"</script>": float("nan")}))
    {"\u003c/script\u003e": null}
    """
    return Markup(json.dumps(_finite(value), allow_nan=False).translate(UNSAFE))


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


def _first_selected(view: View) -> str:
    """The variant whose plan is shown at first: the one that was taken, else the last."""
    ids = [variant.record.id for variant in view.variants]
    chosen = [variant.record.id for variant in view.variants if variant.is_chosen]
    return (chosen or ids[-1:] or [""])[0]


def _plotly() -> str:
    from plotly.offline import get_plotlyjs  # takes a moment, which `--help` need not wait for

    return str(get_plotlyjs())


def _hash(script: str) -> str:
    """By which the page's policy knows its own scripts: no other runs, whatever a name holds."""
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
