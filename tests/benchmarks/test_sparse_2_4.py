from __future__ import annotations

import sys
from pathlib import Path

import pytest

from benchmarks import sparse_2_4


def test_without_sparse_kernels_nothing_is_claimed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(sparse_2_4, "has_sparse_kernels", lambda: False)
    monkeypatch.setattr(sys, "argv", [sparse_2_4.__file__, "--json", str(tmp_path / "r.json")])
    sparse_2_4.main()
    assert capsys.readouterr().out == f"{sparse_2_4.NO_CUDA}\n"
    assert not list(tmp_path.iterdir())
