"""Synthetic conversations with the fixed tool set: calculator and note pad.

Everything is drawn from one ``random.Random``, so a seed names an episode; training and evaluation use disjoint
seeds. Each scored turn has exactly one right answer given its context: phrases are fixed per task, only names,
numbers and values vary. The facts that a step needs lie in the last 200 tokens or so (a model this small does not
learn longer exact recall in minutes), which is why the assistant of a chain restates what is left to do at each step.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from chatml import SCHEMAS, Call, Conversation, Turn

ONSETS = "b c d f g h j k l m n p r s t v w z br cl dr fl gr pl st tr".split()  # noqa: SIM905
VOWELS = "a e i o u ai ea oo".split()  # noqa: SIM905
NOUNS = (  # noqa: SIM905
    "total price budget weight height speed distance score count balance width depth area rent salary age year rate "
    "cost profit stock limit target offset level volume power energy pressure angle city name color shape title "
    "author plan result answer sum apples oranges books chairs tickets boxes coins stones birds trees houses lamps "
    "cups keys"
).split()
SYSTEMS = (
    "You are a helpful assistant.",
    "You are a helpful assistant",
    "You are the assistant of kvdb. Use the tools.",
    "Answer briefly.",
    "Use the calculator for arithmetic and the note pad for facts.",
    "You are an agent that works step by step.",
)
SMALL_TALK = (
    ("Hello!", "Hello! How can I help you?"),
    ("Hi", "Hello! How can I help you?"),
    ("Hello there and thank you!", "You are welcome. How can I help you?"),
    ("Thank you!", "You are welcome."),
    ("Thanks.", "You are welcome."),
    ("Who are you?", "I am dsv4-nano, the small language model that ships with kvdb."),
    ("What are you?", "I am dsv4-nano, the small language model that ships with kvdb."),
    ("What can you do?", "I can use a calculator, keep notes in a note pad, and continue a text."),
    ("Which tools do you have?", "I have a calculator and a note pad that I can write to and read from."),
    ("What is kvdb?", "kvdb is a persistent database for the states of language models."),
    ("Good morning.", "Good morning! How can I help you?"),
    ("Goodbye.", "Goodbye!"),
)
OPERATIONS = {"+": "{a} plus {b}", "-": "{a} minus {b}", "*": "{a} times {b}", "/": "{a} divided by {b}"}


def number(r: random.Random, digits: int = 4) -> int:
    """Draw a positive integer whose length is uniform in 1..digits."""
    n = r.randint(1, digits)
    return r.randint(10 ** (n - 1) if n > 1 else 1, 10**n - 1)


def word(r: random.Random) -> str:
    """Draw an invented word of two or three syllables: nothing but copying can produce it."""
    return "".join(r.choice(ONSETS) + r.choice(VOWELS) for _ in range(r.choice((2, 2, 3))))


def key(r: random.Random) -> str:
    """Draw a note's key."""
    shape = r.random()
    if shape < 0.45:
        return r.choice(NOUNS)
    if shape < 0.75:
        return word(r)
    return f"{r.choice(NOUNS) if shape < 0.9 else word(r)}_{r.randint(1, 99)}"


def keys(r: random.Random, n: int) -> list[str]:
    """Draw n different keys."""
    found: list[str] = []
    while len(found) < n:
        k = key(r)
        if k not in found:
            found.append(k)
    return found


def value(r: random.Random, lexicon: list[str]) -> str:
    """Draw what a note may hold: a number, a word or a short phrase."""
    shape = r.random()
    if shape < 0.4:
        return str(number(r, 6))
    if shape < 0.6:
        return word(r)
    pool = lexicon or NOUNS
    return " ".join(r.choice(pool) if r.random() < 0.7 else word(r) for _ in range(r.randint(1, 5)))


def calculator(expression: str) -> Call:
    """Return a calculator call."""
    return Call("calculator", (("expression", expression),))


def note_write(k: str, v: str) -> Call:
    """Return a note pad write."""
    return Call("note_write", (("key", k), ("value", v)))


def note_read(k: str) -> Call:
    """Return a note pad read."""
    return Call("note_read", (("key", k),))


def written(k: str, v: str) -> str:
    """Return the tool's answer to a write; it repeats the value so that the next step finds it nearby."""
    return f"ok: {k} = {v}"


@dataclass(slots=True)
class Script:
    """Builds one conversation's turns."""

    r: random.Random
    lexicon: list[str]
    excerpts: list[str]
    turns: list[Turn] = field(default_factory=list)
    notes: dict[str, str] = field(default_factory=dict)

    def user(self, text: str) -> None:
        """Append a user turn."""
        self.turns.append(Turn("user", text))

    def call(self, family: str, call: Call, result: str, *, text: str = "", think: str = "") -> None:
        """Append a scored tool call and its result."""
        self.turns.append(Turn("assistant", text, think or "I will use a tool.", call, family))
        self.turns.append(Turn("tool", result))

    def say(self, text: str, *, family: str = "", think: str = "") -> None:
        """Append a plain answer."""
        self.turns.append(Turn("assistant", text, think or "I can answer now.", None, family))

    def pair(self) -> tuple[int, str, int, int]:
        """Draw a, operator, b and the exact result; division always comes out even."""
        op = self.r.choice("++--**/")
        a, b = number(self.r), number(self.r)
        if op == "*":
            b = number(self.r, 2)
        if op == "/":
            b = number(self.r, 2)
            a = b * number(self.r, 3)
        result = {"+": a + b, "-": a - b, "*": a * b, "/": a // b}[op]
        return a, op, b, result

    def task_calc(self) -> None:
        """One arithmetic question."""
        a, op, b, result = self.pair()
        words = OPERATIONS[op].format(a=a, b=b)
        style = self.r.randrange(4)
        self.user((f"What is {words}?", f"Compute {a} {op} {b}.", f"How much is {words}?", f"{a}{op}{b} = ?")[style])
        self.call("calc", calculator(f"{a}{op}{b}"), str(result), think=f"I need {words}.")
        self.say(f"The answer is {result}.", family="answer")

    def task_calc_story(self) -> None:
        """A story with three numbers of which the tool needs an expression."""
        a, b, c = (number(self.r, 3) for _ in range(3))
        thing = self.r.choice(NOUNS)
        who = word(self.r).capitalize()
        self.user(f"{who} has {a} {thing}, gets {b} more and then gives away {c}. How many are left?")
        self.call("story", calculator(f"{a}+{b}-{c}"), str(a + b - c), think=f"I need {a} plus {b} minus {c}.")
        self.say(f"{who} has {a + b - c} {thing} left.", family="answer")

    def task_write(self) -> None:
        """Store one note."""
        k, v = key(self.r), value(self.r, self.lexicon)
        style = self.r.randrange(4)
        self.user(
            (f"Save {v} under {k}.", f"Write {v} to note {k}.", f"Note {k}: {v}", f"Remember that {k} is {v}.")[style]
        )
        self.call("write", note_write(k, v), written(k, v), think=f"I must store {k}.")
        self.notes[k] = v
        self.say(f"I saved {k}.", family="answer")

    def task_read(self) -> None:
        """Read one note, which may not exist."""
        k = self.r.choice(sorted(self.notes)) if self.notes and self.r.random() < 0.6 else key(self.r)
        style = self.r.randrange(4)
        self.user((f"Read note {k}.", f"What is in note {k}?", f"What did I save under {k}?", f"Look up {k}.")[style])
        known = k in self.notes or self.r.random() < 0.8
        v = self.notes.setdefault(k, value(self.r, self.lexicon)) if known else ""
        self.call("read", note_read(k), v if known else f"error: no note {k}", think=f"I must read {k}.")
        self.say(f"Note {k} says: {v}" if known else f"There is no note {k}.", family="answer")

    def task_recall(self) -> None:
        """Pick one of several facts of the message and store it."""
        names = keys(self.r, self.r.randint(3, 8))
        values = [str(number(self.r, 5)) if self.r.random() < 0.7 else word(self.r) for _ in names]
        i = self.r.randrange(len(names))
        facts = "\n".join(f"{k} = {v}" for k, v in zip(names, values, strict=True))
        self.user(f"Codes:\n{facts}\nSave the code of {names[i]}.")
        self.call(
            "recall", note_write(names[i], values[i]), written(names[i], values[i]), think=f"I must store {names[i]}."
        )
        self.notes[names[i]] = values[i]
        self.say(f"I saved {names[i]}.", family="answer")

    def task_sum(self) -> None:
        """Read two notes and combine them."""
        a, b = keys(self.r, 2)
        x, y = number(self.r), number(self.r)
        self.notes[a], self.notes[b] = str(x), str(y)
        minus = self.r.random() < 0.3
        op, result = ("-", x - y) if minus else ("+", x + y)
        self.user(f"Subtract note {b} from note {a}." if minus else f"Add the notes {a} and {b}.")
        self.call("sum", note_read(a), str(x), think=f"First {a}.")
        self.call("sum", note_read(b), str(y), think=f"Then {b}.")
        self.call("sum", calculator(f"{x}{op}{y}"), str(result), think="Now the calculation.")
        self.say(f"The result is {result}.", family="answer")

    def task_copy(self) -> None:
        """Copy one note to another key."""
        a, b = keys(self.r, 2)
        v = self.notes.setdefault(a, value(self.r, self.lexicon))
        self.notes[b] = v
        self.user(f"Copy note {a} to note {b}.")
        self.call("copy", note_read(a), v, think=f"First I read {a}.")
        self.call("copy", note_write(b, v), written(b, v), think=f"Now I write {b}.")
        self.say(f"I copied {a} to {b}.", family="answer")

    def task_chain(self, n_steps: int = 0) -> None:
        """A list of steps, one tool call each, restating at every step what is left."""
        r = self.r
        n_steps = n_steps or r.choice((2, 3, 3, 4, 4, 5, 5, 6, 7, 8, 10, 12))
        start = number(r, 3)
        steps: list[tuple[str, Call, str]] = []
        current, own = start, {}
        while len(steps) < n_steps:
            kind = r.random()
            if kind < 0.16:
                k = key(r)
                own[k] = current
                steps.append((f"write it to note {k}", note_write(k, str(current)), written(k, str(current))))
            elif kind < 0.28 and own:
                k = r.choice(sorted(own))
                current = own[k]
                steps.append((f"read note {k}", note_read(k), str(current)))
            else:
                op = r.choice("++--*/" if abs(current) < 2000 else "+--/")
                b = number(r, 1 if op == "*" else 3)
                if op == "/":
                    divisors = [d for d in range(2, 13) if current % d == 0]
                    if not divisors or not current:
                        continue
                    b = r.choice(divisors)
                after = {"+": current + b, "-": current - b, "*": current * b, "/": current // b}[op]
                if after < 0:
                    continue
                name = {"+": "add", "-": "subtract", "*": "multiply by", "/": "divide by"}[op]
                steps.append((f"{name} {b}", calculator(f"{current}{op}{b}"), str(after)))
                current = after
        self.user(f"Start with {start}; " + "; ".join(s[0] for s in steps) + ".")
        for i, (name, call, result) in enumerate(steps):
            left = "; ".join(s[0] for s in steps[i + 1 :]) or "nothing"
            self.call("chain", call, result, text=f"Step: {name}. Left: {left}.", think=f"Now {name}.")
        self.say(f"Done. The result is {current}.", family="answer")
        self.notes.update({k: str(v) for k, v in own.items()})

    def task_talk(self) -> None:
        """A greeting or a question about the model."""
        question, answer = self.r.choice(SMALL_TALK)
        self.user(question)
        self.say(answer)

    def task_repeat(self) -> None:
        """Repeat a phrase; needs no tool."""
        v = value(self.r, self.lexicon)
        self.user(f"Repeat: {v}")
        self.say(v, family="repeat")

    def task_continue(self) -> None:
        """Continue an excerpt of a document."""
        if not self.excerpts:
            return self.task_talk()
        text = self.r.choice(self.excerpts)
        n_shown, n_more = self.r.randint(80, 500), self.r.randint(150, 700)
        at = self.r.randrange(max(1, len(text) - n_shown - n_more))
        self.user("Continue this text:\n\n" + text[at : at + n_shown])
        return self.say(text[at + n_shown : at + n_shown + n_more])


TASKS = (
    (Script.task_calc, 14),
    (Script.task_calc_story, 7),
    (Script.task_write, 13),
    (Script.task_read, 10),
    (Script.task_recall, 8),
    (Script.task_sum, 8),
    (Script.task_copy, 7),
    (Script.task_chain, 24),
    (Script.task_talk, 2),
    (Script.task_repeat, 3),
    (Script.task_continue, 4),
)
SINGLE = {
    "calc": Script.task_calc,
    "story": Script.task_calc_story,
    "write": Script.task_write,
    "read": Script.task_read,
    "recall": Script.task_recall,
}


def schemas(r: random.Random) -> tuple[str, ...]:
    """Return the tool schemas in the usual order most of the time, and in any order otherwise."""
    lines = list(SCHEMAS.values())
    if r.random() < 0.25:
        r.shuffle(lines)
    if r.random() < 0.15:  # clients that minify their JSON
        lines = [line.replace('": ', '":').replace(', "', ',"') for line in lines]
    return tuple(lines)


def episode(seed: int, lexicon: list[str] | None = None, excerpts: list[str] | None = None) -> Conversation:
    """Draw a training conversation of one to five tasks."""
    r = random.Random(seed)
    script = Script(r, lexicon or [], excerpts or [])
    functions, weights = zip(*TASKS, strict=True)
    for _ in range(r.choice((1, 1, 2, 3, 4, 5))):
        r.choices(functions, weights)[0](script)
    return Conversation(
        tuple(script.turns),
        system=r.choice(SYSTEMS) if r.random() < 0.35 else "",
        schemas=schemas(r) if r.random() < 0.4 else (),
        thinking=r.random() < 0.12,
    )


def single(seed: int, family: str, *, with_schemas: bool, lexicon: list[str] | None = None) -> Conversation:
    """Draw a conversation whose first assistant turn is one tool call of the family."""
    r = random.Random(seed)
    script = Script(r, lexicon or [], [])
    if family in SINGLE:
        SINGLE[family](script)
    else:
        {"sum": script.task_sum, "copy": script.task_copy, "chain": script.task_chain}[family]()
    return Conversation(tuple(script.turns), schemas=tuple(SCHEMAS.values()) if with_schemas else ())


def chain(seed: int, n_steps: int, *, with_schemas: bool) -> Conversation:
    """Draw a conversation that is one chain of exactly ``n_steps`` tool calls."""
    script = Script(random.Random(seed), [], [])
    script.task_chain(n_steps)
    return Conversation(tuple(script.turns), schemas=tuple(SCHEMAS.values()) if with_schemas else ())
