from __future__ import annotations

import math
from pathlib import Path

import pytest

from compressor.errors import MissingDependencyError
from compressor.optional import require


def test_an_installed_module_is_returned() -> None:
    assert require("math", extra="x") is math


@pytest.mark.parametrize("module", ["no_such_library", "no_such_library.part"])
def test_a_missing_library_comes_with_the_line_that_installs_it(module: str) -> None:
    with pytest.raises(MissingDependencyError, match=r'pip install "compressor\[tensorboard\]"'):
        require(module, extra="tensorboard")


def test_a_broken_library_is_not_called_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_library.py").write_text("import what_it_needs")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="what_it_needs") as caught:
        require("broken_library", extra="x")
    assert not isinstance(caught.value, MissingDependencyError)
