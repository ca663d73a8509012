"""The token ids of a prompt: a stateless client's text becomes, as far as it goes, the timeline that was sampled."""

from __future__ import annotations

from array import array
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
    turn: the hash of the remembered turn it continues. forced: what the answer is made to begin with.
    """

    ids: array[int]
    system_tokens: int
    turn: bytes | None
    forced: str


async def make_prompt(ask: Ask, memory: Memory) -> Prompt:
    """Render a request. Raises BadRequest naming the message that is not in the form it needs."""
    tokenizer = ask.model.info.tokenizer
    if ask.messages is None:
        if isinstance(ask.prompt, str):
            text = ask.prompt.encode()
            found_text = await memory.find_text(ask.user.name + ask.model.info.fingerprint, text)
            if found_text is not None:
                length, ids = found_text
                ids.extend(tokenizer.encode(text[length:].decode()))
                return Prompt(ids, 0, None, "")
            head = [tokenizer.bos_id] if tokenizer.bos_id is not None else []
            return Prompt(array("I", head + tokenizer.encode(ask.prompt)), 0, None, "")
        return Prompt(array("I", ask.prompt), 0, None, "")
    forced = forced_text(ask)
    try:
        whole = render_chat(memory.with_blocks(ask.messages), tools=_tools(ask), thinking=ask.thinking)
        hashes = turn_hashes(ask, ask.messages)
        ends = [(n, hashes[n]) for n, message in enumerate(ask.messages) if message.get("role") == "assistant"]
        # A last message of the assistant is the beginning of the answer, not a turn that was finished.
        is_begun = bool(ends) and ends[-1][0] == len(ask.messages) - 1
        found = await memory.find_turn((ends[:-1] if is_begun else ends)[::-1])
        if found is None:
            ids = array("I", segment_ids(tokenizer, whole))
            turn = None
        else:
            number, turn, ids = found
            ids = ids[:]
            rest = segment_ids(tokenizer, _rest(ask, memory, number))
            # The template ends a turn with the end-of-sentence token; a sampled turn that ended so has it already.
            if rest and ids and rest[0] == tokenizer.eos_id == ids[-1]:
                rest = rest[1:]
            ids.extend(rest)
        if is_begun and ids and ids[-1] == tokenizer.eos_id:
            ids.pop()
    except ChatError as error:
        raise BadRequest(str(error), "messages") from None
    if forced:
        ids.extend(segment_ids(tokenizer, [Segment(forced, True)]))
    return Prompt(ids, _system_tokens(ids, tokenizer.user, tokenizer.assistant), turn, forced)


def _tools(ask: Ask) -> tuple[object, ...]:
    return ask.tools if ask.choice.kind != "none" else ()


def _rest(ask: Ask, memory: Memory, number: int) -> list[Segment]:
    """What follows message `number`, an assistant's: rendered behind an empty turn, which leaves its end token."""
    assert ask.messages is not None
    later = [message for message in ask.messages[number + 1 :] if message.get("role") not in ("system", "developer")]
    stub: Message = {"role": "assistant", "content": ""}
    segments = render_chat([stub, *memory.with_blocks(later)], thinking=_plain(ask))
    # The begin-of-sentence token (and Think Max's text) belong to the start of a timeline.
    skip = next(n for n, segment in enumerate(segments) if segment.is_control and segment.text == EOS)
    return segments[skip:]


def _plain(ask: Ask) -> Thinking:
    return Thinking.OFF if ask.thinking is Thinking.OFF else Thinking.ON


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
