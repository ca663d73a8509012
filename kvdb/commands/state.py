"""The commands that act on states: PREFILL to SNAPDIFF. Parsing and reply shapes only; sessions.py does the work."""

from __future__ import annotations

import asyncio
import codecs
import json
import logging
import secrets
import time
from array import array
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from kvdb import branches, storing, timelines
from kvdb.commands import parse
from kvdb.commands.arguments import Arguments, integer, unknown_option
from kvdb.commands.registry import handler
from kvdb.errors import CancelledError, KvdbError
from kvdb.session import Model, ids_array
from kvdb.store.entries import Entry, EntryType, SessionValue, SnapshotValue
from kvdb_engine.chat import ChatError, chat_ids
from kvdb_engine.sampling import Sampling, log_probabilities_of, sample
from kvdb_engine.sampling import top as most_likely
from kvdb_protocol.replies import Reply

if TYPE_CHECKING:
    from kvdb.net.client import Client
    from kvdb.store.records import SnapshotRecord

log = logging.getLogger("kvdb.commands")

MAX_TOKENS_DEFAULT = 128
SAMPLE_COUNT_MAX = 100_000
PROGRESS_INTERVAL_S = 0.1
LONG_PROMPT_BYTES = 16 << 10  # some 10 ms of tokenising
STOP_BYTES_MAX = 1024
LINEAGE_BATCH = 64  # ancestors looked up before other clients have their turn
DRAWS_AT_ONCE = 16  # up to 17 ms each, where a whole vocabulary is sorted


# -- prompts -----------------------------------------------------------------------------------------------------------


def read_prompt(args: Arguments, kind: bytes) -> tuple[str, Any]:
    """Read what follows TEXT, TOKENS, IDS or CHAT; ids come back as an array, text and messages as they are."""
    if kind == b"TEXT":
        return "text", args.text()
    if kind == b"TOKENS":
        count = args.integer("the token count", 0, 1 << 31)
        raw = args.take(count)
        try:
            return "ids", array("I", map(int, raw))
        except (ValueError, OverflowError):
            raise KvdbError("token ids must be integers between 0 and 4294967295") from None
    if kind == b"IDS":
        data = args.next()
        if len(data) % 4:
            raise KvdbError(
                f"IDS takes token ids as 4 bytes each, little-endian; {len(data)} bytes are no whole number"
            )
        return "ids", ids_array(data)
    try:
        return "chat", json.loads(args.next())
    except ValueError as error:
        raise KvdbError(f"CHAT takes OpenAI messages as JSON: {error}") from None


async def prompt_ids(model: Model, prompt: tuple[str, Any], raw: list[bytes], *, is_start: bool) -> array[int]:
    """Token ids of a prompt. raw: the arguments it came from.

    A megabyte of text takes a second to tokenise: long prompts go to a thread, and other clients do not wait.
    """
    if prompt[0] == "ids" or sum(map(len, raw)) < LONG_PROMPT_BYTES:
        return ids_of(model, prompt, is_start=is_start)
    return await asyncio.to_thread(ids_of, model, prompt, is_start=is_start)


def ids_of(model: Model, prompt: tuple[str, Any], *, is_start: bool) -> array[int]:
    """Token ids of a prompt. Text and chat at the start of a timeline begin with the begin-of-sentence token."""
    kind, value = prompt
    tokenizer = model.info.tokenizer
    if kind == "ids":
        ids: array[int] = value
        return ids
    if kind == "text":
        head = [tokenizer.bos_id] if is_start and tokenizer.bos_id is not None else []
        return array("I", head + tokenizer.encode(value))
    try:
        ids = array("I", chat_ids(tokenizer, value))
    except ChatError as error:
        raise KvdbError(f"CHAT: {error}") from None
    # A rendered conversation begins with the begin-of-sentence token, which a continued timeline already has.
    return ids if is_start or not ids or ids[0] != tokenizer.bos_id else ids[1:]


PROMPT_WORDS = (b"TEXT", b"TOKENS", b"IDS", b"CHAT")


def parse_prompt(client: Client, raw: list[bytes], options: tuple[bytes, ...]) -> tuple[Any, dict[bytes, bytes]]:
    """Parse `TEXT t | TOKENS n id... | IDS bytes | CHAT json` and the word-valued options allowed after it."""
    args = Arguments(raw)
    prompt = None
    found: dict[bytes, bytes] = {}
    while args:
        word = args.word()
        if word in PROMPT_WORDS and prompt is None:
            prompt = read_prompt(args, word)
        elif word in options and word not in found:
            found[word] = args.next()
        else:
            raise unknown_option(word)
    if prompt is None:
        raise KvdbError("give the tokens as TEXT text, TOKENS count id ..., IDS bytes, or CHAT json")
    return prompt, found


class Progress:
    """Pushes `progress session done total` to a RESP3 client, not more often than people can read."""

    def __init__(self, client: Client, name: bytes) -> None:
        self.client = client
        self.name = name
        self.last = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        """Called by the session after each chunk."""
        now = time.monotonic()
        if self.client.resp == 3 and (now - self.last >= PROGRESS_INTERVAL_S or done == total):
            self.last = now
            self.client.push("progress", self.name, done, total)


@asynccontextmanager
async def deadline(ms: int) -> AsyncIterator[None]:
    """Cancel the work inside after `ms` milliseconds, at its next chunk; 0 for never."""
    try:
        async with asyncio.timeout(ms / 1e3 if ms else None):
            yield
    except TimeoutError:
        raise CancelledError(f"the deadline of {ms} ms passed; the session stays at its last complete token") from None


def read_deadline(options: dict[bytes, bytes]) -> int:
    """The DEADLINE option in milliseconds, 0 without it."""
    return integer(options.get(b"DEADLINE", b"0"), "DEADLINE", 0, 1 << 40)


@handler("PREFILL")
async def prefill(client: Client, raw: list[bytes]) -> Reply:
    """PREFILL session TEXT t | TOKENS n id... | CHAT json [MODEL m] [REUSE YES|NO|ONLY] [DEADLINE ms]."""
    prompt, options = parse_prompt(client, raw[1:], (b"MODEL", b"REUSE", b"DEADLINE"))
    reuse = options.get(b"REUSE", b"YES").upper().decode(errors="replace")
    if reuse not in ("YES", "NO", "ONLY"):
        raise KvdbError("REUSE must be YES, NO or ONLY")
    sessions = client.server.sessions
    name = options[b"MODEL"].decode(errors="replace") if b"MODEL" in options else None
    model = sessions.model_for(client.db, raw[0], name)
    ids = await prompt_ids(model, prompt, raw, is_start=True)
    async with deadline(read_deadline(options)):
        reply = await timelines.prefill(sessions, client.db, raw[0], model, ids, reuse, Progress(client, raw[0]))
    client.server.changed(client.db, raw[0], "prefill", "g")
    return reply


@handler("EXTEND")
async def extend(client: Client, raw: list[bytes]) -> Reply:
    """EXTEND session TEXT t | TOKENS n id... | CHAT json [DEADLINE ms]."""
    prompt, options = parse_prompt(client, raw[1:], (b"DEADLINE",))
    sessions = client.server.sessions
    session = await sessions.get(client.db, raw[0])
    ids = await prompt_ids(session.model, prompt, raw, is_start=False)
    async with deadline(read_deadline(options)):
        reply = await timelines.extend(sessions, client.db, raw[0], ids, Progress(client, raw[0]))
    client.server.changed(client.db, raw[0], "extend", "g")
    return reply


# -- sampling ----------------------------------------------------------------------------------------------------------


def read_sampling(args: Arguments, word: bytes, fields: dict[str, Any]) -> bool:
    """Read one sampling option; False when `word` is none."""
    match word:
        case b"TEMPERATURE":
            fields["temperature"] = args.number("TEMPERATURE", 0, 100)
        case b"TOPK":
            fields["top_k"] = args.integer("TOPK", 0, 1 << 31)
        case b"TOPP":
            fields["top_p"] = args.number("TOPP", 1e-9, 1)
        case b"MINP":
            fields["min_p"] = args.number("MINP", 0, 1)
        case b"SEED":
            fields["seed"] = args.integer("SEED", 0, (1 << 64) - 1)
        case _:
            return False
    return True


@handler("GENERATE")
async def generate(client: Client, raw: list[bytes]) -> Reply:
    """GENERATE session [MAXTOKENS n] [sampling] [STOP n s...] [STREAM] [DEADLINE ms]."""
    args = Arguments(raw)
    name = args.next()
    fields: dict[str, Any] = {}
    stops: list[bytes] = []
    max_tokens, stream, limit_ms = MAX_TOKENS_DEFAULT, False, 0
    while args:
        word = args.word()
        if word == b"MAXTOKENS":
            max_tokens = args.integer("MAXTOKENS", 1, 1 << 31)
        elif word == b"STOP":
            stops = args.take(args.integer("the number of stop strings", 0, 64))
            if not all(0 < len(stop) <= STOP_BYTES_MAX for stop in stops):
                raise KvdbError(f"a stop string is empty or longer than {STOP_BYTES_MAX} bytes")
        elif word == b"STREAM":
            stream = True
        elif word == b"DEADLINE":
            limit_ms = args.integer("DEADLINE", 0, 1 << 40)
        elif not read_sampling(args, word, fields):
            raise unknown_option(word)
    sampling = Sampling(**{"seed": secrets.randbits(63), **fields})
    sessions = client.server.sessions
    session = await sessions.get(client.db, name)
    on_token = stream_to(client, name, session.model) if stream else None
    async with deadline(limit_ms):
        reply = await timelines.generate(sessions, client.db, name, max_tokens, sampling, stops, on_token)
    client.server.changed(client.db, name, "generate", "g")
    return reply


def stream_to(client: Client, name: bytes, model: Model) -> Any:
    """Send each token as it comes: a push frame in RESP3, a message on `__stream__:session` in RESP2.

    Text is held back until it is whole UTF-8, so a frame may carry an empty text and the next one two characters.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    tokenizer = model.info.tokenizer

    def send(token: int) -> None:
        text = decoder.decode(tokenizer.token_bytes(token)).encode()
        if client.resp == 3:
            client.push("generate", name, token, text)
        else:
            client.server.pubsub.publish(b"__stream__:" + name, text)

    return send


@handler("SAMPLE")
async def sample_command(client: Client, raw: list[bytes]) -> Reply:
    """SAMPLE key [COUNT n] [sampling]: draws i of a seed s is what GENERATE with SEED s+i would take first."""
    args = Arguments(raw)
    key = args.next()
    fields: dict[str, Any] = {}
    count = 1
    while args:
        word = args.word()
        if word == b"COUNT":
            count = args.integer("COUNT", 1, SAMPLE_COUNT_MAX)
        elif not read_sampling(args, word, fields):
            raise unknown_option(word)
    info, position, data = await branches.logits(client.server.sessions, client.db, key)
    logits = np.frombuffer(data, dtype="<f4")
    seed = fields.pop("seed", secrets.randbits(63))

    def draw(first: int) -> list[int]:
        seeds = range(seed + first, seed + min(first + DRAWS_AT_ONCE, count))
        return [sample(logits, position, Sampling(**fields, seed=one & ((1 << 64) - 1))) for one in seeds]

    drawn: list[int] = []
    while len(drawn) < count:
        # In a thread, since a large COUNT must not hold up the other clients; in steps, since the client may leave.
        drawn += await asyncio.to_thread(draw, len(drawn)) if count > 1 else draw(0)
    text = info.tokenizer.token_bytes if info else lambda token: None
    logprobs = log_probabilities_of(logits, drawn).tolist()
    return [
        {"id": token, "text": text(token), "logprob": logprob} for token, logprob in zip(drawn, logprobs, strict=True)
    ]


@handler("LOGITS")
async def logits_command(client: Client, raw: list[bytes]) -> Reply:
    """LOGITS key [TOP k | RAW]: the best k (default 20) as id, text, logit, logprob; or all as f32 bytes."""
    args = Arguments(raw)
    key = args.next()
    top, is_raw = 20, False
    while args:
        word = args.word()
        if word == b"TOP":
            top = args.integer("TOP", 1, 1 << 20)
        elif word == b"RAW":
            is_raw = True
        else:
            raise unknown_option(word)
    info, _, data = await branches.logits(client.server.sessions, client.db, key)
    if is_raw:
        return data
    logits = np.frombuffer(data, dtype="<f4")
    return [
        {"id": token, "text": info.tokenizer.token_bytes(token) if info else None, "logit": logit, "logprob": logprob}
        for token, logit, logprob in most_likely(logits, top)
    ]


# -- storing and going back --------------------------------------------------------------------------------------------


@handler("SNAPSHOT")
async def snapshot(client: Client, raw: list[bytes]) -> Reply:
    """SNAPSHOT session key [META n f v...] [EX s | PX ms] [NX | XX] [PIN] [ASYNC]."""
    args = Arguments(raw)
    name, key = args.next(), args.next()
    meta: dict[bytes, bytes] = {}
    expire_ms, condition, pinned, is_async = 0, b"", False, False
    while args:
        word = args.word()
        if word == b"META":
            pairs = args.take(2 * args.integer("the number of META fields", 0, 1 << 20))
            meta = dict(zip(pairs[::2], pairs[1::2], strict=True))
        elif word in (b"EX", b"PX") and not expire_ms:
            expire_ms = parse.expiry_ms(word, args.next(), "snapshot")
        elif word in (b"NX", b"XX") and not condition:
            condition = word
        elif word == b"PIN":
            pinned = True
        elif word == b"ASYNC":
            is_async = True
        else:
            raise unknown_option(word)
    server, db = client.server, client.db

    def value(snapshot_id: bytes) -> Entry:
        return Entry(EntryType.SNAPSHOT, expire_ms, SnapshotValue(snapshot_id, meta, pinned, int(time.time() * 1e3)))

    def guard() -> bool:
        # A snapshot on its way to the key counts as there: of two SNAPSHOT ... NX at once, one is too late.
        exists = server.keyspace.get(db, key) is not None or (db, key) in server.sessions.being_stored
        return not condition or exists == (condition == b"XX")

    async def work() -> storing.Reply | None:
        reply = await storing.snapshot(server.sessions, db, name, key, value, guard)
        if reply is not None:
            server.changed(db, key, "snapshot", "g")
        return reply

    if not is_async:
        return await work()
    session = await server.sessions.get(db, name)
    server.background.start((db, key), work())
    started: Reply = {"tokens": session.n_tokens, "async": 1}
    return started


@handler("WAITSNAP")
async def wait_snapshot(client: Client, raw: list[bytes]) -> Reply:
    """WAITSNAP key: wait for SNAPSHOT ... ASYNC under this key; its reply, or its error; nil when none was started."""
    return await client.server.background.wait((client.db, raw[0]))


@handler("RESTORE")
async def restore(client: Client, raw: list[bytes]) -> Reply:
    """RESTORE key session [REPLACE]."""
    if len(raw) == 3 and raw[2].upper() != b"REPLACE":
        raise unknown_option(raw[2])
    if len(raw) > 3:
        raise KvdbError("syntax error")
    server = client.server
    reply = await branches.restore(server.sessions, client.db, raw[0], raw[1], replace=len(raw) == 3)
    server.changed(client.db, raw[1], "restore", "g")
    return reply


@handler("FORK")
async def fork(client: Client, raw: list[bytes]) -> Reply:
    """FORK source dest [dest ...]."""
    count = await branches.fork(client.server.sessions, client.db, raw[0], raw[1:])
    for dest in raw[1:]:
        client.server.changed(client.db, dest, "fork", "g")
    return count


@handler("REWIND")
async def rewind(client: Client, raw: list[bytes]) -> Reply:
    """REWIND session TO key | TOKENS n | STEPS n."""
    args = Arguments(raw)
    name, word = args.next(), args.word()
    sessions = client.server.sessions
    if word == b"TO":
        work = branches.rewind_to(sessions, client.db, name, args.next())
    elif word == b"TOKENS":
        work = branches.rewind_tokens(sessions, client.db, name, args.integer("TOKENS", 1, 1 << 31))
    elif word == b"STEPS":
        work = branches.rewind_steps(sessions, client.db, name, args.integer("STEPS", 1, 1 << 31))
    else:
        raise unknown_option(word)
    if args:
        work.close()
        raise KvdbError("syntax error")
    reply = await work
    client.server.changed(client.db, name, "rewind", "g")
    return reply


# -- looking -----------------------------------------------------------------------------------------------------------


@handler("PREFIX")
async def prefix(client: Client, raw: list[bytes]) -> Reply:
    """PREFIX TEXT t | TOKENS n id... | CHAT json [MODEL m]: the longest stored prefix, or nil."""
    prompt, options = parse_prompt(client, raw, (b"MODEL",))
    server = client.server
    model = server.sessions.model(options[b"MODEL"].decode(errors="replace") if b"MODEL" in options else None)
    ids = await prompt_ids(model, prompt, raw, is_start=True)
    server.sessions.check_ids(model, ids)
    found = await server.store.longest_prefix(
        model.info.family, model.info.fingerprint, ids.tobytes(), cross_quant=server.sessions.cross_quant
    )
    if found is None:
        return None
    return {
        "key": key_of(client, found.snapshot_id),
        "id": found.snapshot_id.hex(),
        "tokens": found.n_tokens,
        "of": len(ids),
        "text_bytes": model.info.tokenizer.text_bytes(ids[: found.n_tokens]),
        "same_quant": int(found.same_quant),
    }


def key_of(client: Client, snapshot_id: bytes) -> bytes | None:
    """The oldest key of the client's database that holds the snapshot. A session whose base it is does not count."""
    found = []
    for db, key in client.server.store.keys_of(snapshot_id):
        entry = client.server.keyspace.get(db, key) if db == client.db else None
        # What is committed may be changed since: the keyspace decides.
        if entry is not None and isinstance(entry.value, SnapshotValue) and entry.value.id == snapshot_id:
            found.append((entry.value.created_ms, key))
    return min(found)[1] if found else None


def snapshot_map(client: Client, record: SnapshotRecord) -> dict[str, Reply]:
    """What LINEAGE says of one snapshot."""
    return {
        "id": record.id.hex(),
        "key": key_of(client, record.id),
        "tokens": record.n_tokens,
        "reason": record.reason.name.lower(),
        "created": record.created_ms,
    }


@handler("LINEAGE")
async def lineage(client: Client, raw: list[bytes]) -> Reply:
    """LINEAGE key: the snapshot (or the session's base) and its stored ancestors, newest first."""
    server = client.server
    found = server.keyspace.get(client.db, raw[0])
    if found is not None and isinstance(found.value, SessionValue):
        start = found.value.base
    else:
        start = server.sessions.snapshot_value(client.db, raw[0]).id
    shown: list[dict[str, Reply]] = []
    while start is not None and (records := server.store.lineage(start, LINEAGE_BATCH)):
        shown += [snapshot_map(client, record) for record in records]
        start = records[-1].parent
        await asyncio.sleep(0)
    return shown


@handler("SNAPINFO")
async def snapinfo(client: Client, raw: list[bytes]) -> Reply:
    """SNAPINFO key: all that is known of a snapshot without reading its records."""
    server = client.server
    found = server.sessions.snapshot_value(client.db, raw[0])
    with server.store.hold(found.id) as record:
        usage = server.store.usage(found.id)
    entry = server.keyspace.get(client.db, raw[0])
    ttl = max(0, entry.expire_ms - int(time.time() * 1e3)) if entry is not None and entry.expire_ms else -1
    return {
        **snapshot_map(client, record),
        "key": raw[0],
        "model": server.store.model_name(record.fingerprint),
        "fingerprint": record.fingerprint.hex(),
        "parent": record.parent.hex() if record.parent else None,
        "pages": usage.n_pages,
        "bytes_own": usage.own_bytes,
        "bytes_shared": usage.shared_bytes,
        "pinned": int(found.pinned),
        "ttl_ms": ttl,
        "meta": dict(found.meta),
    }


@handler("SNAPDIFF")
async def snapdiff(client: Client, raw: list[bytes]) -> Reply:
    """SNAPDIFF a b: where two snapshots part, and what they share."""
    server = client.server
    values = [server.sessions.snapshot_value(client.db, key) for key in raw]
    ids = [np.asarray(ids_array(await server.store.token_ids(value.id))) for value in values]
    shorter = min(map(len, ids))
    differing = np.flatnonzero(ids[0][:shorter] != ids[1][:shorter])
    common = int(differing[0]) if len(differing) else shorter
    places = [{(p.segment_id, p.offset): p.record_bytes for p in server.store.plan(value.id)} for value in values]
    both = places[0].keys() & places[1].keys()
    return {
        "common_tokens": common,
        "a_tokens": len(ids[0]),
        "b_tokens": len(ids[1]),
        "identical": int(values[0].id == values[1].id),
        "bytes_shared": sum(places[0][place] for place in both),
        "bytes_a": sum(size for place, size in places[0].items() if place not in both),
        "bytes_b": sum(size for place, size in places[1].items() if place not in both),
    }


def set_pin(client: Client, key: bytes, pinned: bool) -> Reply:
    """Change a snapshot key's pin; 1 when it was different before."""
    server = client.server
    found = server.sessions.snapshot_value(client.db, key)
    entry = server.keyspace.get(client.db, key)
    if entry is None or found.pinned == pinned:
        return 0
    value = SnapshotValue(found.id, found.meta, pinned, found.created_ms)
    server.keyspace.put(client.db, key, Entry(EntryType.SNAPSHOT, entry.expire_ms, value))
    return 1


@handler("PIN")
def pin(client: Client, raw: list[bytes]) -> Reply:
    """PIN key: never evicted."""
    return set_pin(client, raw[0], True)


@handler("UNPIN")
def unpin(client: Client, raw: list[bytes]) -> Reply:
    """UNPIN key."""
    return set_pin(client, raw[0], False)


@handler("TOKENIZE")
def tokenize(client: Client, raw: list[bytes]) -> Reply:
    """TOKENIZE model text: ids, without the begin-of-sentence token; control tokens in the text are neutralised."""
    args = Arguments(raw)
    model = client.server.sessions.model(args.text())
    ids: list[Reply] = list(model.info.tokenizer.encode(args.text()))
    return ids


@handler("DETOKENIZE")
def detokenize(client: Client, raw: list[bytes]) -> Reply:
    """DETOKENIZE model id...: the tokens' bytes."""
    args = Arguments(raw)
    model = client.server.sessions.model(args.text())
    ids = [args.integer("token id", 0, model.info.config.vocab - 1) for _ in raw[1:]]
    text: bytes = model.info.tokenizer.decode_bytes(ids)
    return text
