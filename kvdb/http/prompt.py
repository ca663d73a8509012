"""The token ids of a prompt: a stateless client's text becomes, as far as it goes, the timeline that was sampled.

A megabyte of text takes a second to tokenise, so all that grows with the text runs in a thread; what reads the keyspace
runs on the event loop.
"""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

from kvdb.http.ask import Ask, Message
from kvdb.http.errors import BadRequest
from kvdb.http.memory import Memory, turn_hashes
from kvdb_engine.chat import ChatError, Segment, Thinking, render_chat, segment_ids
from kvdb_engine.tokenizer import DSML, EOS

_OPEN = f'\n\n<{DSML}tool_calls>\n<{DSML}invoke name="'


@dataclass(frozen=True, slots=True)
class Prompt:
    """What is to be prefilled.

    system_tokens: length of what every conversation with this system text and these tools begins with, 0 if unknown.
    turn: the hash of the remembered turn it continues. forced: what the answer is made to begin with. asked: the hash
    of the whole conversation, empty for raw text.
    """

    ids: array[int]
    system_tokens: int = 0
    turn: bytes | None = None
    forced: str = ""
    asked: bytes = b""


async def make_prompt(ask: Ask, memory: Memory) -> Prompt:
    """Render a request. Raises BadRequest naming the message that is not in the form it needs."""
    if ask.messages is None:
        return await _raw(ask, memory)
    messages = memory.with_blocks(ask.messages)
    hashes = await asyncio.to_thread(turn_hashes, ask, ask.messages)
    ends = [(n, hashes[n]) for n, message in enumerate(ask.messages) if message.get("role") == "assistant"]
    # A last message of the assistant is the beginning of the answer, not a turn that was finished.
    is_begun = bool(ends) and ends[-1][0] == len(ask.messages) - 1
    found = await memory.find_turn((ends[:-1] if is_begun else ends)[::-1])
    try:
        return await asyncio.to_thread(_render, ask, messages, found, hashes[-1], is_begun=is_begun)
    except ChatError as error:
        raise BadRequest(str(error), "messages") from None


async def _raw(ask: Ask, memory: Memory) -> Prompt:
    tokenizer = ask.model.info.tokenizer
    if not isinstance(ask.prompt, str):
        return Prompt(array("I", ask.prompt))
    text = ask.prompt.encode()
    found = await memory.find_text(ask.user.name + ask.model.info.fingerprint, text)
    if found is not None:
        length, ids = found
        ids.extend(await asyncio.to_thread(tokenizer.encode, text[length:].decode()))
        return Prompt(ids)
    head = [tokenizer.bos_id] if tokenizer.bos_id is not None else []
    return Prompt(array("I", head + await asyncio.to_thread(tokenizer.encode, ask.prompt)))


def _render(
    ask: Ask, messages: Sequence[Message], found: tuple[int, bytes, array[int]] | None, asked: bytes, *, is_begun: bool
) -> Prompt:
    """Behind the remembered turn, if there is one, what came after it. Raises ChatError."""
    tokenizer = ask.model.info.tokenizer
    # Also where most of it is remembered: a message in a wrong form is refused wherever it stands.
    whole = render_chat(messages, tools=ask.tools if ask.choice.kind != "none" else (), thinking=ask.thinking)
    if found is None:
        ids, turn = array("I", segment_ids(tokenizer, whole)), None
    else:
        number, turn, ids = found
        rest = segment_ids(tokenizer, _rest(ask, messages[number + 1 :]))
        # The template ends a turn with the end-of-sentence token; a sampled turn that ended so has it already.
        if rest and ids and rest[0] == tokenizer.eos_id == ids[-1]:
            rest = rest[1:]
        ids.extend(rest)
    if is_begun and ids and ids[-1] == tokenizer.eos_id:
        ids.pop()
    forced = forced_text(ask)
    if forced:
        ids.extend(segment_ids(tokenizer, [Segment(forced, True)]))
    return Prompt(ids, _system_tokens(ids, tokenizer.user, tokenizer.assistant), turn, forced, asked)


def _rest(ask: Ask, messages: Sequence[Message]) -> list[Segment]:
    """What follows an assistant's message: rendered behind an empty turn, which leaves its end token."""
    later = [message for message in messages if message.get("role") not in ("system", "developer")]
    stub: Message = {"role": "assistant", "content": ""}
    thinking = Thinking.OFF if ask.thinking is Thinking.OFF else Thinking.ON
    segments = render_chat([stub, *later], thinking=thinking)
    # The begin-of-sentence token (and Think Max's text) belong to the start of a timeline.
    skip = next(n for n, segment in enumerate(segments) if segment.is_control and segment.text == EOS)
    return segments[skip:]


def forced_text(ask: Ask) -> str:
    """What a forced tool choice makes the answer begin with."""
    if ask.choice.kind == "required":
        return _OPEN
    if ask.choice.kind == "named":
        name = ask.choice.name.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace('"', "&quot;")
        return f'{_OPEN}{name}">\n'
    return ""


def _system_tokens(ids: array[int], user: int | None, assistant: int | None) -> int:
    """Tokens before the last User token that precedes the first Assistant token."""
    try:
        end = ids.index(assistant) if assistant is not None else len(ids)
    except ValueError:
        end = len(ids)
    for position in range(end - 1, -1, -1):
        if ids[position] == user:
            return position
    return 0
