"""Two quantisations of one family in one daemon: what they share, and what `cross-quant deny` keeps apart."""

from __future__ import annotations

import asyncio
import json
import shutil
from array import array
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest

from kvdb import branches, storing, timelines
from kvdb.errors import KvdbError, WrongModelError
from kvdb.session import Model
from kvdb.sessions import Sessions
from kvdb.store.entries import Entry, EntryType, SessionValue, SnapshotValue
from kvdb.store.records import ModelRecord
from kvdb.store.rows import Reason
from kvdb.store.store import Store
from kvdb.storing import store_state
from kvdb_engine.catalog import open_model

DB = 0
PROMPT = array("I", [number % 900 + 100 for number in range(600)])  # more than one page


def widen(source: Path, target: Path) -> None:
    """Write a model folder whose BF16 tensors are F32: another quantisation of the same weights."""
    target.mkdir()
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(source / name, target / name)
    tensors: dict[str, tuple[str, list[int], bytes]] = {}
    for path in sorted(source.glob("*.safetensors")):
        data = path.read_bytes()
        n = int.from_bytes(data[:8], "little")
        for name, facts in json.loads(data[8 : 8 + n]).items():
            if name != "__metadata__":
                begin, end = facts["data_offsets"]
                kind, raw = facts["dtype"], data[8 + n + begin : 8 + n + end]
                if kind == "BF16":
                    kind, raw = "F32", (np.frombuffer(raw, "<u2").astype("<u4") << 16).tobytes()
                tensors[name] = (kind, facts["shape"], raw)
    header, at = {}, 0
    for name, (kind, shape, raw) in tensors.items():
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [at, at + len(raw)]}
        at += len(raw)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    body = b"".join(raw for _, _, raw in tensors.values())
    (target / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + body)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target: Path = tmp_path_factory.mktemp("models") / "wide"
    widen(open_model("dsv4-nano").path, target)
    return target


@pytest.fixture
async def sessions(tmp_path: Path, wide: Path) -> AsyncIterator[Sessions]:
    store = Store.open(tmp_path / "data", loop=asyncio.get_running_loop())
    models = {}
    for spec in ("dsv4-nano", f"wide={wide}"):
        info = open_model(spec)
        models[info.name] = Model(info, spec)
        await store.register_model(ModelRecord(info.name, info.fingerprint, info.family, info.layout.to_bytes()))
    opened = Sessions(store, models, store_state)
    yield opened
    await opened.close()
    await store.close()


async def prefill(sessions: Sessions, name: bytes, model: str, ids: array[int]) -> timelines.Reply:
    return await timelines.prefill(sessions, DB, name, sessions.model(model), ids, "YES")


async def snapshot(sessions: Sessions, name: bytes, key: bytes) -> storing.Reply:
    def named(snapshot_id: bytes) -> Entry:
        return Entry(EntryType.SNAPSHOT, 0, SnapshotValue(snapshot_id))

    reply = await storing.snapshot(sessions, DB, name, key, named, lambda: True)
    assert reply is not None
    return reply


def fingerprint_of(sessions: Sessions, key: bytes) -> bytes:
    found = sessions.store.snapshot(sessions.snapshot_value(DB, key).id)
    assert found is not None
    return found.fingerprint


async def test_a_family_shares_prefixes_and_each_stores_its_own(sessions: Sessions) -> None:
    nano, wide = sessions.model("dsv4-nano"), sessions.model("wide")
    assert nano.info.family == wide.info.family and nano.info.fingerprint != wide.info.fingerprint
    await prefill(sessions, b"a", "dsv4-nano", PROMPT)
    await snapshot(sessions, b"a", b"k1")
    found = await prefill(sessions, b"b", "wide", array("I", [*PROMPT, 5, 6]))
    assert (found["reused"], found["computed"], found["source"]) == (600, 2, "stored")
    made = await snapshot(sessions, b"b", b"k2")
    assert made["pages_new"] == 1, "the foreign page is packed again under this model's name"
    assert fingerprint_of(sessions, b"k2") == wide.info.fingerprint
    assert [record.id for record in sessions.store.lineage(sessions.snapshot_value(DB, b"k2").id)] == [
        sessions.snapshot_value(DB, key).id for key in (b"k2", b"k1")
    ]
    # What was stored is what is live, also after both engines ended and the base is gone.
    expected = (await branches.logits(sessions, DB, b"b"))[2]
    sessions.keyspace.delete(DB, b"k1")
    sessions.keyspace.delete(DB, b"a")
    for model in (nano, wide):
        await model.client.stop()
    await branches.restore(sessions, DB, b"k2", b"c", replace=False)
    assert (await sessions.get(DB, b"c")).model is wide
    await timelines.extend(sessions, DB, b"c", array("I", [9]))
    await branches.rewind_to(sessions, DB, b"c", b"k2")
    assert (await branches.logits(sessions, DB, b"c"))[2] == expected


async def test_going_back_to_an_ancestor_of_another_quantisation(sessions: Sessions) -> None:
    await prefill(sessions, b"a", "dsv4-nano", PROMPT)
    await snapshot(sessions, b"a", b"k1")
    await prefill(sessions, b"b", "wide", array("I", [*PROMPT, 5]))
    await snapshot(sessions, b"b", b"k2")
    assert (await branches.rewind_to(sessions, DB, b"b", b"k1"))["tokens"] == 600
    await timelines.extend(sessions, DB, b"b", array("I", [5]))
    sessions.cross_quant = False
    for work in (branches.rewind_to(sessions, DB, b"b", b"k1"), branches.rewind_steps(sessions, DB, b"b", 1)):
        with pytest.raises(WrongModelError):
            await work
    assert (await sessions.get(DB, b"b")).n_tokens == 601


async def test_deny_keeps_quantisations_apart(sessions: Sessions) -> None:
    sessions.cross_quant = False
    await prefill(sessions, b"a", "dsv4-nano", PROMPT)
    await snapshot(sessions, b"a", b"k")
    assert (await prefill(sessions, b"b", "wide", PROMPT))["source"] == "none"
    del sessions.models["dsv4-nano"]
    for work in (
        branches.restore(sessions, DB, b"k", b"r", replace=False),
        branches.fork(sessions, DB, b"k", [b"f"]),
        branches.rewind_to(sessions, DB, b"b", b"k"),
    ):
        with pytest.raises(WrongModelError):
            await work
    info, n_tokens, _ = await branches.logits(sessions, DB, b"k")
    assert info is None and n_tokens == 600, "stored logits need no model"
    assert sessions.keyspace.get(DB, b"r") is None and sessions.keyspace.get(DB, b"f") is None


async def test_another_model_takes_a_key_over_only_when_it_is_named(sessions: Sessions) -> None:
    wide = sessions.model("wide")
    sessions.cross_quant = False
    await prefill(sessions, b"s", "dsv4-nano", PROMPT[:20])
    nano = sessions.models.pop("dsv4-nano")
    with pytest.raises(WrongModelError):
        sessions.model_for(DB, b"s", None)
    assert sessions.model_for(DB, b"s", "wide") is wide
    await prefill(sessions, b"s", "wide", PROMPT[:30])
    found = sessions.entry(DB, b"s")
    assert isinstance(found, SessionValue) and found.fingerprint == wide.info.fingerprint
    sessions.models["dsv4-nano"] = nano
    with pytest.raises(KvdbError, match="not served"):
        sessions.model_for(DB, b"s", "no-such-model")


async def test_a_session_that_was_stored_by_another_model_is_that_models(sessions: Sessions) -> None:
    await prefill(sessions, b"a", "dsv4-nano", PROMPT[:20])
    await snapshot(sessions, b"a", b"k")
    wide = sessions.model("wide")
    nano = sessions.models.pop("dsv4-nano")
    await branches.fork(sessions, DB, b"k", [b"f", b"g"])
    for name in (b"f", b"g"):
        await timelines.extend(sessions, DB, name, array("I", [5]))
    await snapshot(sessions, b"f", b"k2")  # under a key of its own
    await sessions.park(wide, Reason.EVICT)  # and without
    sessions.models["dsv4-nano"] = nano
    sessions.cross_quant = False
    for name in (b"f", b"g"):
        found = sessions.entry(DB, name)
        assert found is not None and found.fingerprint == wide.info.fingerprint
