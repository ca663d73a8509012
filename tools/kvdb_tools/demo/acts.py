"""The acts of the demo, in order. Each does one thing through the daemon's commands, times it and checks it.

The acts share a `Stage`. What they say about bytes comes from the replies; times are what a client sees.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from kvdb_engine.sampling import log_probabilities
from kvdb_tools.cli.connection import Connection
from kvdb_tools.cli.reply import ErrorReply, Push
from kvdb_tools.daemon import Caller, CommandError, Daemon, as_ids, as_int, plain
from kvdb_tools.demo.report import Act, Check, Report
from kvdb_tools.demo.text import cut_text

STEPS = 5
STEP_TOKENS = 24
BRANCHES = 3
DRAWS = 100
GREEDY = ("TEMPERATURE", 0)
GREEDY_TOKENS = 48
# The daemon is killed when this many tokens of a longer generation have arrived.
KILL_AFTER_TOKENS = 12
# Room in the model's context for everything that is generated after the text.
SPARE_TOKENS = 1024
LEAST_TOKENS = 8000
LAST_STEP = f"step:{STEPS}"


class DemoError(RuntimeError):
    """The demo cannot go on."""


@dataclass(slots=True)
class Stage:
    """What the acts work on and leave to later ones."""

    daemon: Daemon
    text: str
    model: str
    say: Callable[[str], None]
    on_progress: Callable[[int, int], None]
    most_tokens: int
    report: Report = field(default_factory=Report)
    reference: tuple[int, ...] = ()
    reference_logits: bytes = b""
    streamed: list[int] = field(default_factory=list)
    connection: Connection | None = None

    @property
    def call(self) -> Caller:
        """Commands on the open connection."""
        if self.connection is None:
            self.connection = Connection(self.daemon.target)
        return Caller(self.connection)

    def drop_connection(self) -> None:
        """Forget the connection: the daemon behind it is gone."""
        if self.connection:
            self.connection.close()
            self.connection = None

    def check(self, name: str, holds: bool, detail: str = "") -> None:
        """Record a check; the demo goes on to its table even when one fails."""
        self.report.checks.append(Check(name, holds, detail))
        self.say(f"{'[green]holds[/]' if holds else '[bold red]FAILS[/]'}  {name}" + (f" ({detail})" if detail else ""))


def run_acts(stage: Stage) -> None:
    """All acts. The daemon runs afterwards."""
    start(stage)
    prefill(stage)
    snapshot(stage)
    take_steps(stage)
    fork(stage)
    sample(stage)
    run_uninterrupted(stage)
    kill_in_the_middle(stage)
    start_again(stage)
    restore_and_continue(stage)
    prefill_again(stage)
    prefill_without_kvdb(stage)


def start(stage: Stage) -> None:
    """A daemon on an empty directory."""
    seconds = stage.daemon.start()
    stage.report.acts.append(Act("start the daemon", seconds))
    # The engine starts on first use; here, so that the prefill below is timed without it.
    began = time.perf_counter()
    stage.call("ENGINE", "LOAD", stage.model)
    stage.report.acts.append(Act("start the engine", time.perf_counter() - began))
    models = [model for model in stage.call.list("ENGINE", "MODELS") if isinstance(model, dict)]
    context = next(as_int(model["context"]) for model in models if _text(model["name"]) == stage.model)
    n_tokens = len(stage.call.list("TOKENIZE", stage.model, stage.text))
    stage.text = cut_text(stage.text, n_tokens, min(stage.most_tokens, context - SPARE_TOKENS))


def prefill(stage: Stage) -> None:
    """Read the text for the first time."""
    reply, seconds = _prefill(stage, "book", "YES")
    stage.report.n_tokens = as_int(reply["tokens"])
    stage.report.acts.append(Act("PREFILL the text", seconds, recomputed=as_int(reply["computed"])))
    is_long = stage.report.n_tokens >= LEAST_TOKENS
    stage.check(f"the text has at least {LEAST_TOKENS:,} tokens", is_long, f"{stage.report.n_tokens:,}")


def snapshot(stage: Stage) -> None:
    """Keep the state."""
    reply, seconds = _timed(stage, "SNAPSHOT", "book", "book:0")
    new, shared = as_int(reply["bytes_new"]), as_int(reply["bytes_shared"])
    stage.report.acts.append(Act("SNAPSHOT it", seconds, new, shared))


def take_steps(stage: Stage) -> None:
    """Five steps of generated text, a snapshot after each."""
    written = shared = 0
    spent = generating = 0.0
    for step in range(1, STEPS + 1):
        reply, seconds = _timed(stage, "GENERATE", "book", "MAXTOKENS", STEP_TOKENS, "TEMPERATURE", 0.7, "SEED", step)
        generating += seconds
        stage.say(f"step {step}: [italic]{_quoted(reply['text'])}[/]")
        reply, seconds = _timed(stage, "SNAPSHOT", "book", f"step:{step}")
        spent += seconds
        written += as_int(reply["bytes_new"])
        shared += as_int(reply["bytes_shared"])
    stage.report.acts.append(Act(f"{STEPS} x GENERATE {STEP_TOKENS} tokens", generating, recomputed=0))
    stage.report.acts.append(Act(f"{STEPS} x SNAPSHOT", spent, written, shared))


def fork(stage: Stage) -> None:
    """Three branches from one state."""
    names = [f"branch:{number}" for number in range(1, BRANCHES + 1)]
    began = time.perf_counter()
    made = stage.call.number("FORK", LAST_STEP, *names)
    stage.report.acts.append(Act(f"FORK {BRANCHES} branches", time.perf_counter() - began, 0, prefills=BRANCHES))
    texts = set()
    written = shared = 0
    began = time.perf_counter()
    for seed, name in enumerate(names, 1):
        reply = stage.call.map("GENERATE", name, "MAXTOKENS", STEP_TOKENS, "TEMPERATURE", 1, "SEED", 100 + seed)
        texts.add(as_ids(reply["ids"]))
        stage.say(f"{name}: [italic]{_quoted(reply['text'])}[/]")
        reply = stage.call.map("SNAPSHOT", name, f"kept:{seed}")
        written += as_int(reply["bytes_new"])
        shared += as_int(reply["bytes_shared"])
    stage.report.acts.append(Act(f"GENERATE, SNAPSHOT on {BRANCHES}", time.perf_counter() - began, written, shared, 0))
    stage.check("each seed gives another branch", made == BRANCHES and len(texts) == BRANCHES)


def sample(stage: Stage) -> None:
    """A hundred next tokens from the stored logits."""
    options = ("COUNT", DRAWS, "TEMPERATURE", 1, "MINP", 0, "SEED", 1)
    began = time.perf_counter()
    draws = stage.call.list("SAMPLE", LAST_STEP, *options)
    seconds = time.perf_counter() - began
    stage.report.acts.append(Act(f"SAMPLE {DRAWS} next tokens", seconds, 0, recomputed=0, prefills=1))
    logprobs = log_probabilities(np.frombuffer(stage.call.data("LOGITS", LAST_STEP, "RAW"), "<f4"))
    found = [(as_int(draw["id"]), draw["logprob"]) for draw in draws if isinstance(draw, dict)]
    are_right = all(isinstance(p, float) and abs(p - logprobs[token]) < 1e-6 for token, p in found)
    n_different = len({token for token, _ in found})
    stage.check("samples come from the stored logits", are_right and len(found) == DRAWS, f"{n_different} different")


def run_uninterrupted(stage: Stage) -> None:
    """The run that the crash below must not change."""
    stage.call("FORK", LAST_STEP, "reference")
    stage.reference_logits = stage.call.data("LOGITS", LAST_STEP, "RAW")
    reply, seconds = _timed(stage, "GENERATE", "reference", "MAXTOKENS", GREEDY_TOKENS, *GREEDY)
    stage.reference = as_ids(reply["ids"])
    stage.report.acts.append(Act(f"GENERATE {len(stage.reference)} tokens", seconds, recomputed=0))


def kill_in_the_middle(stage: Stage) -> None:
    """SIGKILL while tokens come."""
    stage.call("FORK", LAST_STEP, "doomed")
    assert stage.connection is not None

    def on_push(push: Push) -> None:
        if push.items[0] == b"generate":
            stage.streamed.append(as_int(push.items[2]))
            if len(stage.streamed) == KILL_AFTER_TOKENS:
                stage.daemon.kill()

    began = time.perf_counter()
    try:
        reply = stage.connection.call("GENERATE", "doomed", "MAXTOKENS", 1000, *GREEDY, "STREAM", on_push=on_push)
        raise DemoError(f"the generation ended before the daemon could be killed: {plain(reply)!r}")
    except ConnectionError:
        pass
    stage.drop_connection()
    stage.report.acts.append(Act(f"SIGKILL after {KILL_AFTER_TOKENS} of 1,000 tokens", time.perf_counter() - began))


def start_again(stage: Stage) -> None:
    """Recovery is part of the start."""
    stage.report.acts.append(Act("start again", stage.daemon.start()))
    keys = ["book:0", *(f"step:{number}" for number in range(1, STEPS + 1))]
    keys += [f"kept:{number}" for number in range(1, BRANCHES + 1)]
    found = stage.call.number("EXISTS", *keys)
    stage.check("every acknowledged snapshot is there", found == len(keys), f"{found} of {len(keys)}")
    stage.call("ENGINE", "LOAD", stage.model)


def restore_and_continue(stage: Stage) -> None:
    """The last snapshot, continued as if nothing had happened."""
    reply, seconds = _timed(stage, "RESTORE", LAST_STEP, "resumed")
    recomputed = as_int(reply["recomputed"])
    stage.report.acts.append(Act("RESTORE the last snapshot", seconds, 0, recomputed=recomputed, prefills=1))
    logits = stage.call.data("LOGITS", "resumed", "RAW")
    stage.check(
        "the logits are the same bytes", bool(logits) and logits == stage.reference_logits, f"{len(logits)} bytes"
    )
    reply, seconds = _timed(stage, "GENERATE", "resumed", "MAXTOKENS", GREEDY_TOKENS, *GREEDY)
    ids = as_ids(reply["ids"])
    stage.report.acts.append(Act(f"GENERATE {len(ids)} tokens again", seconds, recomputed=0))
    stage.check("the tokens are those of the undisturbed run", ids == stage.reference, f"{len(ids)} tokens")
    n = len(stage.streamed)
    stage.check(
        "so are those that arrived before the kill", tuple(stage.streamed) == stage.reference[:n], f"{n} tokens"
    )
    stage.say(f"continued: [italic]{_quoted(reply['text'])}[/]")


def prefill_again(stage: Stage) -> None:
    """Somebody else sends the same text."""
    reply, seconds = _prefill(stage, "another", "YES")
    computed = as_int(reply["computed"])
    stage.report.acts.append(Act("PREFILL the text, new session", seconds, 0, recomputed=computed, prefills=1))
    is_stored = _text(reply["source"]) == "stored" and computed == 0
    stage.check("the text is served from the store", is_stored, f"{computed} tokens computed")


def prefill_without_kvdb(stage: Stage) -> None:
    """What all of it would cost each time: the same text, computed again."""
    reply, seconds = _prefill(stage, "cold", "NO")
    stage.report.prefill_s = seconds
    stage.report.acts.append(Act("PREFILL it with no reuse", seconds, recomputed=as_int(reply["computed"])))
    same = stage.call.data("LOGITS", "cold", "RAW") == stage.call.data("LOGITS", "book:0", "RAW")
    stage.check("computed again, the logits are the stored ones", same)


def _prefill(stage: Stage, session: str, reuse: str) -> tuple[dict[str, object], float]:
    assert stage.call  # opens the connection if there is none
    assert stage.connection is not None

    def on_push(push: Push) -> None:
        if push.items[0] == b"progress":
            stage.on_progress(as_int(push.items[2]), as_int(push.items[3]))

    words = ("PREFILL", session, "TEXT", stage.text, "MODEL", stage.model, "REUSE", reuse)
    began = time.perf_counter()
    reply = stage.connection.call(*words, on_push=on_push)
    seconds = time.perf_counter() - began
    if isinstance(reply, ErrorReply):
        raise CommandError(reply.text)
    found = plain(reply)
    if not isinstance(found, dict):
        raise CommandError(f"PREFILL answered {found!r}")
    return found, seconds


def _timed(stage: Stage, *words: str | int | float) -> tuple[dict[str, object], float]:
    began = time.perf_counter()
    reply = stage.call.map(*words)
    return reply, time.perf_counter() - began


def _text(value: object) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


def _quoted(value: object) -> str:
    """Generated text on one line, safe inside rich markup."""
    return " ".join(_text(value).split()).replace("[", "\\[")
