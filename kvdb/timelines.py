"""Growing timelines: PREFILL, EXTEND, GENERATE, and where the first tokens of a prompt come from."""

from __future__ import annotations

import logging
import time
from array import array
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

from kvdb.errors import BusyError, EngineDownError, KvdbError, SnapshotGoneError, WrongModelError
from kvdb.session import Model, Session
from kvdb.sessions import Sessions
from kvdb_engine.sampling import Sampling
from kvdb_protocol.frames import Message

log = logging.getLogger("kvdb.sessions")

OnProgress = Callable[[int, int], None]
OnToken = Callable[[int], None]
Reply = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Reuse:
    """Where a prompt's first `n_tokens` come from: a live session, a stored snapshot, or nowhere."""

    source: str
    n_tokens: int
    live: Session | None = None
    snapshot: bytes | None = None


async def prefill(
    sessions: Sessions,
    db: int,
    name: bytes,
    model: Model,
    ids: array[int],
    reuse: str,
    on_progress: OnProgress | None = None,
) -> Reply:
    """Make the session's timeline exactly `ids`, computing as little as possible.

    reuse: "YES" takes the longest live or stored prefix, "NO" computes all, "ONLY" computes nothing: the timeline
    becomes the longest prefix found.
    """
    began = time.perf_counter()
    sessions.check_ids(model, ids)
    if not ids:
        raise KvdbError("the prompt is empty: give at least one token")
    # What is needed is looked for before the old timeline is given up.
    own = await sessions.get(db, name) if _is_of(sessions, db, name, model) else None
    found = await find_reuse(sessions, model, own, ids, reuse)
    if reuse != "ONLY" and found.n_tokens < len(ids):
        await model.client.start()
        model.client.admit()
    is_new = not _is_of(sessions, db, name, model)
    if is_new:
        sessions.create(db, name, model)
    async with sessions.use(db, name) as session:
        if session.model is not model:
            raise BusyError("another client made a session of another model of this key: try again")
        # With ONLY nothing was waited for since, so what was found is good still. Looked for again, it might be in use,
        # and a timeline would have been given up for nothing.
        found = await _take_longest(sessions, session, ids, reuse, found if is_new and reuse == "ONLY" else None)
        recomputed = 0
        if reuse != "ONLY" and found.n_tokens < len(ids):
            recomputed = await sessions.make_resident(session)
            await feed(sessions, session, ids[found.n_tokens :], on_progress)
        tokens = session.n_tokens
    return {
        "tokens": tokens,
        "reused": found.n_tokens - recomputed,
        "computed": tokens - found.n_tokens + recomputed,
        "source": found.source,
        "ms": _ms(began),
    }


def _is_of(sessions: Sessions, db: int, name: bytes, model: Model) -> bool:
    """Whether a key holds a session that this model continues."""
    value = sessions.entry(db, name)
    try:
        return value is not None and sessions.model_of(value.fingerprint) is model
    except WrongModelError:
        return False


async def _take_longest(
    sessions: Sessions, session: Session, ids: array[int], reuse: str, found: Reuse | None = None
) -> Reuse:
    """Put the session on the longest prefix of `ids` at hand. found: if that is known already."""
    while True:
        found = found or await find_reuse(sessions, session.model, session, ids, reuse)
        if found.live is session:
            return found
        if found.live is not None:
            await clone(sessions, found.live, session)
            return found
        if found.snapshot is None:
            sessions.stand_on(session, None, 0, array("I"))
            return found
        try:
            with sessions.store.hold(found.snapshot):
                sessions.stand_on(session, found.snapshot, found.n_tokens, ids[: found.n_tokens])
            return found
        except SnapshotGoneError:
            found = None  # deleted between the lookup and here: look again


async def find_reuse(sessions: Sessions, model: Model, own: Session | None, ids: array[int], reuse: str) -> Reuse:
    """The longest prefix at hand; what is live wins a tie, because it costs nothing. Raises KvdbError for ONLY.

    A live session that is found may be used until the caller awaits.
    """
    best = Reuse("none", 0)
    if reuse == "NO":
        return best
    info = model.info
    match = await sessions.store.longest_prefix(
        info.family, info.fingerprint, ids.tobytes(), cross_quant=sessions.cross_quant
    )
    # A session whose key is gone may stand on a base that is gone too.
    if own is not None and own.n_tokens and _begins_with(ids, own.ids) and sessions.is_named(own):
        best = Reuse("live", own.n_tokens, own)
    for other in sessions.open.values():
        is_usable = other.model is model and other.is_resident and not other.lock.locked()
        if is_usable and other.n_tokens > best.n_tokens and _begins_with(ids, other.ids) and sessions.is_named(other):
            best = Reuse("live", other.n_tokens, other)
    if match is not None and match.n_tokens > best.n_tokens:
        best = Reuse("stored", match.n_tokens, snapshot=match.snapshot_id)
    if reuse == "ONLY" and not best.n_tokens:
        raise KvdbError("no live or stored prefix of this prompt; PREFILL without REUSE ONLY computes it")
    return best


def _begins_with(ids: array[int], prefix: array[int]) -> bool:
    n = len(prefix)
    # The last token first: it differs in most sessions, and a comparison of a million ids begins with a copy of them.
    return n <= len(ids) and ids[n - 1] == prefix[-1] and ids[:n] == prefix


async def clone(sessions: Sessions, origin: Session, session: Session) -> None:
    """Give `session` the timeline and, where there is one, the live state of `origin`. The origin must not move."""
    stand_beside(sessions, origin, session)
    await share_state(origin, session)


def stand_beside(sessions: Sessions, origin: Session, session: Session) -> None:
    """Give `session` the timeline of `origin`."""
    sessions.stand_on(session, origin.base, origin.base_tokens, origin.ids)
    # A million ids are 4 MB: whoever grows first makes the copy, so that a fork costs the same at any length.
    session.shares_ids = origin.shares_ids = True


async def share_state(origin: Session, session: Session) -> None:
    """Give `session`, which stands beside `origin`, a copy of its live state, if it has one."""
    if (copy := _begin_copy(origin, session)) is not None:
        await copy


def share_soon(sessions: Sessions, origin: Session, session: Session) -> None:
    """The same while the caller goes on: then the lock of `session`, which the caller has, is let go.

    The origin may move on as soon as its own lock is free: the worker keeps the order of what it is asked.
    """
    if (copy := _begin_copy(origin, session)) is None:
        session.lock.release()
        return

    async def share() -> None:
        try:
            await copy
        except KvdbError as error:
            # As without a worker: base and journal name every token.
            log.warning("session %s gets no copy of a live state: %s", session.uid.hex(), error)
        finally:
            session.lock.release()

    sessions.in_background(share())


def _begin_copy(origin: Session, session: Session) -> Coroutine[Any, Any, None] | None:
    """Ask the worker for a copy of a live state, if there is one; it is there when the result was awaited."""
    if not origin.is_resident:
        return None
    generation = origin.generation
    try:
        copied = origin.model.client.ask("open", sid=session.uid, source=origin.uid, places=None)
    except EngineDownError:
        return None

    async def wait() -> None:
        try:
            await copied
        except EngineDownError:
            return  # the worker went away: the state is rebuilt from base and journal on first use
        session.generation = generation

    return wait()


async def feed(sessions: Sessions, session: Session, ids: array[int], on_progress: OnProgress | None = None) -> None:
    """Let the engine append tokens to a resident session. If it stops early, the timeline holds what was done."""
    done_before = 0

    def on_event(event: Message) -> None:
        nonlocal done_before
        sessions.append(session, ids[done_before : event["done"]])
        done_before = event["done"]
        if on_progress is not None:
            on_progress(event["done"], event["total"])

    await session.model.client.call("extend", on_event, sid=session.uid, ids=ids.tobytes())


async def extend(
    sessions: Sessions, db: int, name: bytes, ids: array[int], on_progress: OnProgress | None = None
) -> Reply:
    """Append tokens to a session."""
    began = time.perf_counter()
    async with sessions.use(db, name) as session:
        before = session.n_tokens
        sessions.check_ids(session.model, ids, before)
        recomputed = await sessions.make_resident(session)
        await feed(sessions, session, ids, on_progress)
        tokens = session.n_tokens
    return {
        "tokens": tokens,
        "reused": before - recomputed,
        "computed": len(ids) + recomputed,
        "source": "live",
        "ms": _ms(began),
    }


async def generate(
    sessions: Sessions,
    db: int,
    name: bytes,
    max_tokens: int,
    sampling: Sampling,
    stops: list[bytes],
    on_token: OnToken | None = None,
) -> Reply:
    """Decode up to `max_tokens` tokens. The end-of-sentence token and stop strings stay in the timeline.

    finish: length, eos, stop (a stop string appeared) or context (the model's context is full).
    """
    began = time.perf_counter()
    async with sessions.use(db, name) as session:
        tokenizer = session.model.info.tokenizer
        if session.n_tokens == 0:
            raise KvdbError("the session is empty: PREFILL it first")
        await sessions.make_resident(session)
        before = session.n_tokens

        def on_event(event: Message) -> None:
            sessions.append(session, [event["token"]])
            if on_token is not None:
                on_token(event["token"])

        done = await session.model.client.call(
            "generate",
            on_event,
            sid=session.uid,
            max_tokens=max_tokens,
            sampling=sampling_fields(sampling),
            stop=stops,
            stop_ids=[] if tokenizer.eos_id is None else [tokenizer.eos_id],
        )
        new = session.ids[before:].tolist()
    return {
        "text": tokenizer.decode_bytes(new),
        "ids": new,
        "tokens": before + len(new),
        "finish": done["finish"],
        "ms": _ms(began),
    }


def sampling_fields(sampling: Sampling) -> dict[str, Any]:
    """The fields of a Sampling, for a worker frame."""
    return {
        "temperature": sampling.temperature,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
        "min_p": sampling.min_p,
        "seed": sampling.seed,
    }


def _ms(began: float) -> float:
    return round((time.perf_counter() - began) * 1e3, 3)
