"""A function by its name: `package.module:function` or `path/to/file.py:function`."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from compressor.errors import ConfigError, suggest

Factory = Callable[..., Any]
WAY = "Write package.module:function or path/to/file.py:function."


def absolute(named: str, folder: Path) -> str:
    """The same name, with the file's whole path if it names a file.

    Args:
        named: of the function.
        folder: that a file's path begins in.
    """
    place, colon, name = named.rpartition(":")
    is_file = place.endswith(".py")
    return f"{(folder / place).resolve()}{colon}{name}" if is_file else named


def find(named: str, folder: Path) -> Factory:
    """The function that `named` means; its module is imported.

    Args:
        named: with the file's whole path if it names a file.
        folder: where modules are looked for first.

    Raises:
        ConfigError: if there is no such module, file or function. What the module itself raises
            comes as it is.
    """
    place, colon, name = named.rpartition(":")
    if not (place and colon and name):
        raise ConfigError(f"{named!r} names no function. {WAY}")
    module = _import_file(Path(place)) if place.endswith(".py") else _import(place, folder)
    function = getattr(module, name, None)
    if function is None:
        known = [key for key, value in vars(module).items() if _is_candidate(value, module)]
        raise ConfigError(f"{place} has no function {name!r}. {suggest(name, known)}")
    if not callable(function):
        raise ConfigError(f"{named} is a {type(function).__name__}, not a function. {WAY}")
    found: Factory = function
    return found


def takes(function: Factory, name: str) -> bool:
    """Whether it has a parameter of that name."""
    return name in inspect.signature(function).parameters


def call(function: Factory, named: str, arguments: Mapping[str, Any]) -> Any:
    """What the function returns for these keywords.

    Raises:
        ConfigError: if it does not take them.
    """
    try:
        inspect.signature(function).bind(**arguments)
    except TypeError as error:
        raise ConfigError(
            f"{named} is called with {dict(arguments)}, and does not take that: {error}. Write its "
            "keywords under `arguments:` of the job, or as --set arguments.NAME=VALUE."
        ) from error
    return function(**arguments)


def _import(name: str, folder: Path) -> ModuleType:
    _look_in(folder)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise
        raise ConfigError(
            f"There is no module {error.name!r} in {folder} or among the installed packages. {WAY}"
        ) from error


def _import_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise ConfigError(f"There is no file {path}. {WAY}")
    _look_in(path.parent)  # as a script finds the modules beside it
    name = path.stem
    known = sys.modules.get(name)
    if known is not None and getattr(known, "__file__", None) != str(path):
        name = f"{name}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
        known = sys.modules.get(name)
    if known is not None:
        return known
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _look_in(folder: Path) -> None:
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


def _is_candidate(value: object, module: ModuleType) -> bool:
    return inspect.isfunction(value) and value.__module__ == module.__name__
