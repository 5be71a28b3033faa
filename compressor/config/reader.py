"""A dataclass from a mapping: types taken from its annotations, unknown keys refused by name."""

from __future__ import annotations

import os
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from compressor.errors import ConfigError, suggest
from compressor.interfaces.device import Device

T = TypeVar("T")

WORDS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def read(cls: type[T], values: object, where: str = "") -> T:
    """A `cls` from a mapping; what argparse and YAML leave as text is converted.

    A key whose value is None counts as not given, unless None means something there. A field whose
    metadata has "read" is read by that function of (value, where).

    Args:
        cls: a dataclass.
        values: its fields, or a `cls`, which is returned.
        where: dotted path of `values` in the configuration, for messages; "" at the top.

    Raises:
        ConfigError: an unknown key, or a value that cannot be meant.
    """
    if isinstance(values, cls):
        return values
    given = as_mapping(values, where)
    hints = get_type_hints(cls)
    known = {item.name: item for item in fields(cls)}  # type: ignore[arg-type]
    check_keys(given, known, where)
    arguments: dict[str, Any] = {}
    for key, value in given.items():
        path = f"{where}.{key}" if where else key
        hint = hints[key]
        if value is None and type(None) not in get_args(hint):
            continue
        reader: Callable[[Any, str], Any] | None = known[key].metadata.get("read")
        arguments[key] = reader(value, path) if reader else convert(value, hint, path)
    return cls(**arguments)


def as_mapping(values: object, where: str) -> Mapping[str, Any]:
    """`values` if it is a mapping with text keys.

    Raises:
        ConfigError: if it is not.
    """
    if not isinstance(values, Mapping) or not all(isinstance(key, str) for key in values):
        raise ConfigError(
            f"{where or 'The configuration'} is {values!r}. Write a mapping of names to values."
        )
    return values


def check_keys(values: Mapping[str, Any], known: Mapping[str, Any], where: str) -> None:
    """Do nothing if all keys of `values` are known.

    Raises:
        ConfigError: naming the first unknown key and the nearest known one.
    """
    for key in values:
        if key not in known:
            place = f"in {where}" if where else "in the configuration"
            raise ConfigError(f"Unknown key {key!r} {place}. {suggest(key, known)}")


def convert(value: Any, hint: Any, where: str) -> Any:
    """`value` as the type `hint`.

    Raises:
        ConfigError: if it cannot be that.

    >>> convert("1e-3", float, "delta"), convert("2", int, "level"), convert("no", bool, "ema")
    (0.001, 2, False)
    """
    origin, options = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None:
            return None
        (inner,) = [option for option in options if option is not type(None)]
        return convert(value, inner, where)
    if origin is Literal:
        return _convert_literal(value, options, where)
    if origin is tuple:
        return _convert_tuple(value, options, where)
    if origin is Mapping:
        items = as_mapping(value, where).items()
        return {key: convert(item, options[1], f"{where}.{key}") for key, item in items}
    if is_dataclass(hint) and isinstance(hint, type):
        return read(hint, value, where)
    if hint in SCALARS:
        return SCALARS[hint](value, where)
    return value


def _convert_literal(value: Any, options: Sequence[str], where: str) -> str:
    word = str(value).strip().lower()
    if word not in options:
        raise ConfigError(f"{where}={value!r} is unknown. {suggest(word, options)}")
    return word


def _convert_tuple(value: Any, options: tuple[Any, ...], where: str) -> tuple[Any, ...]:
    if isinstance(value, str):
        value = [item.strip() for item in value.split(",")]
    if not isinstance(value, Sequence):
        value = [value]
    if options[-1] is Ellipsis:
        return tuple(convert(item, options[0], where) for item in value)
    if len(value) != len(options):
        raise ConfigError(
            f"{where}={value!r} has {len(value)} values. Write {len(options)} of them."
        )
    return tuple(convert(item, kind, where) for item, kind in zip(value, options, strict=True))


def _convert_bool(value: Any, where: str) -> bool:
    word = str(value).strip().lower()
    if word not in WORDS:
        raise ConfigError(f"{where}={value!r} is not a truth value. Write True or False.")
    return WORDS[word]


def _convert_int(value: Any, where: str) -> int:
    number = _convert_float(value, where)
    if not number.is_integer():
        raise ConfigError(f"{where}={value!r} is not a whole number. Write one, without a unit.")
    return int(value) if isinstance(value, int) else int(number)


def _convert_float(value: Any, where: str) -> float:
    try:
        if isinstance(value, bool):
            raise TypeError
        return float(value)
    except (TypeError, ValueError):
        raise ConfigError(
            f"{where}={value!r} is not a number. Write one, without a unit."
        ) from None


def _convert_str(value: Any, where: str) -> str:
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if not isinstance(value, str):
        raise ConfigError(f"{where}={value!r} is a {type(value).__name__}. Write text.")
    return value


SCALARS: Mapping[Any, Callable[[Any, str], Any]] = {
    bool: _convert_bool,
    int: _convert_int,
    float: _convert_float,
    str: _convert_str,
    Device: lambda value, where: Device.of(value),
}
