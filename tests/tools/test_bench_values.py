"""kvdb-bench values, as short as it can be: what it claims of memory must hold, and its clients must notice errors."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from kvdb_tools.bench import values
from kvdb_tools.bench.bare_writer import BareWriter
from kvdb_tools.bench.scenario import MissingError, Settings
from kvdb_tools.daemon import Daemon


@pytest.mark.skipif(shutil.which("redis-server") is None, reason="redis-server is not installed")
def test_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("redis")
    monkeypatch.setattr(values, "QUICK_SIZES", {1: 2})
    monkeypatch.setattr(values, "QUICK_HUGE_MIB", 80)
    monkeypatch.setattr(values, "PIPELINED", 30)
    monkeypatch.setattr(values, "UNREAD_SECONDS", 1.0)
    result = values.run(Settings(tmp_path, True, "", lambda _: None))
    assert [(row[0], row[1]) for row in result.rows] == [
        (f"{verb} 1 MiB", client) for client in ("bare socket", "redis-py") for verb in ("SET", "GET")
    ]
    assert all(cell > 0 for row in result.rows for cell in row[2:])  # type: ignore[operator]
    assert any("does nothing else takes" in note for note in result.notes)
    memory = {text: holds for text, holds in result.claims if "memory" in text}
    assert len(memory) == 3 and all(memory.values()), memory


def test_the_bare_writer_writes_what_it_is_sent(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with BareWriter(path) as writer:
        client = values.BareClient(writer.port, 3 << 20)
        for n_bytes in (1000, 3 << 20, 10):
            client.set(b"key", n_bytes)
        expected = client.data[:1000].tobytes() + 3 * client.data.tobytes()[: 1 << 20] + client.data[:10].tobytes()
        client.close()
    assert path.read_bytes() == expected


def test_errors_are_noticed(tmp_path: Path) -> None:
    with Daemon(tmp_path / "data", {"model": "", "proto-max-bulk-len": "1mb", "maxstore": "1mb"}) as daemon:
        client = values.BareClient(daemon.port, 1 << 20)
        with pytest.raises(MissingError, match="NOSPACE"):
            client.set(b"k", 1 << 20)
        with pytest.raises(MissingError, match=r"GET was answered with b'\$-1"):
            client.get(b"k", 5)
        daemon.kill()
        with pytest.raises(MissingError, match="closed the connection"):
            client.get(b"k", 5)
        client.close()
