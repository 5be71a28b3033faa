"""The study keeps what it was told."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from compressor.errors import StudyError
from compressor.result import Choice, Cost, Plan, VariantRecord
from compressor.search.study import Study

RECORD = VariantRecord(
    id="abc",
    plan=Plan((Choice("block_removal", "layer1.0", {"removed": True}),)),
    status="done",
    metrics={"accuracy": 91.0},
    cost=Cost(10, 100, 1000, 0.5),
    predicted={"cost": 1.0, "damage": 0.2},
    epochs=3,
)


def test_a_record_comes_back_equal_after_reopening(tmp_path: Path) -> None:
    with Study(tmp_path / "study.db") as study:
        study.tell(RECORD)
        study.set_fact("seconds", 1.5)
    with Study(tmp_path / "study.db") as study:
        assert study.find("abc") == RECORD
        assert study.fact("seconds") == 1.5
        assert study.find("other") is None
        assert study.fact("other", "default") == "default"


def test_records_keep_their_order_and_an_update_its_place(tmp_path: Path) -> None:
    with Study(tmp_path / "study.db") as study:
        for name in ("x", "y", "z"):
            study.tell(VariantRecord(name, Plan(), "done"))
        study.tell(VariantRecord("x", Plan(), "failed", reason="nan"))
        assert [(r.id, r.status) for r in study.variants()] == [
            ("x", "failed"),
            ("y", "done"),
            ("z", "done"),
        ]


def test_a_file_that_is_no_study_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "study.db"
    path.write_bytes(b"not a database, but long enough to be read as one" * 20)
    with pytest.raises(StudyError, match="cannot be opened"):
        Study(path)


def test_a_full_disk_is_a_study_error_and_loses_nothing(tmp_path: Path) -> None:
    path = tmp_path / "study.db"
    with Study(path) as study:
        study.tell(RECORD)
        pages = study._connection.execute("PRAGMA page_count").fetchone()[0]
        study._connection.execute(f"PRAGMA max_page_count = {pages}")
        with pytest.raises(StudyError, match="intact"):
            study.set_fact("large", "x" * 100_000)
    with sqlite3.connect(path) as connection:
        assert connection.execute("SELECT COUNT(*) FROM variants").fetchone() == (1,)
    connection.close()
