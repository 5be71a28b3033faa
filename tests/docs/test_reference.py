"""The pages of the reference say what each name is, also where nothing fills them."""

from __future__ import annotations

import re

import pytest

from docs.reference import REFERENCE
from tests.docs.pages import FOLDER

ROW = re.compile(r"^\| `(\w+)` \| (\S.+\S) \|$", re.MULTILINE)


@pytest.mark.parametrize("file", REFERENCE)
def test_a_page_of_the_reference_has_a_line_for_each_name(file: str) -> None:
    """In a checkout the pages held nothing but directives for the site."""
    names = [name.rpartition(":")[2] for name in REFERENCE[file].names]
    lines = ROW.findall((FOLDER / "api" / f"{file}.md").read_text())
    assert [name for name, _ in lines] == names
    assert not [name for name, line in lines if len(line.split()) < 3]
