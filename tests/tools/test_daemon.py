from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from kvdb_tools.cli.connection import Connection, Target
from kvdb_tools.cli.reply import Map, Status
from kvdb_tools.daemon import Caller, CommandError, as_ids, as_int, disk_bytes, plain, rss_bytes


def test_replies_become_plain_values() -> None:
    assert plain(Map(((b"a", [1, b"x"]), (b"b", Map(((Status("c"), None),)))))) == {"a": [1, b"x"], "b": {"c": None}}
    assert as_ids([1, 2]) == (1, 2)
    for wrong in ("x", None, [b"1"]):
        with pytest.raises(CommandError):
            as_ids(wrong)
    with pytest.raises(CommandError):
        as_int(b"1")


def test_an_error_reply_and_a_wrong_shape_are_raised(fake_server) -> None:
    fake_server.answers[b"PING"] = b"+PONG\r\n"
    with Connection(Target(port=fake_server.port)) as connection:
        call = Caller(connection)
        assert call("PING") == "PONG"
        with pytest.raises(CommandError, match="unknown command"):
            call("NOPE")
        for wrong in (call.map, call.number, call.data, call.list):
            with pytest.raises(CommandError, match="expected"):
                wrong("PING")


def test_disk_bytes_count_what_is_allocated(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "data").write_bytes(b"x" * 10_000)
    with (tmp_path / "hole").open("wb") as file:
        file.truncate(1 << 30)
    assert 10_000 <= disk_bytes(tmp_path) < 1 << 20


def test_rss_of_a_process() -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    assert rss_bytes(process.pid) > 1 << 20
    process.communicate(b"\n")
    assert rss_bytes(process.pid) == 0
