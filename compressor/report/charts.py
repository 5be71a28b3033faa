"""Charts of the variants: metric against cost, predicted against measured, training."""

from __future__ import annotations

import math
from collections.abc import Sequence

from compressor.report.data import FAILED, OUTSIDE, WITHIN, Point, Variant, View
from compressor.report.figures import (
    Chart,
    Json,
    cost_axis,
    make_figure,
    make_line,
    plain,
    points_of,
)
from compressor.report.model_charts import damage_chart, layer_chart
from compressor.report.words import metric_text, words_of
from compressor.units import amount, name_of

MARKS = {
    WITHIN: ("circle", "@good"),
    OUTSIDE: ("circle-open", "@muted"),
}
LINES = ("@accent", "@good", "@bad", "@warn", "@muted")


def make_charts(view: View) -> dict[str, Chart]:
    """Every chart for which the result has something, by its key."""
    charts = (
        frontier_chart(view),
        damage_chart(view),
        layer_chart(view),
        latency_chart(view),
        curve_chart(view),
    )
    return {chart.key: chart for chart in charts if chart.figures}


def frontier_chart(view: View) -> Chart:
    """The metric against each cost: the reference, all variants, and the limit."""
    figures, summaries = {}, {}
    for resource in ("latency_ms", "size_bytes", "macs"):
        done = [
            variant
            for variant in view.variants
            if variant.verdict != FAILED and math.isfinite(_cost(variant, resource))
        ]
        name = name_of(resource)
        figures[name] = _frontier(view, done, resource)
        summaries[name] = _frontier_summary(view, done, resource)
    return Chart("frontier", figures, summaries)


def latency_chart(view: View) -> Chart:
    """Predicted against measured latency."""
    pairs = [
        (variant, variant.record.predicted["latency_ms"], _cost(variant, "latency_ms"))
        for variant in view.variants
        if len(variant.record.plan) and "latency_ms" in variant.record.predicted
    ]
    pairs = [pair for pair in pairs if all(map(math.isfinite, pair[1:]))]
    if not pairs:
        return Chart("predictions", {}, {})
    values = [value for _, predicted, measured in pairs for value in (predicted, measured)]
    ends = [min(values) * 0.9, max(values) * 1.1]
    diagonal = make_line(ends, ends, "equal", "@muted", dash="dot", hover=False)
    points = {
        **points_of(
            [variant for variant, _, _ in pairs],
            [predicted for _, predicted, _ in pairs],
            [measured for _, _, measured in pairs],
            [
                f"{variant.name}<br>predicted {amount('latency_ms', predicted)}<br>"
                f"measured {amount('latency_ms', measured)}"
                for variant, predicted, measured in pairs
            ],
        ),
        "name": "variants",
        "marker": {"size": 11, "color": "@accent"},
    }
    axis = cost_axis("latency_ms", values)
    figure = make_figure(
        [diagonal, points],
        xaxis={**axis, "title": {"text": "predicted latency, ms"}},
        yaxis={**axis, "title": {"text": "measured latency, ms"}},
    )
    errors = view.result.latency_errors
    return Chart("predictions", {"latency": figure}, {"latency": f"Scatter plot. {errors}"})


def curve_chart(view: View) -> Chart:
    """Metric and loss over the epochs, of the finalists."""
    finalists = view.finalists()
    c = view.certificate
    figures, summaries = {}, {}
    for name, title in (("metric", c.metric_name), ("loss", "training loss")):
        lines = []
        for number, variant in enumerate(finalists):
            points = [p for p in variant.curve if _value(p, name) is not None]
            if points:
                xs, ys = [p.epoch for p in points], [_value(p, name) for p in points]
                line = make_line(
                    xs, ys, variant.name, LINES[number % len(LINES)], mode="lines+markers"
                )
                lines.append({**line, "customdata": [variant.record.id] * len(xs)})
        if not lines:
            continue
        figures[title] = make_figure(
            lines,
            xaxis={"title": {"text": "epochs of fine-tuning"}, "rangemode": "tozero"},
            yaxis={"title": {"text": plain(title)}},
            **(_limit_lines(view) if name == "metric" else {}),
            showlegend=True,
        )
        summaries[title] = (
            f"Lines of the {title} over the epochs, of {len(lines)} variants: "
            + ", ".join(variant.name for variant in finalists)
            + "."
        )
    return Chart("curves", figures, summaries)


def _frontier(view: View, done: Sequence[Variant], resource: str) -> Json:
    c = view.certificate
    before = getattr(c, f"reference_{resource}")
    star: Json = {
        "type": "scatter",
        "mode": "markers",
        "name": "reference",
        "x": [before],
        "y": [c.reference_metric],
        "hovertext": [
            f"reference<br>{plain(c.metric_name)} {metric_text(c.reference_metric, c.delta)}<br>"
            f"{amount(resource, before)}"
        ],
        "hoverinfo": "text",
        "marker": {"symbol": "star", "size": 15, "color": "@accent"},
    }
    best = undominated(done, resource)
    costs = [_cost(variant, resource) for variant in best]
    metrics = [view.metric_of(variant) for variant in best]
    traces = [
        make_line(costs, metrics, "frontier", "@good", hover=False),
        star,
    ]
    for verdict, (symbol, color) in MARKS.items():
        mine = [variant for variant in done if variant.verdict == verdict]
        traces.append(
            {
                **points_of(
                    mine,
                    [_cost(variant, resource) for variant in mine],
                    [view.metric_of(variant) for variant in mine],
                    [_hover(view, variant) for variant in mine],
                ),
                "name": f"{verdict} delta",
                "marker": {"symbol": symbol, "size": 12, "color": color, "line": {"width": 2}},
            }
        )
    traces.append(
        {
            **points_of([], [], [], []),
            "name": "selected",
            "hoverinfo": "skip",
            "showlegend": False,
            "marker": {
                "symbol": "circle-open",
                "size": 22,
                "color": "@text",
                "line": {"width": 2},
            },
        }
    )
    every = [before, *(_cost(variant, resource) for variant in done)]
    return make_figure(
        traces,
        xaxis=cost_axis(resource, [value for value in every if math.isfinite(value)]),
        yaxis={"title": {"text": plain(c.metric_name)}},
        **_limit_lines(view, names_reference=False),
        showlegend=True,
    )


def undominated(variants: Sequence[Variant], resource: str) -> list[Variant]:
    """Those that no other beats in this one cost and the metric, cheapest first."""
    kept: list[Variant] = []
    for variant in sorted(variants, key=lambda v: (_cost(v, resource), _drop(v))):
        if not kept or _drop(variant) < _drop(kept[-1]):
            kept.append(variant)
    return kept


def _frontier_summary(view: View, done: Sequence[Variant], resource: str) -> str:
    c = view.certificate
    within = [variant for variant in done if variant.verdict == WITHIN]
    text = (
        f"Scatter plot of {len(done)} variants, {c.metric_name} against {name_of(resource)}. "
        f"The reference has {metric_text(c.reference_metric, c.delta)} at "
        f"{amount(resource, getattr(c, f'reference_{resource}'))}."
    )
    if not within:
        return f"{text} None is within delta."
    least = min(within, key=lambda variant: _cost(variant, resource))
    return (
        f"{text} Of {len(within)} within delta the least has "
        f"{amount(resource, _cost(least, resource))}. All are in the table below."
    )


def _hover(view: View, variant: Variant) -> str:
    c, record = view.certificate, variant.record
    lines = [
        f"<b>{variant.name}</b> ({plain(record.id)}), {view.verdict_of(variant)}",
        f"{plain(c.metric_name)} {view.text_of(view.metric_of(variant))}",
        *(
            f"{name_of(name)} {view.cost_text(name, _cost(variant, name))}"
            for name in ("latency_ms", "size_bytes", "macs")
        ),
        plain(words_of(record.plan.describe())),
    ]
    return "<br>".join(lines)


def _limit_lines(view: View, *, names_reference: bool = True) -> Json:
    """The reference's metric, and the least that is within delta."""
    c = view.certificate
    limit = c.reference_metric - (c.delta if view.is_larger_better else -c.delta)
    anchors = ("bottom", "top") if view.is_larger_better else ("top", "bottom")
    lines = (
        (c.reference_metric, "reference", anchors[0]),
        (limit, "limit of delta", anchors[1]),
    )
    return {
        "shapes": [
            {
                "type": "line",
                "xref": "paper",
                "x0": 0,
                "x1": 1,
                "y0": value,
                "y1": value,
                "line": {"color": "@muted", "width": 1.5, "dash": "dash"},
            }
            for value, _, _ in lines
        ],
        "annotations": [
            {
                "xref": "paper",
                "x": 1,
                "y": value,
                "text": text,
                "showarrow": False,
                "xanchor": "right",
                "yanchor": anchor,
                "font": {"color": "@muted", "size": 12},
            }
            for value, text, anchor in lines[0 if names_reference else 1 :]
        ],
    }


def _cost(variant: Variant, resource: str) -> float:
    """Not a number where it is not known."""
    cost = variant.record.cost
    return math.nan if cost is None else float(getattr(cost, resource))


def _drop(variant: Variant) -> float:
    return math.inf if variant.drop is None else variant.drop


def _value(point: Point, name: str) -> float | None:
    return point.metric if name == "metric" else point.loss
