"""The operating system's files, where one call is not enough."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kvdb.store.files import OsFiles


@pytest.mark.parametrize("most", [1, 3, 10, 1 << 20])
def test_pieces_are_written_whole_however_little_a_call_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    real = os.pwritev

    def short(fd: int, pieces: list[memoryview], offset: int) -> int:
        return real(fd, [b"".join(pieces)[:most]], offset)

    monkeypatch.setattr(os, "pwritev", short)
    files = OsFiles()
    fd = files.create(tmp_path / "f")
    files.write_pieces(fd, [b"", b"abc", memoryview(b"defgh"), bytearray(b"i"), b"", b"jk"], 5)
    files.write_pieces(fd, [], 0)
    files.write_pieces(fd, [b""], 0)
    files.close(fd)
    assert (tmp_path / "f").read_bytes() == bytes(5) + b"abcdefghijk"


def test_there_may_be_more_pieces_than_a_call_takes(tmp_path: Path) -> None:
    pieces = [b"%d," % number for number in range(3000)]
    files = OsFiles()
    fd = files.create(tmp_path / "f")
    files.write_pieces(fd, pieces, 0)
    files.close(fd)
    assert (tmp_path / "f").read_bytes() == b"".join(pieces)
