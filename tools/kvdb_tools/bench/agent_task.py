"""A task of many steps for a small model: arithmetic and a note pad, each step checked by running it.

A step is a request that takes exactly one tool call. It is right when the call, executed, does what was asked: the
expression has the right value, the right note holds the right text. How the call is spelled does not matter.
"""

from __future__ import annotations

import ast
import json
import operator
import random
from dataclasses import dataclass, field

from kvdb_engine.dsml import ToolCall

TOOLS = (
    '{"name": "calculator", "description": "Evaluate an arithmetic expression.", "parameters": {"type": "object", '
    '"properties": {"expression": {"type": "string"}}, "required": ["expression"]}}',
    '{"name": "note_write", "description": "Store a value in the note pad under a key.", "parameters": {"type": '
    '"object", "properties": {"key": {"type": "string"}, "value": {"type": "string"}}, "required": ["key", "value"]}}',
    '{"name": "note_read", "description": "Read the value stored in the note pad under a key.", "parameters": {"type": '
    '"object", "properties": {"key": {"type": "string"}}, "required": ["key"]}}',
)
_THINGS = ("apples", "books", "boxes", "chairs", "coins", "cups", "lamps", "stones", "tickets", "trees")
_NOTES = ("total", "price", "budget", "weight", "height", "speed", "score", "count", "depth", "area", "limit", "level")
_WORDS = ("north", "blue", "seven", "garden", "winter", "copper", "market", "river", "paper", "window", "silver")
_NAMES = ("Brado", "Clima", "Dorea", "Fenno", "Mirta", "Pavel", "Salda", "Tovo")
_OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.FloorDiv: operator.floordiv}


@dataclass(frozen=True, slots=True)
class Request:
    """One step: what is asked, the tool and the outcome it must have, and what is said when it is done.

    outcome: the value of the expression, [key, value] of a write, or [key] of a read. result: what the tool returns.
    """

    text: str
    tool: str
    outcome: tuple[str, ...]
    result: str
    reply: str
    right: ToolCall


@dataclass(slots=True)
class Task:
    """An endless row of requests over one note pad."""

    random: random.Random
    notes: dict[str, str] = field(default_factory=dict)

    def next(self) -> Request:
        """Draw the next request. The pad changes as if it were carried out rightly."""
        kind = self.random.choices(("sum", "story", "write", "read"), (3, 2, 4, 1 if self.notes else 0))[0]
        made: Request = getattr(self, f"_{kind}")()
        return made

    def _sum(self) -> Request:
        a, b = self.random.randint(2, 999), self.random.randint(2, 99)
        sign, name = self.random.choice((("+", "plus"), ("-", "minus"), ("*", "times")))
        value = str({"+": a + b, "-": a - b, "*": a * b}[sign])
        right = _call("calculator", expression=f"{a}{sign}{b}")
        return Request(f"What is {a} {name} {b}?", "calculator", (value,), value, f"The answer is {value}.", right)

    def _story(self) -> Request:
        a, b = self.random.randint(20, 900), self.random.randint(2, 99)
        c = self.random.randint(1, a)
        who, thing = self.random.choice(_NAMES), self.random.choice(_THINGS)
        value = str(a + b - c)
        text = f"{who} has {a} {thing}, gets {b} more and then gives away {c}. How many are left?"
        right = _call("calculator", expression=f"{a}+{b}-{c}")
        return Request(text, "calculator", (value,), value, f"{who} has {value} {thing} left.", right)

    def _write(self) -> Request:
        key = self.random.choice(_NOTES)
        if self.random.random() < 0.5:
            value = str(self.random.randint(1, 99_999))
        else:
            value = " ".join(self.random.sample(_WORDS, self.random.randint(1, 4)))
        self.notes[key] = value
        right = _call("note_write", key=key, value=value)
        asked = f"Save {value} under {key}."
        return Request(asked, "note_write", (key, value), f"ok: {key} = {value}", f"I saved {key}.", right)

    def _read(self) -> Request:
        key = self.random.choice(sorted(self.notes))
        value = self.notes[key]
        right = _call("note_read", key=key)
        return Request(f"Read note {key}.", "note_read", (key,), value, f"Note {key} says: {value}", right)


def _call(name: str, **arguments: str) -> ToolCall:
    return ToolCall(name, json.dumps(arguments))


def is_right(request: Request, calls: tuple[ToolCall, ...]) -> bool:
    """Carry out what the model asked for and compare with what the request wanted."""
    if len(calls) != 1 or calls[0].name != request.tool:
        return False
    arguments = json.loads(calls[0].arguments)
    if request.tool == "calculator":
        return evaluate(str(arguments.get("expression", ""))) == int(request.outcome[0])
    wanted = dict(zip(("key", "value"), request.outcome, strict=False))
    return bool(arguments == wanted)


def evaluate(expression: str) -> int | None:
    """The value of an arithmetic expression of integers; None for anything else."""
    try:
        return _value(ast.parse(expression, mode="eval").body)
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return None


def _value(node: ast.expr) -> int:
    if isinstance(node, ast.Constant) and type(node.value) is int and abs(node.value) < 10**12:
        return node.value
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_value(node.operand)
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return int(_OPERATORS[type(node.op)](_value(node.left), _value(node.right)))
    raise ValueError("not arithmetic")
