"""What makes two conversations the same, and what happens when a state cannot be stored."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from kvdb.http.memory import IDLE_SESSIONS, Memory, turn_hashes
from kvdb.store.entries import Entry, EntryType, SnapshotValue
from kvdb_engine.chat import SampledBlock, Thinking
from kvdb_tools.daemon import Daemon, free_port

from .conftest import CALCULATOR, MODEL, Served

USER = {"role": "user", "content": "What is 1 plus 1?"}


def call(arguments: str) -> dict[str, Any]:
    function = {"name": "calculator", "arguments": arguments}
    return {"role": "assistant", "content": "", "tool_calls": [{"id": "a", "function": function}]}


SAID = call('{"expression": "1+1", "base": 10}')


def last_hash(messages: list[Any], **changes: Any) -> bytes:
    info = SimpleNamespace(fingerprint=changes.pop("fingerprint", b"f"))
    user = SimpleNamespace(name=changes.pop("user", b"default"))
    ask: Any = SimpleNamespace(
        **{
            "user": user,
            "model": SimpleNamespace(info=info),
            "tools": (CALCULATOR,),
            "thinking": Thinking.OFF,
            **changes,
        }
    )
    return turn_hashes(ask, messages)[-1]


@pytest.mark.parametrize(
    "messages",
    [
        [USER, call('{"base":10,"expression":"1+1"}')],
        [USER, {**SAID, "reasoning_content": "I must add."}],
        [USER, {**SAID, "content": None}],
        [USER, {**SAID, "content": " \n"}],
        [
            {"role": "user", "content": [{"type": "text", "text": "What is 1 "}, {"type": "text", "text": "plus 1?"}]},
            SAID,
        ],
    ],
)
def test_spellings_of_one_conversation(messages: list[Any]) -> None:
    assert last_hash(messages) == last_hash([USER, SAID])


def test_a_tool_with_its_keys_in_another_order_is_the_same_tool() -> None:
    function = CALCULATOR["function"]
    other = {"function": {key: function[key] for key in reversed(function)}, "type": "function"}
    assert last_hash([USER], tools=(other,)) == last_hash([USER])


@pytest.mark.parametrize(
    ("messages", "changes"),
    [
        ([USER, call('{"expression": "1+2", "base": 10}')], {}),
        ([USER, {**SAID, "content": "Well."}], {}),
        ([{**USER, "content": "What is 1 plus 1? "}, SAID], {}),
        ([{"role": "system", "content": "Be brief."}, USER, SAID], {}),
        ([USER, USER, SAID], {}),
        ([USER, SAID], {"user": b"other"}),
        ([USER, SAID], {"fingerprint": b"g"}),
        ([USER, SAID], {"tools": ()}),
        ([USER, SAID], {"thinking": Thinking.MAX}),
    ],
)
def test_other_conversations(messages: list[Any], changes: dict[str, Any]) -> None:
    assert last_hash(messages, **changes) != last_hash([USER, SAID])


class Keys:
    """A keyspace of plain entries."""

    def __init__(self) -> None:
        self.entries: dict[bytes, Any] = {}

    def get(self, db: int, key: bytes) -> Any:
        return self.entries.get(key)

    def put(self, db: int, key: bytes, entry: Any) -> None:
        self.entries[key] = entry

    def delete(self, db: int, key: bytes) -> bool:
        return self.entries.pop(key, None) is not None


@pytest.fixture
def memory() -> Memory:
    sessions: Any = SimpleNamespace(keyspace=Keys())
    return Memory(sessions)


class Session(SimpleNamespace):
    def _replace(self, **changes: Any) -> Session:
        return Session(**{**vars(self), **changes})


def test_idle_sessions_are_few_and_taken_once(memory: Memory) -> None:
    keys: Any = memory.keyspace
    names = [b"s%d" % number for number in range(IDLE_SESSIONS + 3)]
    for name in names:
        keys.put(0, name, Session(expire_ms=0))
        memory.leave_session(name, name)
    assert set(keys.entries) == set(names[3:])
    assert all(entry.expire_ms for entry in keys.entries.values())
    assert memory.take_session(names[-1]) == names[-1]
    assert memory.take_session(names[-1]).startswith(b"http:session:")
    memory.leave_session(None, names[5])
    assert names[5] not in keys.entries


async def test_an_anchor_that_changes_while_it_is_read_is_not_written_back(memory: Memory) -> None:
    keys: Any = memory.keyspace
    key = b"http:turn:" + b"t".hex().encode()
    old = Entry(EntryType.SNAPSHOT, 5, SnapshotValue(b"old", created_ms=0))
    new = Entry(EntryType.SNAPSHOT, 7, SnapshotValue(b"new", created_ms=0))

    class Store:
        after: Any = None

        def hold(self, _: bytes) -> contextlib.AbstractContextManager[None]:
            return contextlib.nullcontext()

        async def token_ids(self, _: bytes) -> bytes:
            keys.put(0, key, self.after) if self.after is not None else keys.delete(0, key)
            return bytes(8)

    memory.sessions.store = Store()  # type: ignore[assignment]
    keys.put(0, key, old)
    found = await memory.find_turn([(3, b"t")])
    assert found is not None and len(found[2]) == 2
    assert keys.entries == {}  # deleted meanwhile: it stays deleted
    Store.after = new
    keys.put(0, key, old)
    assert await memory.find_turn([(3, b"t")]) is not None
    assert keys.entries[key].value == new.value  # stored anew meanwhile: that is what is kept for longer
    assert keys.entries[key].expire_ms > 7


def test_locks_are_shared_while_someone_has_them(memory: Memory) -> None:
    lock = memory.lock(b"a")
    assert memory.lock(b"b") is not lock
    assert memory.lock(b"a") is lock
    del lock
    gc.collect()
    assert not memory._locks


def test_blocks_are_used_only_for_the_calls_they_issued(memory: Memory) -> None:
    memory.keep_block(["a", "b"], "BLOCK")

    def calls(*ids: str) -> Any:
        message = {"role": "assistant", "tool_calls": [{"id": one} for one in ids]}
        return memory.with_blocks([message])[0]["tool_calls"]

    assert isinstance(calls("a", "b"), SampledBlock)
    assert not isinstance(calls("a"), SampledBlock)
    assert not isinstance(calls("b", "a"), SampledBlock)
    assert not isinstance(calls("unknown"), SampledBlock)


@pytest.fixture
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    port = free_port()
    options = {"http-port": str(port), "maxstore": "300000"}
    with Daemon(tmp_path_factory.mktemp("http") / "data", options) as daemon:
        yield Served(daemon, port)


def test_a_full_store_costs_the_anchor_not_the_answer(small: Served) -> None:
    for number in range(4):
        prompt = f"{number} " + "The sea was calm. " * 100
        reply = small.openai.completions.create(model=MODEL, prompt=prompt, max_tokens=3)
        assert reply.choices[0].finish_reason == "length"
    stored = list(small.redis.scan_iter(match="http:*", _type="snapshot"))
    assert len(stored) < 4
    asked = {"model": MODEL, "prompt": "Then the wind came. " * 100, "max_tokens": 1}
    body = small.http.post("/v1/completions", json=asked, headers={"x-kvdb-snapshot": "wanted"}).json()
    assert "kvdb" not in body  # it could not be stored, so it is not named
    assert not small.redis.exists("wanted")
