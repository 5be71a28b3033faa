"""`report.html`: one page that shows a result, with all it needs in the file itself."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup

from compressor.files import write_text
from compressor.report.charts import make_charts
from compressor.report.claims import claims
from compressor.report.data import View
from compressor.report.reading import finite, read_leniently
from compressor.report.tables import damage_tables, layer_table
from compressor.report.words import duration
from compressor.units import amount

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
    """The page as text; what `values` lack, or have no number for, is shown as unknown.

    Raises:
        StudyError: if a newer version of this package wrote `values`.
    """
    view = View(read_leniently(values))
    charts = make_charts(view)
    scripts = [_plotly(), (TEMPLATES / "report.js").read_text()]
    data: dict[str, Any] = {
        "charts": {key: {**vars(chart)} for key, chart in charts.items()},
        "variants": {variant.record.id: view.detail(variant) for variant in view.variants},
        "selected": _first_selected(view),
    }
    return _template().render(
        view=view,
        claims=list(claims(view.result)),
        damages=damage_tables(view.result),
        layers=layer_table(view.result),
        plan=data["variants"].get(data["selected"]),
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
    return Markup(json.dumps(finite(value), allow_nan=False).translate(UNSAFE))


@cache
def _template() -> Template:
    return Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    ).get_template("report.html.j2")


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
