"""Every typed method against a real daemon: words that it accepts, replies that fit the classes."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Iterator

import pytest

import kvdb
from kvdb.client import BusyKeyError, StateError, TooLongError
from kvdb.client.replies import EngineStatus, Filled, Generated, PrefixMatch, SnapDiff, SnapInfo, Snapped
from kvdb_tools.daemon import Daemon

MODEL = "dsv4-nano"


def text() -> str:
    """A text that no other test has: states of deleted keys may be found until the next commit."""
    return f"{secrets.token_hex(8)}: " + "The ship left the harbour at dawn. " * 40 + "Then"


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with Daemon(tmp_path_factory.mktemp("client") / "data") as running:
        yield running


@pytest.fixture(params=[3, 2], ids=["RESP3", "RESP2"])
def client(daemon: Daemon, request: pytest.FixtureRequest) -> Iterator[kvdb.Client]:
    with kvdb.Client("127.0.0.1", daemon.port, protocol=request.param) as found:
        found.flushall()
        yield found


def test_a_life(client: kvdb.Client) -> None:
    told = text()
    filled = client.prefill("s", told)
    assert isinstance(filled, Filled)
    assert (filled.reused, filled.computed, filled.source) == (0, filled.tokens, "none")
    snapped = client.snapshot("s", "a", meta={"step": 1}, pin=True)
    assert isinstance(snapped, Snapped)
    assert snapped.tokens == filled.tokens
    assert client.snapshot("s", "a", nx=True) is None
    generated = client.generate("s", 6, temperature=0.7, top_k=50, top_p=0.9, min_p=0, seed=1, stop=["never"])
    assert isinstance(generated, Generated)
    assert (len(generated.ids), generated.finish) == (6, "length")
    assert client.extend("s", [7, 8]).tokens == filled.tokens + 8
    client.snapshot_later("s", "b", ex=1000)
    assert client.wait_snapshot("b").tokens == filled.tokens + 8
    assert client.wait_snapshot("b") is None
    info = client.snapinfo("b")
    assert isinstance(info, SnapInfo)
    assert 0 < info.ttl_ms <= 1_000_000
    assert client.snapinfo("a").meta == {"step": "1"}
    assert client.snapinfo("a").pinned
    assert [one.key for one in client.lineage("b")] == ["b", "a"]
    diff = client.snapdiff("a", "b")
    assert isinstance(diff, SnapDiff)
    assert (diff.common_tokens, diff.identical) == (filled.tokens, False)
    assert client.unpin("a")
    assert not client.unpin("a")
    assert client.pin("a")
    assert client.rewind_steps("s", 1).tokens == filled.tokens
    assert client.rewind_to("s", "a").recomputed == 0
    assert client.rewind_tokens("s", 20).tokens == 20
    assert client.restore("b", "s", replace=True).recomputed == 0
    with pytest.raises(BusyKeyError):
        client.restore("b", "s")
    assert client.fork("a", "x", "y") == 2
    found = client.prefix(told + " the wind rose.")
    assert isinstance(found, PrefixMatch)
    assert (found.key, found.same_quant) == ("a", True)
    assert client.prefix(secrets.token_hex(8)) is None
    assert client.copy("a", "c")
    assert client.type("c") == b"snapshot"


def test_logits(client: kvdb.Client) -> None:
    client.prefill("s", "Once upon a time")
    client.snapshot("s", "k")
    raw = client.logits_raw("k")
    best = client.logits("k", 3)
    assert len(raw) == 4 * client.engine_models()[0].vocab
    assert best[0].logprob == max(one.logprob for one in best)
    assert client.sample("k", 4, temperature=0) == client.sample("s", 4, temperature=0)
    assert client.sample("k", 1, temperature=0)[0].id == best[0].id
    assert client.generate("s", 1, temperature=0).text == best[0].text


def test_tokens_engine_and_store(client: kvdb.Client) -> None:
    ids = client.tokenize(MODEL, "Hello there")
    assert client.detokenize(MODEL, ids) == b"Hello there"
    client.engine_load()
    status = client.engine_status(MODEL)
    assert isinstance(status, EngineStatus)
    assert (status.model, status.state) == (MODEL, "running")
    client.prefill("s", text())
    assert client.engine_cancel("s") == 0
    client.snapshot("s", "k")
    assert client.store_stats()["snapshots"] >= 1
    assert isinstance(client.store_verify(deep=True), dict)
    assert client.store_gc() is not None
    client.engine_unload()
    assert client.engine_status().state == "stopped"


def test_export_and_import(client: kvdb.Client) -> None:
    client.prefill("s", text())
    client.snapshot("s", "k")
    data = client.store_export_data("k")
    client.delete("s", "k")
    client.store_import_data("back", data)
    assert client.restore("back", "s").recomputed == 0


def test_errors(client: kvdb.Client) -> None:
    with pytest.raises(TooLongError):
        client.prefill("s", [7] * 40_000)
    with pytest.raises(StateError, match="not served here"):
        client.prefill("s", "x", model="none")


async def test_streams(daemon: Daemon) -> None:
    async with kvdb.AsyncClient("127.0.0.1", daemon.port) as client:
        await client.flushall()
        progress = client.prefill_stream("s", text())
        seen = [one async for one in progress]
        assert seen[-1].done == seen[-1].total == (await progress.result()).computed
        async with client.stream("s", 30_000, seed=1) as stream:
            async for _ in stream:
                break
        before = (await client.snapshot("s", "after")).tokens  # valid at its last complete token
        for _ in range(200):
            if not (await client.engine_status()).requests:
                break
            await asyncio.sleep(0.01)
        assert (await client.snapshot("s", "later")).tokens == before
        both = await asyncio.gather(client.stream("s", 3).result(), client.prefill("t", "Hello"))
        assert len(both[0].ids) == 3
