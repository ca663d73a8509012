"""The mixed load of crash_loop.py: clients that snapshot, fork, delete, expire, copy, move, set; one that cares.

Each client writes down in its Truth what it asks for before it asks. Prompts are prefixes of a few documents that all
clients share, so that pages have many owners, and deletions and evictions free some of a page's references only.
"""

from __future__ import annotations

import hashlib
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from crash.truth import NEVER, Seen, Truth, Value
from kvdb_tools.cli.reply import ErrorReply, Verbatim
from kvdb_tools.daemon import Caller, CommandError, as_int

LARGE_BYTES = 70_000  # strings of 64 KiB and more are records of their own
EMPTY = b"no tokens"
LONG_MS = 10_000_000  # an expiry that never comes: it only makes a key fit to be evicted
SESSIONS, SNAPSHOTS, STRINGS, HASHES = (
    [b"%s%d" % (kind, n) for n in range(count)] for kind, count in ((b"s", 3), (b"k", 6), (b"t", 4), (b"h", 2))
)


def digest(data: bytes) -> bytes:
    """Of any content."""
    return hashlib.sha256(data).digest()


def hash_digest(fields: Sequence[tuple[bytes, bytes]]) -> bytes:
    """Of a hash, in any order."""
    return digest(repr(sorted(fields)).encode())


class Unexpected(RuntimeError):
    """A reply that a sound daemon does not give."""


@dataclass
class Counts:
    """What all clients together saw. `problems` are lines for the reader."""

    done: Counter[str] = field(default_factory=Counter)
    evicted: int = 0
    checked: int = 0
    problems: list[str] = field(default_factory=list)


@dataclass
class Client:
    """One client with keys that begin with its name."""

    name: bytes
    rng: random.Random
    documents: Sequence[Sequence[int]]
    truth: Truth = field(default_factory=Truth)

    def work(self, call: Caller, counts: Counts, stop: threading.Event) -> None:
        """Commands until the connection breaks."""
        actions: list[tuple[int, Callable[[Caller], None]]] = [
            (6, self.extend), (6, self.snapshot), (2, self.snapshot_in_the_background), (3, self.fork),
            (3, self.delete), (3, self.expire), (2, self.copy), (2, self.rename), (3, self.set_string),
            (2, self.set_hash), (2, self.transaction), (1, self.restore), (1, self.rewind), (1, self.persist),
        ]  # fmt: skip
        weights = [weight for weight, _ in actions]
        try:
            while not stop.is_set():
                _, action = self.rng.choices(actions, weights)[0]
                try:
                    action(call)
                    counts.done[action.__name__] += 1
                except CommandError as error:
                    if not str(error).startswith("NOSPACE"):
                        raise
                    counts.done["nospace"] += 1
                    self.make_room(call)
        except ConnectionError:
            pass
        except (CommandError, Unexpected) as error:
            counts.problems.append(f"unexpected reply to {self.name.decode()}: {error}")

    # Names

    def key(self, names: Sequence[bytes]) -> bytes:
        return self.name + b":" + self.rng.choice(list(names))

    def lasting(self, kind: str) -> bytes | None:
        """A key of a kind that nothing but a command can remove."""
        found = [
            key
            for key, value in self.truth.state.items()
            if value.kind == kind and not value.is_volatile and value.digest != EMPTY
        ]
        return self.rng.choice(found) if found else None

    def held(self, key: bytes) -> Value:
        return self.truth.state[key]

    # Commands

    def prompt(self) -> list[int]:
        document = self.rng.choice(self.documents)
        ids = list(document[: self.rng.randint(1, len(document))])
        return ids + [self.rng.choice(document) for _ in range(self.rng.choice((0, 0, 3)))]

    def learn(self, call: Caller, session: bytes, number: int, tokens: int) -> None:
        """The state that a command has brought a session to is known by its logits."""
        self.truth.acknowledge(number)
        self.truth.state[session] = Value("session", digest(call.data("LOGITS", session, "RAW")), tokens)

    def advance(self, call: Caller, session: bytes, *words: bytes | str | int) -> None:
        number = self.truth.begin({session: Value("session", None)})
        try:
            tokens = as_int(call.map(*words)["tokens"])
        except CommandError:
            self.truth.refuse(number)
            raise
        self.learn(call, session, number, tokens)

    def extend(self, call: Caller) -> None:
        session = self.key(SESSIONS)
        if session in self.truth.state and self.rng.random() < 0.7:
            more = self.prompt()[:40]
            self.advance(call, session, "EXTEND", session, "TOKENS", len(more), *more)
        else:
            ids = self.prompt()
            self.advance(call, session, "PREFILL", session, "TOKENS", len(ids), *ids)

    def session(self, call: Caller) -> bytes:
        while (session := self.lasting("session")) is None:
            self.extend(call)
        return session

    def snapshot_words(self, call: Caller) -> tuple[bytes, Value, list[bytes | str | int]]:
        session, key = self.session(call), self.key(SNAPSHOTS)
        value = replace(self.held(session), kind="snapshot")
        words: list[bytes | str | int] = ["SNAPSHOT", session, key]
        kind = self.rng.random()
        if kind < 0.4:
            value, words = value.expiring(LONG_MS), [*words, "PX", LONG_MS]
        elif kind < 0.5:
            ms = self.rng.randint(20, 600)
            value, words = value.expiring(ms), [*words, "PX", ms]
        elif kind < 0.6:
            words.append("PIN")
        return key, value, words

    def snapshot(self, call: Caller) -> None:
        key, value, words = self.snapshot_words(call)
        with self.truth.doing({key: value}):
            call(*words)

    def snapshot_in_the_background(self, call: Caller) -> None:
        key, value, words = self.snapshot_words(call)
        number = self.truth.begin({key: value})
        try:
            call(*words, "ASYNC")
            for _ in range(self.rng.randint(0, 3)):
                self.set_string(call)
            if call("WAITSNAP", key) is None:
                raise Unexpected("WAITSNAP knows no snapshot")
        except CommandError:
            self.truth.refuse(number)
            raise
        self.truth.acknowledge(number)

    def fork(self, call: Caller) -> None:
        source = self.lasting("snapshot") if self.rng.random() < 0.6 else self.lasting("session")
        dest = self.key(SESSIONS)
        if source is None or source == dest:
            return
        self.delete_key(call, dest)
        with self.truth.doing({dest: replace(self.held(source), kind="session")}):
            call("FORK", source, dest)

    def restore(self, call: Caller) -> None:
        source, session = self.lasting("snapshot"), self.key(SESSIONS)
        if source is None:
            return
        with self.truth.doing({session: replace(self.held(source), kind="session")}):
            call("RESTORE", source, session, "REPLACE")

    def rewind(self, call: Caller) -> None:
        session = self.session(call)
        if (tokens := self.held(session).tokens) > 1:
            self.advance(call, session, "REWIND", session, "TOKENS", self.rng.randint(1, tokens))

    def delete_key(self, call: Caller, key: bytes) -> None:
        with self.truth.doing({key: None}):
            call(self.rng.choice(("DEL", "UNLINK")), key)

    def delete(self, call: Caller) -> None:
        if self.truth.state:
            self.delete_key(call, self.rng.choice(sorted(self.truth.state)))

    def make_room(self, call: Caller) -> None:
        for key in list(self.truth.state)[::2]:
            self.delete_key(call, key)

    def expire(self, call: Caller) -> None:
        key = self.lasting(self.rng.choice(("snapshot", "string", "hash")))
        if key is not None:
            ms = self.rng.choice((self.rng.randint(1, 500), LONG_MS))
            with self.truth.doing({key: self.held(key).expiring(ms)}):
                self.expect(call("PEXPIRE", key, ms), 1)

    def persist(self, call: Caller) -> None:
        volatile = [key for key, value in self.truth.state.items() if value.is_volatile]
        if volatile:
            key = self.rng.choice(volatile)
            number = self.truth.begin({key: self.held(key).expiring(None)})
            if call("PERSIST", key) == 1:
                self.truth.acknowledge(number)
            else:  # it had expired or was evicted
                self.truth.refuse(number)
                if self.held(key).kind != "snapshot" and time.time() < self.held(key).since:
                    raise Unexpected(f"PERSIST finds no key {key!r}")
                self.truth.state.pop(key)

    def copy(self, call: Caller) -> None:
        kind, names = self.rng.choice((("snapshot", SNAPSHOTS), ("string", STRINGS), ("hash", HASHES)))
        source, dest = self.lasting(kind), self.key(names)
        if source is not None and source != dest:
            with self.truth.doing({dest: self.held(source)}):
                self.expect(call("COPY", source, dest, "REPLACE"), 1)

    def rename(self, call: Caller) -> None:
        kinds = (("snapshot", SNAPSHOTS), ("string", STRINGS), ("hash", HASHES), ("session", SESSIONS))
        kind, names = self.rng.choice(kinds)
        source, dest = self.lasting(kind), self.key(names)
        if source is not None and source != dest:
            with self.truth.doing({source: None, dest: self.held(source)}):
                self.expect(call("RENAME", source, dest), "OK")

    def string(self) -> bytes:
        n_bytes = self.rng.choice((10, 300, 5000, LARGE_BYTES, 2 * LARGE_BYTES))
        return self.rng.randbytes(16) * (n_bytes // 16 + 1)

    def set_string(self, call: Caller) -> None:
        key, data = self.key(STRINGS), self.string()
        with self.truth.doing({key: Value("string", digest(data))}):
            call("SET", key, data)

    def set_hash(self, call: Caller) -> None:
        key, fields = self.key(HASHES), [(b"f%d" % n, self.rng.randbytes(20)) for n in range(self.rng.randint(1, 20))]
        # One command that replaces the whole hash does not exist: a transaction is one effect too.
        with self.truth.doing({key: Value("hash", hash_digest(fields))}):
            self.execute(call, [("DEL", key), ("HSET", key, *(part for pair in fields for part in pair))])

    def transaction(self, call: Caller) -> None:
        first, second = self.rng.sample(STRINGS, 2)
        gone = self.key(SNAPSHOTS + HASHES)
        one, two = self.string(), self.string()
        first, second = self.name + b":" + first, self.name + b":" + second
        effect = {first: Value("string", digest(one)), second: Value("string", digest(two)), gone: None}
        with self.truth.doing(effect):
            self.execute(call, [("SET", first, one), ("DEL", gone), ("SET", second, two)])

    def execute(self, call: Caller, commands: Sequence[Sequence[bytes | str | int]]) -> None:
        call("MULTI")
        for words in commands:
            self.expect(call(*words), "QUEUED")
        for reply in call.list("EXEC"):
            if isinstance(reply, ErrorReply):
                raise Unexpected(f"EXEC: {reply.text}")

    @staticmethod
    def expect(reply: object, wanted: object) -> None:
        if reply != wanted:
            raise Unexpected(f"{reply!r} instead of {wanted!r}")

    # After the crash

    def look(self, call: Caller) -> dict[bytes, Seen]:
        """What every key of this client holds now."""
        found = {}
        cursor: object = b"0"
        keys: set[bytes] = set()
        while True:
            page = call.list("SCAN", cursor, "MATCH", self.name + b":*", "COUNT", 1000)  # type: ignore[arg-type]
            cursor = page[0]
            keys |= set(page[1])  # type: ignore[call-overload]
            if cursor == b"0":
                break
        for key in sorted(keys):
            began = time.time()
            expires_ms = call.number("PEXPIRETIME", key)
            try:
                kind, content = read(call, key)
            except CommandError as error:
                if "no such" in str(error):
                    continue  # it expired between the two commands
                kind, content = "error", str(error).encode()
                if "the session is empty" in str(error):
                    kind, content = "session", EMPTY  # a PREFILL that was cut off leaves a prefix of its prompt
            if kind != "none":
                found[key] = Seen(kind, content, expires_ms / 1000 if expires_ms > 0 else NEVER, began)
        return found


def read(call: Caller, key: bytes) -> tuple[str, bytes]:
    """(type, digest of the content) of a key."""
    kind = str(call("TYPE", key))
    if kind == "string":
        data = call("GET", key)
        return ("none", b"") if data is None else (kind, digest(data))  # type: ignore[arg-type]
    if kind == "hash":
        pairs = [(name.encode(), value) for name, value in call.map("HGETALL", key).items()]
        return kind, hash_digest(pairs)  # type: ignore[arg-type]
    if kind in ("snapshot", "session"):
        return kind, digest(call.data("LOGITS", key, "RAW"))
    return kind, b""


class Carer(Client):
    """A client that compacts, collects, backs up, verifies, exports and imports while the others work."""

    def work(self, call: Caller, counts: Counts, stop: threading.Event) -> None:
        """Commands until the connection breaks."""
        try:
            while not stop.is_set():
                self.set_string(call)
                kind = self.rng.choice(("compact", "gc", "backup", "verify", "exchange", "exchange"))
                if kind == "exchange":
                    self.exchange(call)
                elif kind == "backup":
                    call("STORE", "BACKUP", "backup")
                elif kind == "verify":
                    found = call.map("STORE", "VERIFY", "DEEP")
                    if found["damaged"]:
                        raise Unexpected(f"STORE VERIFY: {found['findings']}")
                else:
                    call("STORE", kind)
                counts.done[kind] += 1
                info = call("INFO", "stats")
                assert isinstance(info, Verbatim)
                evicted = int(info.text.split(b"evicted_keys:")[1].split()[0])
                counts.evicted += evicted - self.evicted
                self.evicted = evicted
        except ConnectionError:
            pass
        except (CommandError, Unexpected) as error:
            if not str(error).startswith("NOSPACE"):
                counts.problems.append(f"unexpected reply to {self.name.decode()}: {error}")
        finally:
            self.evicted = 0  # the daemon counts from its start

    evicted = 0

    def exchange(self, call: Caller) -> None:
        """A snapshot leaves as an archive and comes back under another name."""
        session, key = self.session(call), self.name + b":k0"
        with self.truth.doing({key: replace(self.held(session), kind="snapshot")}):
            call("SNAPSHOT", session, key)
        call("STORE", "EXPORT", key, "FILE", "archive")
        again = self.key(SNAPSHOTS[1:])
        with self.truth.doing({again: self.held(key)}):
            call("STORE", "IMPORT", again, "FILE", "archive")
