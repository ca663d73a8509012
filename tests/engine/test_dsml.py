"""Tool calls: what is rendered is parsed back, in pieces of any size; broken blocks come back as text."""

from __future__ import annotations

import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvdb_engine.dsml import Piece, Reply, ReplyParser, ToolCall, parse_block, render_calls

CALL = "".join(text for text, _ in render_calls([("f", '{"b": 1, "a": "x<y", "c": {"k": [1, 2]}}')]))


def parse(text: str, size: int = 1, *, thinking: bool = False) -> tuple[Reply, list[Piece]]:
    parser = ReplyParser(thinking=thinking)
    pieces = [piece for at in range(0, len(text), size) for piece in parser.feed(text[at : at + size])]
    return parser.reply() if parser.is_done else (pieces.extend(parser.finish()), parser.reply())[1], pieces


def test_render() -> None:
    assert CALL == (
        '\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name="f">\n'
        '<｜DSML｜parameter name="b" string="false">1</｜DSML｜parameter>\n'
        '<｜DSML｜parameter name="a" string="true">x<y</｜DSML｜parameter>\n'
        '<｜DSML｜parameter name="c" string="false">{"k":[1,2]}</｜DSML｜parameter>\n'
        "</｜DSML｜invoke>\n</｜DSML｜tool_calls>"
    )


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_stream_of_content_and_calls(size: int) -> None:
    reply, pieces = parse("Let me look." + CALL + "ignored", size)
    assert reply.content == "Let me look." and reply.block == CALL and not reply.is_cut
    assert reply.calls == (ToolCall("f", '{"b":1,"a":"x<y","c":{"k":[1,2]}}'),)
    assert "".join(piece.text for piece in pieces if piece.kind == "content") == "Let me look."
    assert pieces[-1].kind == "calls" and pieces[-1].calls == reply.calls


@pytest.mark.parametrize("size", [1, 5, 1000])
def test_reasoning(size: int) -> None:
    reply, pieces = parse("I <b>think</th" + CALL + "</think>Done <t", size, thinking=True)
    assert reply.reasoning == "I <b>think</th" + CALL and reply.content == "Done <t" and not reply.calls
    assert {piece.kind for piece in pieces} == {"reasoning", "content"}


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
names = st.text(st.characters(blacklist_categories=("Cs",), blacklist_characters="\x00"), min_size=1, max_size=10)
# Entities in string values are decoded by the parser (as ds4 does), so such strings cannot round-trip.
plain = json_values.filter(lambda value: "&" not in json.dumps(value))


@settings(max_examples=120, deadline=None)
@given(st.lists(st.tuples(names, st.dictionaries(names, plain, max_size=3)), min_size=1, max_size=3), st.data())
def test_what_is_rendered_is_parsed(calls: list[tuple[str, dict[str, object]]], data: st.DataObject) -> None:
    block = "".join(text for text, _ in render_calls([(name, json.dumps(args)) for name, args in calls]))
    found = parse_block(block)
    assert found is not None
    assert [(call.name, json.loads(call.arguments)) for call in found] == calls
    reply, _ = parse("text" + block, data.draw(st.integers(1, 9)))
    assert reply.calls == found and reply.content == "text"


def test_closing_tags_inside_values() -> None:
    nasty = {"a": "</｜DSML｜parameter>", "b": ["</｜DSML｜parameter>"]}
    block = "".join(text for text, _ in render_calls([("f", json.dumps(nasty))]))
    found = parse_block(block)
    assert found is not None and json.loads(found[0].arguments) == nasty


@pytest.mark.parametrize("size", [1, 6, 1000])
def test_tags_inside_values(size: int) -> None:
    args = {"a": "</｜DSML｜invoke> </｜DSML｜tool_calls> <x>", "b": ["</｜DSML｜tool_calls>"]}
    block = "".join(text for text, _ in render_calls([("f", json.dumps(args)), ("g", "{}")]))
    reply, _ = parse(block, size)
    assert [json.loads(call.arguments) for call in reply.calls] == [args, {}]


def test_other_spellings() -> None:
    for marker in ("DSML｜", ""):
        found = parse_block(CALL.replace("｜DSML｜", marker))
        assert found == (ToolCall("f", '{"b":1,"a":"x<y","c":{"k":[1,2]}}'),)
    block = CALL.replace("x<y", "&lt;&gt;&amp;&quot;&apos;")
    found = parse_block(block)
    assert found is not None and json.loads(found[0].arguments)["a"] == "<>&\"'"


@pytest.mark.parametrize(
    "broken",
    [
        CALL.replace("</｜DSML｜invoke>", ""),
        CALL.replace("<｜DSML｜invoke", "<｜DSML｜invok"),
        CALL.replace(">1<", ">not json<"),
        "\n\n<｜DSML｜tool_calls>\n</｜DSML｜tool_calls>",
        "\n\n<｜DSML｜tool_calls>\nhello\n</｜DSML｜tool_calls>",
    ],
)
def test_malformed_blocks_are_text(broken: str) -> None:
    assert parse_block(broken) is None
    reply, _ = parse("a" + broken)
    assert reply.content == "a" + broken and not reply.calls and not reply.is_cut


def test_unfinished_block() -> None:
    unclosed = CALL.replace("</｜DSML｜parameter>\n</｜DSML｜invoke>", "\n</｜DSML｜invoke>")
    for block in (CALL[:-3], unclosed):
        reply, _ = parse("a" + block)
        assert reply.is_cut and reply.content == "a" + block and not reply.calls


def mutations(seed: int, count: int) -> list[str]:
    """A good reply with pieces cut out, doubled, swapped or replaced by tags."""
    rng = random.Random(seed)
    tags = [
        "<｜DSML｜invoke",
        "</｜DSML｜parameter>",
        "<｜DSML｜tool_calls>",
        "</tool_calls>",
        '">',
        "</think>",
        "<",
        "&lt;",
        "｜",
    ]
    found = []
    for _ in range(count):
        text = "Said. " + CALL + CALL
        for _ in range(rng.randint(1, 4)):
            a, b = sorted(rng.randrange(len(text) + 1) for _ in range(2))
            piece = rng.choice(["", text[a:b] * 2, text[a:b][::-1], rng.choice(tags)])
            text = text[:a] + piece + text[b:]
        found.append(text)
    return found


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("thinking", [False, True])
def test_nothing_is_lost_or_depends_on_the_pieces(seed: int, thinking: bool) -> None:
    """However broken a reply is: no exception, every character shown once, whatever the pieces it came in."""
    for text in mutations(seed, 60):
        replies = []
        for size in (1, 3, 1000):
            reply, pieces = parse(text, size, thinking=thinking)
            replies.append(reply)
            shown = "".join(piece.text for piece in pieces if piece.kind != "calls")
            assert shown == reply.reasoning + reply.content
            for call in reply.calls:
                assert isinstance(json.loads(call.arguments), dict)
        assert replies[0] == replies[1] == replies[2], text
        # What follows the end of a block is not read: generation stops there.
        if not thinking and not replies[0].calls:
            assert text.startswith(replies[0].content)
            assert replies[0].content == text or replies[0].content.endswith("tool_calls>")
