from __future__ import annotations

import subprocess
import sys
import threading

import pytest
import redis

import kvdb
from kvdb.client import BusyError, EngineDownError, StateError, TooLongError
from kvdb.client.replies import Filled, Generated, Progress, Token
from kvdb_protocol.replies import Push, Simple

from .conftest import Scripted, pushes

FILLED = {"tokens": 5, "reused": 2, "computed": 3, "source": b"live", "ms": 1.0}
GENERATED = {"text": b"ab", "ids": [7, 8], "tokens": 12, "finish": b"length", "ms": 2.0}
TOKENS = pushes((7, b"a"), (8, b"b"))


def client_of(scripted: Scripted, **options: object) -> kvdb.Client:
    return kvdb.Client("127.0.0.1", scripted.port, **options)


def test_redis_methods_and_kvdb_methods_on_one_client(scripted: Scripted) -> None:
    scripted.answer = lambda words: [FILLED] if words[0] == b"PREFILL" else [b"$1\r\nv\r\n"]
    client = client_of(scripted)
    assert client.get("k") == b"v"
    assert client.prefill("s", "hello") == Filled(5, 2, 3, "live", 1.0)
    assert scripted.requests == [[b"GET", b"k"], [b"PREFILL", b"s", b"TEXT", b"hello"]]


def test_decoded_responses_and_resp2_read_the_same(scripted: Scripted) -> None:
    scripted.answer = lambda words: [b"$2\r\n\xff\xfe\r\n"] if words[0] == b"LOGITS" else [FILLED]
    for options in ({"decode_responses": True}, {"protocol": 2}):
        client = client_of(scripted, **options)
        assert client.prefill("s", [1]) == Filled(5, 2, 3, "live", 1.0)
        assert client.logits_raw("s") == b"\xff\xfe"


def test_every_error_word_has_its_class(scripted: Scripted) -> None:
    words = {"WRONGMODEL", "CORRUPT", "NOSPACE", "TOOLONG", "NOENGINE", "ENGINEDOWN", "CANCELLED", "BUSY", "BUSYKEY"}
    client = client_of(scripted)
    for word in words:
        scripted.answer = lambda _, word=word: [f"-{word} what happened\r\n".encode()]
        for run in (lambda: client.prefill("s", "t"), lambda: client.generate("s"), lambda: client.get("k")):
            with pytest.raises(StateError, match=r"^what happened$") as found:
                run()
            assert found.value.word == word
    assert EngineDownError.retryable and BusyError.retryable and not TooLongError.retryable


def test_words_of_redis_keep_redis_classes(scripted: Scripted) -> None:
    client = client_of(scripted)
    scripted.answer = lambda _: [b"-NOPERM no\r\n"]
    with pytest.raises(redis.exceptions.NoPermissionError):
        client.prefill("s", "t")
    scripted.answer = lambda _: [b"-WRONGTYPE Operation against a key\r\n"]
    with pytest.raises(redis.exceptions.ResponseError, match=r"^WRONGTYPE"):
        client.generate("s")
    scripted.answer = lambda _: [b"-ERR no such session 's'\r\n"]
    with pytest.raises(redis.exceptions.ResponseError, match=r"^no such session"):
        client.extend("s", "t")
    assert "BUSYKEY" not in redis.connection.DefaultParser.EXCEPTION_CLASSES


def test_errors_in_a_pipeline_are_mapped_too(scripted: Scripted) -> None:
    scripted.answer = lambda words: [b"-CORRUPT page 3\r\n"] if words[0] == b"GET" else [Simple("OK")]
    with client_of(scripted).pipeline(transaction=False) as pipe:
        pipe.set("a", "b")
        pipe.get("a")
        assert [type(one).__name__ for one in pipe.execute(raise_on_error=False)] == ["bool", "CorruptError"]


def test_a_stream_yields_tokens_then_has_its_result(scripted: Scripted) -> None:
    scripted.answer = lambda _: [*TOKENS, GENERATED]
    client = client_of(scripted)
    stream = client.stream("s", 2, seed=1)
    assert list(stream) == [Token(7, "a"), Token(8, "b")]
    assert stream.result == Generated(b"ab", (7, 8), 12, "length", 2.0)
    assert scripted.requests == [[b"GENERATE", b"s", b"MAXTOKENS", b"2", b"SEED", b"1", b"STREAM"]]
    assert client.stream("s").result.finish == "length"
    assert scripted.connections == 1  # a finished stream gives its connection back


def test_a_prefill_shows_its_progress(scripted: Scripted) -> None:
    scripted.answer = lambda _: [Push(["progress", b"s", 1, 3]), Push(["progress", b"s", 3, 3]), FILLED]
    stream = client_of(scripted).prefill_stream("s", "text")
    assert list(stream) == [Progress(1, 3), Progress(3, 3)]
    assert stream.result.computed == 3


def test_push_frames_do_not_disturb_a_plain_call(scripted: Scripted) -> None:
    scripted.answer = lambda words: [*TOKENS, GENERATED if words[0] == b"GENERATE" else FILLED]
    client = client_of(scripted)
    assert client.generate("s").ids == (7, 8)
    assert client.prefill("s", "t").tokens == 5


def test_leaving_a_stream_closes_its_connection(scripted: Scripted) -> None:
    scripted.answer = lambda _: list(TOKENS)
    client = client_of(scripted)
    with client.stream("s") as stream:
        assert next(stream).id == 7
    assert scripted.closed.wait(5)
    with pytest.raises(redis.RedisError, match="closed before its end"):
        _ = stream.result
    scripted.answer = lambda _: [FILLED]
    assert client.prefill("s", "t").tokens == 5


def test_an_error_in_a_stream_is_raised_and_the_connection_stays(scripted: Scripted) -> None:
    scripted.answer = lambda _: [TOKENS[0], b"-ENGINEDOWN gone\r\n"]
    client = client_of(scripted)
    stream = client.stream("s")
    assert next(stream).id == 7
    with pytest.raises(EngineDownError):
        next(stream)
    scripted.answer = lambda _: [FILLED]
    client.prefill("s", "t")
    assert scripted.connections == 1


def test_generate_is_sent_once_and_prefill_again_after_a_lost_connection(scripted: Scripted) -> None:
    client = client_of(scripted)
    scripted.answer = lambda _: None
    for run in (lambda: client.generate("s"), lambda: client.extend("s", "t"), lambda: client.fork("s", "d")):
        scripted.requests.clear()
        with pytest.raises(redis.exceptions.ConnectionError):
            run()
        assert len(scripted.requests) == 1
    answers = [None, [FILLED]]
    scripted.answer = lambda _: answers.pop(0)
    assert client.prefill("s", "t").tokens == 5


def test_sessions(scripted: Scripted) -> None:
    scripted.answer = lambda words: [FILLED] if words[0] == b"PREFILL" else [1]
    client = client_of(scripted)
    with client.session("agent") as session:
        session.prefill("t")
    assert [words[0] for words in scripted.requests] == [b"PREFILL"]  # a named session is kept
    scripted.requests.clear()
    with client.session() as session:
        session.prefill("t")
        branches = session.branches(2)
        with branches[0]:
            pass
    names = [branch.name.encode() for branch in branches]
    assert [words[0] for words in scripted.requests] == [b"PREFILL", b"FORK", b"DEL", b"DEL"]
    assert scripted.requests[1][2:] == names
    assert scripted.requests[2:] == [[b"DEL", names[0]], [b"DEL", session.name.encode()]]


async def test_the_asyncio_client(scripted: Scripted) -> None:
    replies = {b"PREFILL": [FILLED], b"GENERATE": [*TOKENS, GENERATED], b"GET": [b"$1\r\nv\r\n"], b"DEL": [1]}
    scripted.answer = lambda words: replies[words[0]]
    async with kvdb.AsyncClient("127.0.0.1", scripted.port) as client:
        assert await client.get("k") == b"v"
        assert await client.prefill("s", "t") == Filled(5, 2, 3, "live", 1.0)
        assert (await client.generate("s")).ids == (7, 8)
        stream = client.stream("s", 2)
        assert [token async for token in stream] == [Token(7, "a"), Token(8, "b")]
        assert (await stream.result()).text == "ab"
        async with client.session() as session:
            assert (await session.stream().result()).tokens == 12
        assert scripted.requests[-1][0] == b"DEL"
        replies[b"GENERATE"] = [b"-TOOLONG much\r\n"]
        with pytest.raises(TooLongError):
            await client.generate("s")
        assert scripted.connections == 1
        replies[b"GENERATE"] = list(TOKENS)
        async with client.stream("s") as stream:
            assert (await anext(stream)).id == 7
        with pytest.raises(redis.RedisError, match="closed before its end"):
            await stream.result()
    assert scripted.closed.wait(5)


@pytest.mark.parametrize("url", ["kvdb://127.0.0.1:{}/0", "redis://127.0.0.1:{}"])
async def test_addresses(scripted: Scripted, url: str) -> None:
    scripted.answer = lambda _: [FILLED]
    client = kvdb.Client.from_url(url.format(scripted.port))
    assert isinstance(client, kvdb.Client)
    assert client.prefill("s", "t").tokens == 5
    async with kvdb.AsyncClient.from_url(url.format(scripted.port)) as other:
        assert (await other.prefill("s", "t")).tokens == 5
    assert kvdb.Client.from_url("kvdb://example").connection_pool.connection_kwargs["port"] == 6374
    assert kvdb.Client.from_url("unix:///tmp/s").connection_pool.connection_kwargs["path"] == "/tmp/s"


def test_threads_share_a_client(scripted: Scripted) -> None:
    scripted.answer = lambda _: [*TOKENS, GENERATED]
    client, found = client_of(scripted), []
    threads = [threading.Thread(target=lambda: found.append(client.generate("s").ids)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [(7, 8)] * 8


def test_only_restore_replaces_a_method_of_redis_py() -> None:
    for ours, theirs in ((kvdb.Client, redis.Redis), (kvdb.AsyncClient, redis.asyncio.Redis)):
        same = {name for name in vars(ours) if not name.startswith("_") and hasattr(theirs, name)}
        assert same == {"from_url", "restore"}


def test_the_client_imports_neither_engine_nor_daemon() -> None:
    banned = "('mlx', 'numpy', 'lmdb', 'kvdb_engine', 'kvdb.server')"
    code = f"import sys, kvdb; kvdb.Client; print([m for m in {banned} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
