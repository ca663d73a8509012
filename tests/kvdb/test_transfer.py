"""STORE EXPORT, IMPORT, BACKUP and COMPACT through a daemon that serves ds4's tiny model."""

from __future__ import annotations

import gzip
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvdb_protocol.kvc import decode_kvc
from kvdb_tools.check import check
from kvdb_tools.cli.connection import Connection
from kvdb_tools.daemon import Caller, CommandError, Daemon

DS4 = Path(__file__).parents[1] / "vectors" / "ds4"
FILES = {path.name.removesuffix(".gz"): gzip.decompress(path.read_bytes()) for path in (DS4 / "kv").glob("*.kv.gz")}


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    folder = tmp_path_factory.mktemp("transfer")
    model = folder / "tiny.gguf"
    model.write_bytes(gzip.decompress((DS4 / "tiny.gguf.gz").read_bytes()))
    with Daemon(folder / "data", {"model": str(model)}) as running:
        yield running


@pytest.fixture
def call(daemon: Daemon) -> Iterator[Caller]:
    with Connection(daemon.target, timeout=60) as connection:
        yield Caller(connection)


def test_ds4_files_of_every_reason(daemon: Daemon, call: Caller) -> None:
    transfer = daemon.directory / "transfer"
    transfer.mkdir(exist_ok=True)
    for name, data in FILES.items():
        file = decode_kvc(data)
        done = call.map("STORE", "IMPORT", name, "DATA", data)
        assert done["tokens"] == file.n_tokens
        (transfer / name).write_bytes(data)
        assert call.map("STORE", "IMPORT", name, "FILE", name)["id"] == done["id"]
        assert call.map("SNAPINFO", name)["tokens"] == file.n_tokens
        ids = struct.unpack_from(f"<{file.n_tokens}I", file.payload, 52)
        found = call.map("PREFIX", "TOKENS", file.n_tokens, *ids)
        assert (found["tokens"], found["key"]) == (file.n_tokens, name.encode())
        out = decode_kvc(call.data("STORE", "EXPORT", name, "DATA", "FORMAT", "KV"))
        assert (out.name, out.text, out.context, out.created_s) == (name, file.text, file.context, file.created_s)
        # Token ids and logits: everything before the first rows.
        n_bytes = 52 + 4 * file.n_tokens + 4 * 512
        assert bytes(out.payload[:n_bytes]) == bytes(file.payload[:n_bytes])


def test_an_imported_state_goes_on(call: Caller) -> None:
    name, data = next(iter(FILES.items()))
    call("STORE", "IMPORT", "state", "DATA", data)
    assert call.map("RESTORE", "state", "s", "REPLACE")["recomputed"] == 0
    assert call.map("GENERATE", "s", "MAXTOKENS", 3, "TEMPERATURE", 0)["tokens"] == decode_kvc(data).n_tokens + 3
    assert name


def test_archives(daemon: Daemon, call: Caller) -> None:
    data = next(iter(FILES.values()))
    before = call.map("STORE", "IMPORT", "state", "DATA", data)
    done = call.map("STORE", "EXPORT", "state", "FILE", "state.archive")
    assert (daemon.directory / "transfer" / "state.archive").stat().st_size == done["bytes"]
    assert call.data("STORE", "EXPORT", "state", "DATA")[:8] == b"KVDBARC1"
    call("DEL", "state", "s", *FILES)
    after = call.map("STORE", "IMPORT", "other", "FILE", "state.archive")
    assert after["id"] == before["id"]


def test_backup_and_compact(daemon: Daemon, call: Caller) -> None:
    call("STORE", "IMPORT", "state", "DATA", next(iter(FILES.values())))
    first = call.map("STORE", "BACKUP", "nightly")
    assert first["bytes_copied"] == first["bytes_live"]
    assert call.map("STORE", "BACKUP", "nightly")["bytes_copied"] == 0
    assert check(daemon.directory / "transfer" / "nightly", deep=True, mend=False).findings == []
    assert "bytes_moved" in call.map("STORE", "COMPACT")


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (("STORE", "IMPORT", "k", "FILE", "../kvdb.conf"), "not a plain file name"),
        (("STORE", "IMPORT", "k", "FILE", "none"), "there is no file 'none'"),
        (("STORE", "IMPORT", "k", "DATA", "junk"), "CORRUPT"),
        (("STORE", "IMPORT", "k", "DATA", "KVC"), "CORRUPT"),
        (("STORE", "IMPORT", "k", "FROM", "x"), "syntax error"),
        (("STORE", "EXPORT", "none", "DATA"), "no such snapshot"),
        (("STORE", "EXPORT", "text", "DATA"), "WRONGTYPE"),
        (("STORE", "EXPORT", "state", "FILE", "a/b"), "not a plain file name"),
        (("STORE", "EXPORT", "state", "DATA", "FORMAT", "ZIP"), "syntax error"),
        (("STORE", "EXPORT", "state", "DATA", "FORMAT"), "syntax error"),
        (("STORE", "BACKUP", ".."), "not a plain file name"),
    ],
)
def test_refusals(call: Caller, words: tuple[str, ...], error: str) -> None:
    call("STORE", "IMPORT", "state", "DATA", next(iter(FILES.values())))
    call("SET", "text", "x")
    with pytest.raises(CommandError, match=error):
        call(*words)
    assert call("EXISTS", "k") == 0
