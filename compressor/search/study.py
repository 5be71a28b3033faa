"""The study: what is known of every variant of a run, in SQLite, so that a second start goes on.

One table of variants and one of named values. Every write is a transaction; a process that is
killed leaves what it had committed.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from types import TracebackType
from typing import Any

from compressor.errors import StudyError
from compressor.result import VariantRecord

TABLES = """
CREATE TABLE IF NOT EXISTS variants (id TEXT PRIMARY KEY, position INTEGER, record TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS facts (key TEXT PRIMARY KEY, value TEXT NOT NULL);
"""


class Study:
    """The record of one run directory.

    Attributes:
        path: of the file.
    """

    def __init__(self, path: Path) -> None:
        """Open or create the file.

        Raises:
            StudyError: if it cannot be written, or is not a study.
        """
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.path = path
            self._connection = sqlite3.connect(path, isolation_level=None)
            self._connection.executescript(TABLES)
        except (OSError, sqlite3.Error) as error:
            raise StudyError(
                f"The study {path} cannot be opened: {error}. Check that the folder is writable "
                "and has space, or choose another run_dir."
            ) from error

    def __enter__(self) -> Study:
        """The study itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the file."""
        self.close()

    def close(self) -> None:
        """Close the file; the study is unusable afterwards."""
        self._connection.close()

    def tell(self, record: VariantRecord) -> None:
        """Keep `record`, in place of an earlier one of the same id."""
        self._execute(
            "INSERT INTO variants VALUES (?, (SELECT COUNT(*) FROM variants), ?) "
            "ON CONFLICT(id) DO UPDATE SET record = excluded.record",
            (record.id, json.dumps(record.to_json())),
        )

    def find(self, variant_id: str) -> VariantRecord | None:
        """The record of that id, if there is one."""
        rows = self._execute("SELECT record FROM variants WHERE id = ?", (variant_id,))
        return VariantRecord.from_json(json.loads(rows[0][0])) if rows else None

    def variants(self) -> list[VariantRecord]:
        """All records, oldest first."""
        rows = self._execute("SELECT record FROM variants ORDER BY position", ())
        return [VariantRecord.from_json(json.loads(record)) for (record,) in rows]

    def set_fact(self, key: str, value: Any) -> None:
        """Keep a JSON value under a name."""
        self._execute("INSERT OR REPLACE INTO facts VALUES (?, ?)", (key, json.dumps(value)))

    def fact(self, key: str, default: Any = None) -> Any:
        """The value under that name."""
        rows = self._execute("SELECT value FROM facts WHERE key = ?", (key,))
        return json.loads(rows[0][0]) if rows else default

    def _execute(self, statement: str, values: Sequence[Any]) -> list[Any]:
        try:
            with closing(self._connection.execute(statement, values)) as cursor:
                return cursor.fetchall()
        except sqlite3.Error as error:
            raise StudyError(
                f"The study could not be written or read: {error}. What was saved before is "
                "intact; free space and start again with the same run_dir to go on."
            ) from error
