"""Files are whole or not there."""

from __future__ import annotations

from pathlib import Path

import pytest

from compressor.files import replace_file, write_bytes, write_text


def test_the_content_is_what_was_written(tmp_path: Path) -> None:
    write_bytes(tmp_path / "new" / "file", b"ab", memoryview(b"cd"))
    assert (tmp_path / "new" / "file").read_bytes() == b"abcd"
    write_text(tmp_path / "new" / "file", "é")
    assert (tmp_path / "new" / "file").read_text(encoding="utf-8") == "é"


def test_a_failed_write_leaves_the_old_file_and_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_text(path, "old")

    def fail(temporary: Path) -> None:
        temporary.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        replace_file(path, fail)
    assert path.read_text() == "old"
    assert [item.name for item in tmp_path.iterdir()] == ["file"]
