"""`result.json` read for people: what it lacks, or has no number for, becomes "unknown".

A finished run is gone on with by `Result.from_json`, which refuses what is not whole. A page is
looked at: it had better show what there is.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields
from typing import Any

from compressor.evidence import Frozen, LayerBill, LayerRow
from compressor.result import (
    SCHEMA_VERSION,
    Agreement,
    Certificate,
    Choice,
    Cost,
    Interval,
    Parity,
    Result,
    VariantRecord,
)

Values = dict[str, Any]
# By how the type of a field begins: what its values are, and what stands for one that is unknown.
KINDS: Mapping[str, tuple[type | tuple[type, ...], Any]] = {
    "float": ((int, float), math.nan),
    "int": ((int, float), math.nan),
    "str": (str, ""),
    "bool": (bool, False),
    "Mapping": (Mapping, {}),
    "tuple": ((list, tuple), ()),
}


def read_leniently(values: Mapping[str, Any]) -> Result:
    """The result, as far as it can be made out.

    Raises:
        StudyError: if a newer version of this package wrote it.
    """
    version = values.get("schema_version")
    certificate = _mapping(values.get("certificate"))
    variants = _variants(values.get("variants"))
    ids = {each["id"] for each in variants}
    return Result.from_json(
        {
            **values,
            "schema_version": version if isinstance(version, int) else SCHEMA_VERSION,
            "certificate": {
                **_filled(Certificate, certificate),
                "parity": _whole(Parity, certificate.get("parity")),
                "interval": _whole(Interval, certificate.get("interval")),
                "agreement": _whole(Agreement, certificate.get("agreement")),
                "notes": _texts(certificate.get("notes")),
            },
            "variants": variants,
            "frontier": [each for each in _texts(values.get("frontier")) if each in ids],
            "artifacts": {k: str(v) for k, v in _mapping(values.get("artifacts")).items()},
            "plan": _plan(values.get("plan")),
            "lost": _texts(values.get("lost")),
            "info": _info(values.get("info")),
            "reason": _text(values.get("reason")),
            "decisions": _texts(values.get("decisions")),
            "damages": [
                _sensed(each) for each in _mappings(values.get("damages")) if "damage" in each
            ],
            "layers": [_layer(each) for each in _mappings(values.get("layers"))],
            "frozen": [_filled(Frozen, each) for each in _mappings(values.get("frozen"))],
            "chosen": _text(values.get("chosen")),
        }
    )


def finite(value: Any) -> Any:
    """JSON in which what is no finite number is null, and every key a string."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return value


def _variants(values: Any) -> list[Values]:
    found: list[Values] = []
    for each in _mappings(values):
        earlier = {other["id"] for other in found}
        variant = _filled(VariantRecord, each)
        if variant["id"] in ("", *earlier):
            variant["id"] = f"unnamed{len(found) + 1}"
        points = (_numbers(point) for point in _mappings(each.get("curve")))
        cost = each.get("cost")
        found.append(
            {
                **variant,
                "plan": _plan(each.get("plan")),
                "metrics": _numbers(each.get("metrics")),
                "predicted": _numbers(each.get("predicted")),
                "cost": _filled(Cost, cost) if isinstance(cost, Mapping) else None,
                "curve": [point for point in points if "epoch" in point],
                "start": variant["start"] if variant["start"] in earlier else "",  # no circle
            }
        )
    return found


def _plan(values: Any) -> list[Values]:
    choices = (_filled(Choice, each) for each in _mappings(values))
    return [
        {**each, "setting": finite(each["setting"]), "modules": _texts(each["modules"])}
        for each in choices
    ]


def _sensed(values: Mapping[str, Any]) -> Values:
    damage = _numbers(values).get("damage")
    texts = {name: _text(values.get(name)) for name in ("technique", "site", "label")}
    return {**texts, "damage": damage, "saved": _numbers(values.get("saved"))}


def _layer(values: Mapping[str, Any]) -> Values:
    bills = {
        name: _filled(LayerBill, _mapping(values.get(name))) for name in ("reference", "compressed")
    }
    return {**_filled(LayerRow, values), **bills}


def _info(values: Any) -> Values:
    info = dict(_mapping(values))
    numbers = _numbers(info)
    for name in ("seconds", "eta_seconds"):
        info.pop(name, None)
    return {
        **info,
        **{name: numbers[name] for name in ("seconds", "eta_seconds") if name in numbers},
        "phases": _numbers(info.get("phases")),
        **{name: _mapping(info.get(name)) for name in ("config", "machine", "versions")},
    }


def _filled(cls: type, values: Mapping[str, Any]) -> Values:
    """Every field of a dataclass: as it is, or its default, or what stands for unknown."""
    filled: Values = {}
    for field in fields(cls):
        value = values.get(field.name)
        kind = next((k for k in KINDS if str(field.type).startswith(k)), "")
        fits = isinstance(value, KINDS[kind][0]) if kind else value is not None
        is_optional = value is None and str(field.type).endswith("| None")
        if fits or is_optional:
            filled[field.name] = value
        elif field.default is not MISSING:
            filled[field.name] = field.default
        else:
            filled[field.name] = KINDS[kind][1] if kind else None
    return filled


def _whole(cls: type, values: Any) -> Values | None:
    """None where a figure is missing: half a claim is none."""
    known = _numbers(values)
    names = {field.name for field in fields(cls)}
    return {name: known[name] for name in names} if names <= known.keys() else None


def _numbers(values: Any) -> dict[str, float]:
    return {
        str(name): value
        for name, value in _mapping(values).items()
        if isinstance(value, (int, float)) and math.isfinite(value)
    }


def _mapping(values: Any) -> Mapping[str, Any]:
    return values if isinstance(values, Mapping) else {}


def _mappings(values: Any) -> Iterable[Mapping[str, Any]]:
    items = values if isinstance(values, (list, tuple)) else ()
    return [each for each in items if isinstance(each, Mapping)]


def _texts(values: Any) -> list[str]:
    items = values if isinstance(values, (list, tuple)) else ()
    return [each for each in items if isinstance(each, str)]


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""
