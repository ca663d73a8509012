"""What the gateway remembers between the requests of stateless clients. All but the idle sessions is in the keyspace.

    http:turn:HASH      snapshot  the state at the end of an assistant turn, under the hash of what a client has seen
    http:prompt:HASH    snapshot  a state within a prompt: after its system part, every few thousand tokens, at its end
    http:text:LEN:HASH  snapshot  the end of a raw completion, under the length and hash of its text, prompt included
    http:call:ID        string    the tool block that issued this call id, exactly as sampled
    http:response:ID    string    a response of /v1/responses, for previous_response_id
    http:session:NAME   session   where an answer is being made, or was and may go on

Everything expires after `KEEP_MS` unless it is used again, so it is what volatile-* policies may evict. What only a
retry can use, a turn that another turn followed and the end of an answered prompt, expires after `RETRY_KEEP_MS`.
The hash of a turn covers what decides the prompt, in canonical form: user, model, tools, system text and the messages
without reasoning; JSON with sorted keys. So a client that drops the reasoning or writes JSON keys in another order,
which it never saw as text, still means the same turn, and gets the very timeline that was sampled.
"""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import time
from array import array
from bisect import bisect_left, bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, cast
from weakref import WeakValueDictionary

import msgpack
from blake3 import blake3

from kvdb import storing
from kvdb.errors import KvdbError, SnapshotGoneError
from kvdb.http.ask import Ask, Message
from kvdb.session import Model, ids_array
from kvdb.sessions import Sessions
from kvdb.store.entries import Entry, EntryType, HeldString, SnapshotValue, StringRef
from kvdb.store.rows import Reason
from kvdb_engine.chat import SampledBlock, Thinking

log = logging.getLogger("kvdb.http")

DB = 0
KEEP_MS = 7 * 24 * 3600 * 1000
RETRY_KEEP_MS = 3600 * 1000
SESSION_KEEP_MS = 3600 * 1000
IDLE_SESSIONS = 32
_SYSTEM = ("system", "developer")
_LOOKUPS = 1000  # of keys, before other clients get a turn


def now_ms() -> int:
    """The time, for expiries."""
    return int(time.time() * 1e3)


# -- what a conversation is, whatever its spelling ---------------------------------------------------------------------


def _text_key(length: int, digest: bytes) -> bytes:
    return b"http:text:%d:%b" % (length, digest.hex().encode())


def _prefix_hashes(head: bytes, text: bytes, lengths: Sequence[int]) -> list[bytes]:
    """The hash of `head` and the first so many bytes of `text`, for each of the ascending lengths."""
    hasher, hashes, at = blake3(head), [], 0
    for length in lengths:
        hasher.update(text[at:length])
        hashes.append(hasher.digest())
        at = length
    return hashes


def _text(content: Any) -> str:
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        return "".join(part if isinstance(part, str) else str(part.get("text", "")) for part in content)
    return ""


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))


def _arguments(value: Any) -> str:
    try:
        return _canonical(json.loads(value) if isinstance(value, str) else value)
    except ValueError:
        return str(value)


def _message(message: Message) -> list[Any]:
    role = message.get("role")
    if role != "assistant":
        return [role if role != "function" else "tool", _text(message.get("content"))]
    calls = [
        [call.get("function", call).get("name"), _arguments(call.get("function", call).get("arguments"))]
        for call in message.get("tool_calls") or ()
    ]
    # Clients trim what they show; the white space around an answer carries no meaning that they could send back.
    return [role, _text(message.get("content")).strip(), calls]


def next_hash(current: bytes, message: Message) -> bytes:
    """The hash of a conversation that goes on with this message, which is no system message."""
    return blake3(current + msgpack.packb(_message(message))).digest()


def turn_hashes(ask: Ask, messages: Sequence[Message]) -> list[bytes]:
    """The hash of the conversation after each message."""
    system = "\n\n".join(_text(message.get("content")) for message in messages if message.get("role") in _SYSTEM)
    tools = [tool.get("function", tool) if isinstance(tool, dict) else tool for tool in ask.tools]
    head = [ask.user.name, ask.model.info.fingerprint, ask.thinking is Thinking.MAX, system, _canonical(tools)]
    current = blake3(msgpack.packb(head)).digest()
    hashes = []
    for message in messages:
        if message.get("role") not in _SYSTEM:
            current = next_hash(current, message)
        hashes.append(current)
    return hashes


# -- the memory --------------------------------------------------------------------------------------------------------


class Memory:
    """Remembers in the keyspace. One for each gateway."""

    def __init__(self, sessions: Sessions) -> None:
        self.sessions = sessions
        self.keyspace = sessions.keyspace
        self._lengths: list[int] = []  # of the texts that have an anchor, ascending; some may have expired
        self._idle: OrderedDict[bytes, bytes] = OrderedDict()  # turn hash -> session key
        # A lock lives as long as someone holds it or waits for it.
        self._locks: WeakValueDictionary[bytes, asyncio.Lock] = WeakValueDictionary()

    async def wake(self) -> None:
        """At the start of a daemon: learn what is there, and drop the sessions that nobody can go on with."""
        cursor, lengths = 0, set()
        while True:
            cursor, keys = self.keyspace.scan(DB, cursor, 1000)
            for key in keys:
                if key.startswith(b"http:text:"):
                    lengths.add(int(key.split(b":")[2]))
                elif key.startswith(b"http:session:"):
                    self.keyspace.delete(DB, key)
            if not cursor:
                self._lengths = sorted(lengths)
                return
            await asyncio.sleep(0)  # the other port is open already

    # anchors

    async def find_text(self, user: bytes, text: bytes) -> tuple[int, array[int]] | None:
        """The longest remembered text that `text` begins with: its bytes and its timeline's token ids.

        A text that went on is tokenised otherwise at the joint than the tokens that were sampled, so looking for token
        ids alone would miss it.
        """
        lengths = self._lengths[: bisect_right(self._lengths, len(text))]
        hashes = await asyncio.to_thread(_prefix_hashes, user + b"\0", text, lengths)
        for number, (length, digest) in enumerate(zip(reversed(lengths), reversed(hashes), strict=True)):
            if number % _LOOKUPS == _LOOKUPS - 1:
                await asyncio.sleep(0)
            ids = await self._anchored(_text_key(length, digest))
            if ids is not None:
                return length, ids
        return None

    async def keep_text(self, user: bytes, text: bytes, name: bytes) -> None:
        """Anchor the end of a raw completion."""
        digest = blake3(user + b"\0" + text).digest()
        if await self.anchor(_text_key(len(text), digest), name, Reason.CONTINUED):
            at = bisect_left(self._lengths, len(text))
            if self._lengths[at : at + 1] != [len(text)]:
                self._lengths.insert(at, len(text))

    async def _anchored(self, key: bytes) -> array[int] | None:
        """The token ids of the anchor under a key, which is now kept for longer; None when there is none."""
        entry = self.keyspace.get(DB, key)
        if entry is None or not isinstance(entry.value, SnapshotValue):
            return None
        try:
            with self.sessions.store.hold(entry.value.id):
                ids = ids_array(await self.sessions.store.token_ids(entry.value.id))
        except SnapshotGoneError:
            return None
        except KvdbError as error:
            log.warning("anchor %s is not used: %s", key.decode(errors="replace"), error.wire)
            return None
        # The key may have been deleted, evicted or stored anew while the ids were read: only what is there is kept.
        self._keep_for(key, KEEP_MS)
        return ids

    def _keep_for(self, key: bytes, keep_ms: int) -> None:
        """Let a key, if it is still there, expire so long from now."""
        entry = self.keyspace.get(DB, key)
        if entry is not None:
            self.keyspace.put(DB, key, entry._replace(expire_ms=now_ms() + keep_ms))

    async def find_turn(self, hashes: Sequence[tuple[int, bytes]]) -> tuple[int, bytes, array[int]] | None:
        """The last remembered turn among (number, hash) pairs, latest first: its number, hash and token ids."""
        for number, turn in hashes:
            ids = await self._anchored(b"http:turn:" + turn.hex().encode())
            if ids is not None:
                return number, turn, ids
        return None

    async def keep_turn(self, turn: bytes, name: bytes) -> bool:
        """Anchor the end of a turn; durable when this returns. False when it could not be stored, which is no error."""
        return await self.anchor(b"http:turn:" + turn.hex().encode(), name, Reason.CONTINUED)

    def supersede(self, turn: bytes) -> None:
        """Another turn has followed this one: from now on only a retry can use its anchor."""
        self._keep_for(b"http:turn:" + turn.hex().encode(), RETRY_KEEP_MS)

    async def keep_prompt(self, ids: array[int], name: bytes, reason: Reason, keep_ms: int) -> bool:
        """Anchor a state within a prompt."""
        key = b"http:prompt:" + blake3(ids.tobytes()).hexdigest(16).encode()
        return await self.anchor(key, name, reason, keep_ms)

    async def anchor(self, key: bytes, name: bytes, reason: Reason, keep_ms: int = KEEP_MS) -> bool:
        """Snapshot a session under a key. A full disk costs the anchor, never the answer."""

        def make_entry(snapshot_id: bytes) -> Entry:
            expire_ms = now_ms() + keep_ms if keep_ms else 0
            return Entry(EntryType.SNAPSHOT, expire_ms, SnapshotValue(snapshot_id, created_ms=now_ms()))

        try:
            await storing.snapshot(self.sessions, DB, name, key, make_entry, lambda: True, reason)
        except KvdbError as error:
            log.warning("anchor %s was not stored: %s", key.decode(errors="replace"), error.wire)
            return False
        return True

    # tool blocks

    def _put(self, key: str, value: Any) -> None:
        entry = Entry(EntryType.STRING, now_ms() + KEEP_MS, msgpack.packb(value))
        self.keyspace.put(DB, key.encode(), entry)

    def _get(self, key: str) -> Any:
        entry = self.keyspace.get(DB, key.encode())
        if entry is None or entry.type is not EntryType.STRING:
            return None
        value = entry.value
        if isinstance(value, StringRef | HeldString):
            value = self.sessions.store.strings.read(value)
        return msgpack.unpackb(cast(bytes, value))

    def keep_block(self, call_ids: Sequence[str], block: str) -> None:
        """Remember the block that issued these calls."""
        for call_id in call_ids:
            self._put(f"http:call:{call_id}", [list(call_ids), block])

    def with_blocks(self, messages: Sequence[Message]) -> list[Message]:
        """The messages with each assistant's tool calls as they were sampled, where that is known."""
        result = []
        for message in messages:
            calls = message.get("tool_calls") if message.get("role") == "assistant" else None
            ids = [call.get("id") for call in calls] if calls else []
            found = self._get(f"http:call:{ids[0]}") if ids and isinstance(ids[0], str) else None
            result.append({**message, "tool_calls": SampledBlock(found[1])} if found and found[0] == ids else message)
        return result

    # responses

    def keep_response(self, response_id: str, user: bytes, value: dict[str, Any]) -> None:
        """Store a response."""
        self._put(f"http:response:{response_id}", [user, value])

    def response(self, response_id: str, user: bytes) -> dict[str, Any] | None:
        """A stored response of this user."""
        found = self._get(f"http:response:{response_id}")
        return found[1] if found is not None and found[0] == user else None

    def drop_response(self, response_id: str) -> None:
        """Forget a response."""
        self.keyspace.delete(DB, f"http:response:{response_id}".encode())

    # sessions

    def take_session(self, turn: bytes | None) -> bytes:
        """The idle session that stands at this turn, now the caller's alone; a new name when there is none."""
        name = self._idle.pop(turn, None) if turn is not None else None
        return name if name is not None else b"http:session:" + secrets.token_hex(12).encode()

    def leave_session(self, turn: bytes | None, name: bytes) -> None:
        """The caller is done with a session that stands at this turn, or at none that can go on."""
        found = self.keyspace.get(DB, name)
        if turn is None or found is None:
            self.keyspace.delete(DB, name)
            return
        self.keyspace.put(DB, name, found._replace(expire_ms=now_ms() + SESSION_KEEP_MS))
        before = self._idle.pop(turn, None)
        if before is not None and before != name:
            self.keyspace.delete(DB, before)
        self._idle[turn] = name
        while len(self._idle) > IDLE_SESSIONS:
            self.keyspace.delete(DB, self._idle.popitem(last=False)[1])

    def lock(self, name: bytes) -> asyncio.Lock:
        """The lock of a named session: answers in it are made one after the other."""
        return self._locks.setdefault(name, asyncio.Lock())

    def model_of(self, name: str | None) -> Model:
        """A served model."""
        return self.sessions.model(name)
