"""The training conversations: rendered as the engine renders them, deterministic, and with right answers."""

from __future__ import annotations

import sys
from fractions import Fraction
from pathlib import Path

import pytest

TRAINING = Path(__file__).parents[2] / "engine" / "training"
MODEL = Path(__file__).parents[2] / "engine" / "kvdb_engine" / "models" / "dsv4_nano"


@pytest.fixture(autouse=True)
def _training_path(monkeypatch: pytest.MonkeyPatch) -> None:
    # The training program is a folder of scripts, not a package: it is only importable from within.
    monkeypatch.setattr(sys, "path", [str(TRAINING), *sys.path])


def _messages(conversation):
    messages = [{"role": "system", "content": conversation.system}] if conversation.system else []
    for turn in conversation.turns:
        message = {"role": turn.role, "content": turn.text}
        if turn.role == "assistant":
            message["reasoning_content"] = turn.think
            if turn.call:
                function = {"name": turn.call.name, "arguments": dict(turn.call.args)}
                message["tool_calls"] = [{"function": function}]
        messages.append(message)
    return messages


@pytest.mark.parametrize("seed", range(60))
def test_rendering_and_token_ids_equal_the_engines(seed):
    import chatml
    import episodes

    from kvdb_engine.chat import Thinking, prompt_text, render_chat, segment_ids
    from kvdb_engine.tokenizer import Tokenizer

    conversation = episodes.episode(seed, ["word", "other"], ["some text to continue " * 60])
    text = chatml.render(conversation).text
    segments = render_chat(
        _messages(conversation),
        tools=conversation.schemas,
        thinking=Thinking.ON if conversation.thinking else Thinking.OFF,
    )
    assert prompt_text(segments) == text
    tokenizer = Tokenizer.from_json(MODEL / "tokenizer.json")
    assert segment_ids(tokenizer, segments) == tokenizer.encode(text, special=True)


def _evaluate(expression: str) -> str:
    # Exact, so that a division which does not come out even would show.
    import ast

    def value(node: ast.expr) -> Fraction:
        if isinstance(node, ast.UnaryOp):
            return -value(node.operand)
        if isinstance(node, ast.BinOp):
            a, b = value(node.left), value(node.right)
            kind = type(node.op)
            return a / b if kind is ast.Div else {ast.Add: a + b, ast.Sub: a - b, ast.Mult: a * b}[kind]
        assert isinstance(node, ast.Constant)
        return Fraction(node.value)

    return str(value(ast.parse(expression, mode="eval").body))


def test_tool_results_are_what_the_tools_would_answer():
    import episodes

    checked = 0
    for seed in range(400):
        conversation = episodes.episode(seed)
        notes: dict[str, str] = {}
        for turn, answer in zip(conversation.turns, conversation.turns[1:], strict=False):
            if not turn.call:
                continue
            assert answer.role == "tool"
            args = dict(turn.call.args)
            if turn.call.name == "calculator":
                assert answer.text == _evaluate(args["expression"])
            elif turn.call.name == "note_write":
                notes[args["key"]] = args["value"]
                assert answer.text == f"ok: {args['key']} = {args['value']}"
            elif args["key"] in notes and answer.text != notes[args["key"]]:
                pytest.fail(f"seed {seed}: note {args['key']} holds {notes[args['key']]!r}, not {answer.text!r}")
            checked += 1
    assert checked > 1000


def test_a_seed_names_an_episode():
    import episodes

    assert episodes.episode(7) == episodes.episode(7)
    assert episodes.episode(7) != episodes.episode(8)


def test_scored_spans_hold_exactly_the_assistants_words():
    import chatml
    import episodes

    conversation = episodes.chain(3, 4, with_schemas=True)
    rendered = chatml.render(conversation)
    spans = [rendered.text[a:b] for family, a, b in rendered.spans if family == "chain"]
    assert len(spans) == 4
    assert all(span.startswith("Step: ") and span.endswith(chatml.CALLS_END) for span in spans)
