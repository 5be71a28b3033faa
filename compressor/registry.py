"""Classes by the name that users write."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Generic, TypeVar

from compressor.errors import ConfigError, suggest

T = TypeVar("T")
C = TypeVar("C")


class Registry(Generic[T]):
    """The classes of one kind, each under its class attribute `name`.

    `T` is the type of the classes: `Registry[type[Technique]]`.

    Args:
        kind: what a message calls one of them: "technique".

    >>> animals: Registry[type] = Registry("animal")
    >>> @animals.register
    ... class Cat:
    ...     name = "cat"
    >>> animals.names()
    ('cat',)
    >>> animals.get("cta")
    Traceback (most recent call last):
    compressor.errors.ConfigError: There is no animal 'cta'. Did you mean 'cat'? Known: cat.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._classes: dict[str, T] = {}

    def register(self, cls: C) -> C:
        """Add `cls` under its `name`; for use as a decorator. A reloaded module replaces its own.

        Raises:
            ConfigError: if another class has the name.
        """
        name: str = cls.name  # type: ignore[attr-defined]
        other = self._classes.get(name)
        if other is not None and _path(other) != _path(cls):
            raise ConfigError(
                f"The {self.kind} {name!r} is already {_path(other)}. "
                f"Give {_path(cls)} another name."
            )
        self._classes[name] = cls  # type: ignore[assignment]
        return cls

    def get(self, name: str) -> T:
        """The class called `name`.

        Raises:
            ConfigError: if there is none; the message has the nearest name and all of them.
        """
        if name not in self._classes:
            raise ConfigError(f"There is no {self.kind} {name!r}. {suggest(name, self._classes)}")
        return self._classes[name]

    def names(self) -> tuple[str, ...]:
        """All names, in the order of registration."""
        return tuple(self._classes)

    def __iter__(self) -> Iterator[T]:
        return iter(self._classes.values())

    def __len__(self) -> int:
        return len(self._classes)

    def __contains__(self, name: object) -> bool:
        return name in self._classes


def _path(cls: object) -> str:
    return f"{cls.__module__}.{getattr(cls, '__qualname__', cls)}"
