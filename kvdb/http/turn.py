"""Carries an ask out: the prompt into a session, a branch for each choice, decoding, and what is kept afterwards.

Everything runs in the daemon's process on its sessions; nothing goes through a socket. When the consumer of `answer`
goes away, decoding is cancelled at its next token and the session stays valid.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import AsyncGenerator
from dataclasses import replace

import numpy as np

from kvdb import branches, timelines
from kvdb.errors import CancelledError, EngineDownError, KvdbError, TooLongError
from kvdb.http.ask import Ask, Begin, Done, End, Event, Message, TokenLogprob
from kvdb.http.memory import DB, KEEP_MS, RETRY_KEEP_MS, Memory, next_hash
from kvdb.http.prompt import Prompt, make_prompt
from kvdb.http.reader import ChoiceReader
from kvdb.store.rows import Reason
from kvdb_engine.chat import Thinking
from kvdb_engine.sampling import log_probabilities, top
from kvdb_engine.tokenizer import DSML

# A prompt leaves a state only when this many tokens of it were computed: fewer are computed again as fast as read.
ANCHOR_TOKENS = 128
# A long prompt leaves a state every so many tokens, so that a crash or a changed end does not cost all of it.
STEP_TOKENS = 8192
_BLOCK_END = f"</{DSML}tool_calls>"
_MASK = (1 << 64) - 1

Queue = asyncio.Queue[Event | BaseException]


async def answer(memory: Memory, ask: Ask) -> AsyncGenerator[Event, None]:
    """The events of an answer, in order; the last one is Done. Raises KvdbError."""
    name = ask.session.encode() if ask.session is not None else None
    turns = memory.lock(name) if name is not None else contextlib.nullcontext()
    try:
        async with turns, contextlib.aclosing(_answer(memory, ask, name)) as events:
            async for event in events:
                yield event
    except CancelledError:
        if ask.model.client.is_closing:  # nobody asked for this: to the client the server is away for a moment
            raise EngineDownError("the daemon is shutting down; ask again when it is back") from None
        raise


async def _answer(memory: Memory, ask: Ask, named: bytes | None) -> AsyncGenerator[Event, None]:
    prompt = await make_prompt(ask, memory)
    context = ask.model.info.config.context
    if len(prompt.ids) >= context:
        raise TooLongError(
            f"the prompt has {len(prompt.ids)} tokens; the context of {ask.model.info.name} is {context}"
        )
    snapshot = ask.snapshot.encode() if ask.snapshot is not None else None
    if snapshot is not None and memory.keyspace.exists(DB, snapshot):
        memory.sessions.snapshot_value(DB, snapshot)  # a key of another type is refused before the work, not after it
    first = named if named is not None else memory.take_session(prompt.turn)
    names = [first, *(b"http:session:" + secrets.token_hex(12).encode() for _ in range(ask.n - 1))]
    left: dict[bytes, bytes | None] = dict.fromkeys(names)  # what each session stands at when we are done
    workers: list[asyncio.Task[None]] = []
    try:
        cached = await _fill(memory, ask, prompt, first)
        yield Begin(len(prompt.ids), cached)
        if ask.n > 1:
            await branches.fork(memory.sessions, DB, first, names[1:])
        readers = [_reader(ask, prompt, number) for number in range(ask.n)]
        queue: Queue = asyncio.Queue()
        workers = [
            asyncio.create_task(_decode(memory, ask, prompt, name, reader, queue))
            for name, reader in zip(names, readers, strict=True)
        ]
        running = len(workers)
        while running:
            event = await queue.get()
            if isinstance(event, BaseException):
                raise event
            running -= isinstance(event, End)
            yield event
        for name, reader in zip(names, readers, strict=True):
            left[name] = await _keep(memory, ask, prompt, name, reader)
        is_stored = snapshot is not None and await memory.anchor(snapshot, first, Reason.MANUAL, keep_ms=0)
        yield Done(
            prompt_tokens=len(prompt.ids),
            cached_tokens=cached,
            completion_tokens=sum(reader.n_tokens for reader in readers),
            reasoning_tokens=sum(reader.n_reasoning_tokens for reader in readers),
            session=ask.session,
            snapshot=ask.snapshot if is_stored else None,
        )
    finally:
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)
        for name, turn in left.items():
            if name != named:
                memory.leave_session(turn, name)


async def _fill(memory: Memory, ask: Ask, prompt: Prompt, name: bytes) -> int:
    """Put the prompt into a session; returns how many of its tokens were not computed."""
    sessions, model, ids = memory.sessions, ask.model, prompt.ids
    reused = 0
    with contextlib.suppress(KvdbError):  # no prefix at hand; what else may be wrong is said by the calls below
        reused = (await timelines.prefill(sessions, DB, name, model, ids, "ONLY"))["tokens"]
    cuts = {prompt.system_tokens: Reason.COLD, len(ids): Reason.COLD}
    cuts |= {cut: Reason.CONTINUED for cut in range(STEP_TOKENS, len(ids), STEP_TOKENS)}
    stored = reused
    computed = 0
    for cut in sorted(cut for cut in cuts if reused < cut <= len(ids)):
        part = ids[:cut]
        computed += (await timelines.prefill(sessions, DB, name, model, part, "YES"))["computed"]
        is_answered = cut == len(ids) and ask.messages is not None  # the end of the turn will be what goes on
        keep_ms = RETRY_KEEP_MS if is_answered else KEEP_MS
        if cut - stored >= ANCHOR_TOKENS and await memory.keep_prompt(part, name, cuts[cut], keep_ms):
            stored = cut
    return max(0, len(ids) - computed)


def _reader(ask: Ask, prompt: Prompt, number: int) -> ChoiceReader:
    return ChoiceReader(
        number,
        ask.model.info.tokenizer,
        ask.stops,
        is_chat=ask.messages is not None,
        has_tools=bool(ask.tools) and ask.choice.kind != "none",
        thinking=ask.thinking is not Thinking.OFF,
        forced=prompt.forced,
        new_id=f"{ask.call_prefix}{secrets.token_hex(14)}",
    )


async def _decode(memory: Memory, ask: Ask, prompt: Prompt, name: bytes, reader: ChoiceReader, queue: Queue) -> None:
    """Decode one choice into the queue; the last thing put is its End, or the error that ended it."""
    try:
        room = ask.model.info.config.context - len(prompt.ids)
        n = min(ask.max_tokens or room, room)
        sampling = replace(ask.sampling, seed=(ask.sampling.seed + reader.choice) & _MASK)
        if ask.logprobs is None:
            stops = [stop.encode() for stop in ask.stops]
            if ask.messages is not None:
                control = {
                    ask.model.info.tokenizer.user: "<｜User｜>",
                    ask.model.info.tokenizer.assistant: "<｜Assistant｜>",
                }
                stops += [text.encode() for token, text in control.items() if token is not None]
                stops.append(_BLOCK_END.encode())

            def on_token(token: int) -> None:
                for event in reader.feed(token):
                    queue.put_nowait(event)

            finish = (await timelines.generate(memory.sessions, DB, name, n, sampling, stops, on_token))["finish"]
        else:
            finish = "length"
            for _ in range(n):
                _, _, data = await branches.logits(memory.sessions, DB, name)
                done = await timelines.generate(memory.sessions, DB, name, 1, sampling, [])
                for event in reader.feed(done["ids"][0], _logprob(ask, data, done["ids"][0])):
                    queue.put_nowait(event)
                if reader.is_over or done["finish"] == "eos":
                    finish = "eos"
                    break
        for event in reader.finish():
            queue.put_nowait(event)
        queue.put_nowait(End(reader.choice, _reason(finish, reader), reader.stop))
    except Exception as error:
        queue.put_nowait(error)


def _reason(finish: str, reader: ChoiceReader) -> str:
    if reader.calls:
        return "tool_calls"
    return "length" if finish in ("length", "context") and reader.stop is None else "stop"


def _logprob(ask: Ask, data: bytes, token: int) -> TokenLogprob:
    logits = np.frombuffer(data, dtype="<f4")
    tokenizer = ask.model.info.tokenizer
    best = tuple((tokenizer.token_bytes(one), logprob) for one, _, logprob in top(logits, ask.logprobs or 0))
    return TokenLogprob(tokenizer.token_bytes(token), float(log_probabilities(logits)[token]), best)


async def _keep(memory: Memory, ask: Ask, prompt: Prompt, name: bytes, reader: ChoiceReader) -> bytes | None:
    """Remember the end of a turn under what the client has seen of it; the turn's hash, or None."""
    if reader.calls:
        memory.keep_block([call.id for call in reader.calls], reader.block)
    if not reader.is_whole:
        return None
    if ask.messages is None:
        if isinstance(ask.prompt, str):
            text = ask.prompt + reader.content
            await memory.keep_text(ask.user.name + ask.model.info.fingerprint, text.encode(), name)
        return None
    content = reader.content
    if ask.messages[-1].get("role") == "assistant":
        return None  # the client's beginning and our end come back as one message: as text, not as this timeline
    said: Message = {"role": "assistant", "content": content}
    if reader.calls:
        said["tool_calls"] = [
            {"id": call.id, "function": {"name": call.name, "arguments": call.arguments}} for call in reader.calls
        ]
    turn = next_hash(prompt.asked, said)
    if not await memory.keep_turn(turn, name):
        return None
    if prompt.turn is not None:
        memory.supersede(prompt.turn)
    return turn
