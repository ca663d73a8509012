"""Sampled tokens -> what the client sees."""

from __future__ import annotations

from typing import Any

import pytest

from kvdb.http.ask import Calls, Delta
from kvdb.http.reader import ChoiceReader
from kvdb_engine.catalog import open_model
from kvdb_engine.dsml import render_calls
from kvdb_engine.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return open_model("dsv4-nano").tokenizer


def reader_of(tokenizer: Tokenizer, *stops: str, **more: Any) -> ChoiceReader:
    options = {"is_chat": True, "has_tools": True, "thinking": False, "forced": "", "new_id": "call_", **more}
    return ChoiceReader(0, tokenizer, stops, **options)


def run(reader: ChoiceReader, tokenizer: Tokenizer, text: str, *more: int) -> tuple[str, str, list[Any]]:
    events = []
    for token in [*tokenizer.encode(text, special=True), *more]:
        events += reader.feed(token)
    events += reader.finish()
    deltas = [event for event in events if isinstance(event, Delta)]
    parts = {kind: "".join(one.text for one in deltas if one.kind == kind) for kind in ("reasoning", "content")}
    calls = [call for event in events if isinstance(event, Calls) for call in event.calls]
    return parts["reasoning"], parts["content"], calls


BLOCK = "".join(text for text, _ in render_calls([("calculator", '{"expression": "1+1"}'), ("note", "{}")]))


def test_plain_text_ends_at_the_end_token(tokenizer: Tokenizer) -> None:
    reader = reader_of(tokenizer)
    assert run(reader, tokenizer, "Hello è 世界", tokenizer.eos_id)[1] == "Hello è 世界"
    assert reader.is_over and reader.is_whole


@pytest.mark.parametrize("stop", ["lo th", "there", "o", " is"])
def test_a_stop_string_is_cut_wherever_tokens_end(tokenizer: Tokenizer, stop: str) -> None:
    reader = reader_of(tokenizer, stop, "never seen")
    assert run(reader, tokenizer, "Hello there is")[1] == "Hello there is".partition(stop)[0]
    assert (reader.stop, reader.is_whole) == (stop, False)


def test_what_only_looked_like_a_stop_string_is_shown(tokenizer: Tokenizer) -> None:
    reader = reader_of(tokenizer, "there was")
    assert run(reader, tokenizer, "Hello there wa")[1] == "Hello there wa"
    assert reader.is_whole


def test_calls_end_the_choice(tokenizer: Tokenizer) -> None:
    reader = reader_of(tokenizer)
    _, content, calls = run(reader, tokenizer, f"Let me see.{BLOCK}and more")
    assert content == "Let me see."
    assert [(call.id, call.name, call.arguments) for call in calls] == [
        ("call_0", "calculator", '{"expression":"1+1"}'),
        ("call_1", "note", "{}"),
    ]
    assert reader.block == BLOCK
    assert reader.is_whole


def test_calls_without_tools_are_text(tokenizer: Tokenizer) -> None:
    reader = reader_of(tokenizer, has_tools=False)
    _, content, calls = run(reader, tokenizer, f"So.{BLOCK}")
    assert (content, calls) == (f"So.{BLOCK}", [])
    assert not reader.is_whole


def test_a_forced_beginning_belongs_to_the_block(tokenizer: Tokenizer) -> None:
    head, tail = BLOCK[: BLOCK.index("calculator")], BLOCK[BLOCK.index("calculator") :]
    reader = reader_of(tokenizer, forced=head)
    _, content, calls = run(reader, tokenizer, tail)
    assert content == ""
    assert [call.name for call in calls] == ["calculator", "note"]
    assert reader.block == BLOCK


def test_a_block_that_is_cut_is_text(tokenizer: Tokenizer) -> None:
    reader = reader_of(tokenizer)
    _, content, calls = run(reader, tokenizer, BLOCK[:60])
    assert (content, calls) == (BLOCK[:60], [])
    assert not reader.is_whole


def test_reasoning(tokenizer: Tokenizer) -> None:
    reader = reader_of(tokenizer, thinking=True)
    reasoning, content, _ = run(reader, tokenizer, "I wonder.</think>Yes.", tokenizer.eos_id)
    assert (reasoning, content) == ("I wonder.", "Yes.")
    assert 0 < reader.n_reasoning_tokens < reader.n_tokens


def test_speaking_for_the_user_ends_the_choice(tokenizer: Tokenizer) -> None:
    reader = reader_of(tokenizer)
    assert run(reader, tokenizer, "Yes.<｜User｜>And then?")[1] == "Yes."
    assert not reader.is_whole


def test_half_a_character_cannot_be_sent_back(tokenizer: Tokenizer) -> None:
    reader = reader_of(tokenizer)
    ids = tokenizer.encode("è世")
    for token in ids[:-1]:
        reader.feed(token)
    reader.finish()
    assert reader.content.endswith("\ufffd")
    assert not reader.is_whole


def test_raw_text_is_not_parsed(tokenizer: Tokenizer) -> None:
    reader = reader_of(tokenizer, is_chat=False)
    assert reader_of(tokenizer, is_chat=False).is_whole
    assert run(reader, tokenizer, f"a{BLOCK}</think>b")[1] == f"a{BLOCK}</think>b"
    ended = reader_of(tokenizer, is_chat=False)
    assert run(ended, tokenizer, "The end.", tokenizer.eos_id)[1] == "The end."
    assert not ended.is_whole
