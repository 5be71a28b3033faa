"""The page of the options has every option, with the default and the values that are taken."""

from __future__ import annotations

import ast
import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from compressor import Config
from docs.options_page import PARTS, SPELLINGS
from tests.docs.pages import FOLDER

ROW = re.compile(r"^\| `(\w+)` \| (.*?) \| (.*?) \| (.+) \|$", re.MULTILINE)
WORD = re.compile(r'`"(\w+)"`')
# Where the parts of the page stand in a configuration.
PLACES: Mapping[str, tuple[tuple[str, ...], ...]] = {
    "The run": ((),),
    "full_trainer and fine_tuner": (("full_trainer",), ("fine_tuner",)),
    "ema": (("full_trainer", "ema"),),
    "distillation": (("full_trainer", "distillation"),),
    "target": (("target",),),
    "budget": (("budget",),),
    "export": (("export",),),
    "executor": (("executor",),),
    "quantization_args": (("custom_compression", "quantization_args"),),
}
# What asks for a part without an option of it, where leaving it out does not.
LEFT_OUT: Mapping[str, Mapping[str, Any]] = {
    "ema": {"full_trainer": {"ema": True}},
    "quantization_args": {"custom_compression": {"quantization_args": {}}},
}
# These name a value that contradicts what stands beside it by default.
NEEDS = {
    ("precision", "fp16"): {"device": "GPU"},
    ("device", "cuda"): {"runtime": "eager"},
}


def test_every_option_of_the_configuration_is_on_the_page() -> None:
    for cls in _parts_of(Config()):
        (heading,) = [part.heading for part in PARTS if part.cls is cls]
        assert [row[0] for row in rows(heading)] == [item.name for item in dataclasses.fields(cls)]


@pytest.mark.parametrize("heading", PLACES)
def test_the_defaults_on_the_page_are_those_of_what_is_left_out(heading: str) -> None:
    written: dict[str, Any] = {}
    given = 0
    for place in PLACES[heading]:
        for name, _, default, _ in rows(heading):
            if default.startswith("`"):
                given += 1
                _put(written, (*place, name), ast.literal_eval(default.strip("`")))
    assert given >= 2
    assert Config.from_dict(written) == Config.from_dict(LEFT_OUT.get(heading, {}))


@pytest.mark.parametrize("heading", PLACES)
def test_the_words_on_the_page_are_taken(heading: str) -> None:
    for place in PLACES[heading]:
        for name, kind, _, _ in rows(heading):
            for word in WORD.findall(kind):
                config: dict[str, Any] = {}
                needed = NEEDS.get((name, word), {}) if heading in ("The run", "target") else {}
                for option, value in {**needed, name: word}.items():
                    _put(config, (*place, option), value)
                Config.from_dict(config)


@pytest.mark.parametrize(("theirs", "ours"), SPELLINGS, ids=str)
def test_another_spelling_means_the_same(theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    assert Config.from_dict(theirs) == Config.from_dict(ours) != Config.from_dict({})


def rows(heading: str) -> list[tuple[str, ...]]:
    """Name, type, default and meaning of the options of a section."""
    page = (FOLDER / "options.md").read_text()
    section = re.split(rf"^#+ {re.escape(heading)}$", page, flags=re.MULTILINE)[1]
    return ROW.findall(re.split(r"^##", section, flags=re.MULTILINE)[0])


def _parts_of(value: object) -> Iterator[type]:
    """The dataclass of `value`, and those of what is in it."""
    if dataclasses.is_dataclass(value):
        yield type(value)
        for item in dataclasses.fields(value):
            yield from _parts_of(getattr(value, item.name))


def _put(config: dict[str, Any], place: tuple[str, ...], value: Any) -> None:
    *outer, name = place
    for each in outer:
        config = config.setdefault(each, {})
    config[name] = value
