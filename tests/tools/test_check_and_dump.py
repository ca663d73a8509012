"""kvdb-check and kvdb-dump on a small data directory, live and closed, sound and damaged."""

from __future__ import annotations

import asyncio
import gzip
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from kvdb.store.entries import Entry, EntryType, SessionValue
from kvdb.store.store import Store
from kvdb_tools.check import main as check
from kvdb_tools.dump import main as dump
from tests.kvdb.store.states import FINGERPRINT, MODEL, PAGE, pack_ids, put_snapshot, string, tokens

KV = Path(__file__).parents[1] / "vectors" / "ds4" / "kv"


def run(command, *arguments: object) -> Result:  # type: ignore[no-untyped-def]
    return CliRunner().invoke(command, [str(argument) for argument in arguments])


def parsed(command, *arguments: object):  # type: ignore[no-untyped-def]
    result = run(command, *arguments, "--json")
    assert result.exit_code in (0, 1), result.output
    return json.loads(result.output)


async def fill(folder: Path) -> Store:
    store = Store.open(folder, loop=asyncio.get_running_loop())
    await store.register_model(MODEL)
    parent = None
    for n in (1, 2, 3):
        parent = (await put_snapshot(store, b"step%d" % n, tokens(n * PAGE + 5), parent=parent)).id
    await put_snapshot(store, b"branch", tokens(2 * PAGE + 60), parent=parent)
    store.keyspace.put(0, b"chat", Entry(EntryType.SESSION, 0, SessionValue(b"u" * 16, FINGERPRINT, parent, 389)))
    store.keyspace.journal_append(b"u" * 16, 389, pack_ids([1, 2]))
    store.keyspace.put(3, b"caf\xc3\xa9", string(b"value\n", expire_ms=1 << 41))
    await store.keyspace.flush()
    return store


@pytest.fixture
async def folder(tmp_path: Path) -> Path:
    await (await fill(tmp_path)).close()
    return tmp_path


def place(folder: Path, key: str, kind: str) -> tuple[Path, int]:
    shown = parsed(dump, "show", folder, key)
    found = next(record for record in shown["records"] if record["type"] == kind)
    return folder / "segments" / found["segment"], found["offset"]


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def test_a_clean_directory(folder: Path) -> None:
    for arguments in ((), ("--deep",), ("--repair",)):
        result = run(check, folder, *arguments)
        assert (result.exit_code, "clean" in result.output) == (0, True), result.output
    assert parsed(check, folder, "--deep") == {
        "clean": True, "logged": 0, "findings": [], "repaired": [], "left": [],
    }  # fmt: skip


async def test_what_waits_in_the_change_log_is_said(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    store = Store.open(folder, loop=asyncio.get_running_loop())
    store.keyspace.put(0, b"new", string(b"1"))
    await store.keyspace.make_durable()
    program = [sys.executable, "-c", "from kvdb_tools.check import main; main()"]
    shown = "1 records of changes.log go into the index at the next start\nclean"
    beside = subprocess.run([*program, folder], capture_output=True, text=True, check=True)
    assert beside.stdout.startswith(shown)
    crashed = tmp_path_factory.mktemp("crashed") / "kvdb"
    shutil.copytree(folder, crashed)  # as a daemon that is killed leaves it
    assert run(check, crashed).output.startswith(shown)
    assert parsed(check, crashed)["logged"] == 1
    await store.close()
    assert parsed(check, folder)["logged"] == 0


def test_damage_is_named_and_repaired(folder: Path) -> None:
    path, offset = place(folder, "step3", "tail")
    flip(path, offset + 200)
    assert run(check, folder).exit_code == 0  # headers and index only
    result = run(check, folder, "--deep")
    assert result.exit_code == 1
    assert f"in {path.name} at {offset}: record payload checksum mismatch" in result.output
    assert "hurts key 'step3' of database 0" in result.output
    assert "hurts key 'chat'" in result.output
    assert "step2" not in result.output
    result = run(check, folder, "--deep", "--repair")
    assert result.exit_code == 1
    assert "dropped key b'step3'" in result.output
    assert "clean after repair" in result.output
    assert run(check, folder, "--deep").exit_code == 0
    assert {row["key"] for row in parsed(dump, "ls", folder)} == {"step1", "step2", "branch", "café"}


def test_wrong_use(tmp_path: Path) -> None:
    assert run(check).exit_code == 2
    assert run(check, tmp_path / "none").exit_code == 2
    result = run(check, tmp_path)
    assert result.exit_code == 2
    assert "not a kvdb data directory" in result.output
    assert run(dump, "ls", tmp_path).exit_code == 2


async def test_a_live_directory_is_not_repaired(tmp_path: Path) -> None:
    store = await fill(tmp_path)
    result = run(check, tmp_path, "--repair")
    assert result.exit_code == 2
    assert "in use by process" in result.output
    await store.close()


def test_ls(folder: Path) -> None:
    rows = {row["key"]: row for row in parsed(dump, "ls", folder)}
    assert rows["step3"]["tokens"] == 3 * PAGE + 5
    assert rows["step3"]["type"] == "snapshot"
    assert rows["chat"]["tokens"] == 391
    assert rows["café"]["db"] == 3
    assert [row["key"] for row in parsed(dump, "ls", folder, "--db", "3")] == ["café"]
    text = run(dump, "ls", folder).output
    assert "step3" in text
    assert "2039" in text  # the year in which the string expires


def test_tree(folder: Path) -> None:
    lines = run(dump, "tree", folder).output.splitlines()
    assert [line.split("─ ")[1].split()[0] for line in lines] == ["step1", "step2", "step3", "branch"]
    facts = {tuple(row["keys"]): row for row in parsed(dump, "tree", folder)}
    assert facts[("step2",)]["parent"] == facts[("step1",)]["id"]
    assert facts[("step1",)]["parent"] is None


def test_show(folder: Path) -> None:
    shown = parsed(dump, "show", folder, "step2")
    assert (shown["tokens"], shown["pages"], shown["model"]) == (2 * PAGE + 5, 2, "tiny")
    assert [record["type"] for record in shown["records"]] == ["page", "page", "tail"]
    assert shown["meta"] == {"f": "v"}
    assert "tail" in run(dump, "show", folder, "step2").output
    assert parsed(dump, "show", folder, "chat")["journal"] == ["2 tokens from 389"]
    assert parsed(dump, "show", folder, "café", "--db", 3)["value"] == r"value\n"
    result = run(dump, "show", folder, "nothing")
    assert result.exit_code == 2
    assert "there is no key 'nothing'" in result.output


def test_record(folder: Path) -> None:
    path, offset = place(folder, "step2", "page")
    shown = parsed(dump, "record", path, offset)
    assert (shown["type"], shown["tokens"], shown["text"]) == ("page", PAGE, "page 0 ")
    assert [section["part"] for section in shown["sections"]] == ["compressed", "index", "compressed"]
    path, offset = place(folder, "step2", "tail")
    shown = parsed(dump, "record", path, offset)
    assert (shown["type"], shown["first"], shown["text"]) == ("tail", 2 * PAGE, "tail")
    assert "window" in run(dump, "record", path, offset).output
    assert run(dump, "record", path, offset + 1).exit_code == 1
    flip(path, offset + 100)
    result = run(dump, "record", path, offset)
    assert result.exit_code == 1
    assert "checksum" in result.output


def test_record_without_an_index(folder: Path, tmp_path: Path) -> None:
    path, offset = place(folder, "step2", "page")
    alone = tmp_path / "some" / "where"
    alone.mkdir(parents=True)
    (alone / path.name).write_bytes(path.read_bytes())
    assert parsed(dump, "record", alone / path.name, offset)["sections"] == []


def test_kv(tmp_path: Path) -> None:
    source = next(KV.glob("157c*"))
    file = tmp_path / source.name.removesuffix(".gz")
    file.write_bytes(gzip.decompress(source.read_bytes()))
    shown = parsed(dump, "kv", file)
    assert shown["name_fits_text"]
    assert (shown["reason"], shown["tokens"], shown["layers"], shown["vocab"]) == ("evict", 75, 6, 512)
    assert "reason" in run(dump, "kv", file).output
    file.write_bytes(b"KVC")
    assert run(dump, "kv", file).exit_code == 1
