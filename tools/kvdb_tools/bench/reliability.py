"""An agent's task of N steps that all must come out right: without going back, and with k tries a step.

The model works through chains of requests; each step is tried from its snapshot until it is right, at most ten times,
and the number of tries is kept. A step that never came out right is carried out for the model, so that the chain goes
on. A run of N steps succeeds with k tries a step when none of its steps took more than k. Runs are cut from the chains
without overlap, so all of them began in a right state, and runs for different k are the same runs.

Two predictions stand beside what was measured. The formula (1-(1-p)^k)^N takes all tries for independent, that is all
steps for equally hard. (1-q_k)^N takes only the steps for independent of each other: q_k is the measured share of steps
that failed k tries in a row, which counts the hard ones as what they are.
"""

from __future__ import annotations

import random
import time
from dataclasses import dataclass
from statistics import median

import kvdb
from kvdb.agents import RetriesExhausted, retry
from kvdb.client import Session
from kvdb_engine.catalog import open_model
from kvdb_engine.chat import chat_ids, render_chat, segment_ids
from kvdb_engine.dsml import ReplyParser, ToolCall
from kvdb_engine.tokenizer import DSML, Tokenizer
from kvdb_tools.bench.agent_task import TOOLS, Request, Task, is_right
from kvdb_tools.bench.scenario import Curve, Curves, Result, Settings
from kvdb_tools.daemon import Daemon

LENGTHS = (5, 10, 20, 50, 100)
TRIES = (1, 2, 3, 10)
COST_TOKENS = 8192
LEAST_RATIO = 100  # how many times as long a prefill must take as a RESTORE
_STOP = f"</{DSML}tool_calls>"
_TEMPERATURE = 1.0
# The model's own distribution. A min_p of 0.05, the default, drops unlikely tokens; where the right one is among them
# no number of tries helps.
_MIN_P = 0.0
_SEED = 20_260


@dataclass(frozen=True, slots=True)
class Cost:
    """Median ms to stand at a step again: with kvdb, and by prefilling its context. tokens: of the context."""

    tokens: int
    restore_ms: float
    prefill_ms: float


def run(settings: Settings) -> Result:
    """Run the chains, then measure what one more try costs at a long context."""
    n_chains, n_steps = (2, 20) if settings.quick else (8, 100)
    tokenizer = open_model(settings.model).tokenizer
    tries: list[list[int]] = []
    daemon = Daemon(settings.scratch / "kvdb", {"model": settings.model})
    with daemon, kvdb.Client("127.0.0.1", daemon.port) as client:
        for chain in range(n_chains):
            tries.append(run_chain(client, tokenizer, chain, n_steps))
            wrong = sum(one > 1 for one in tries[-1])
            settings.say(f"chain {chain + 1} of {n_chains}: {wrong} of {n_steps} steps were wrong at first")
        cost = measure_cost(client, tokenizer, 2048 if settings.quick else COST_TOKENS)
    return make_result(tries, cost)


def run_chain(client: kvdb.Client, tokenizer: Tokenizer, chain: int, n_steps: int) -> list[int]:
    """Tries that each step took; one more than the most allowed for a step that never came out right."""
    task = Task(random.Random(_SEED + chain))
    request = task.next()
    taken = []
    with client.session() as session:
        session.prefill(chat_ids(tokenizer, {"messages": [_user(request)], "tools": list(TOOLS)}))
        for number in range(n_steps):
            taken.append(_step(session, request, 1000 * (n_steps * chain + number)))
            if taken[-1] > max(TRIES):
                session.extend(_by_hand(tokenizer, request))
            after = task.next()
            session.extend(_between(tokenizer, request, after))
            request = after
    return taken


def _step(session: Session, request: Request, seed: int) -> int:
    def attempt(session: Session, number: int) -> tuple[ToolCall, ...]:
        reply = session.generate(100, temperature=_TEMPERATURE, min_p=_MIN_P, seed=seed + number, stop=[_STOP])
        parser = ReplyParser()
        parser.feed(reply.text)
        return parser.reply().calls

    try:
        return retry(session, attempt, lambda calls: is_right(request, calls), max(TRIES)).tries
    except RetriesExhausted:
        return max(TRIES) + 1


def _user(request: Request) -> dict[str, object]:
    return {"role": "user", "content": request.text}


def _between(tokenizer: Tokenizer, done: Request, after: Request) -> list[int]:
    """From the end of a tool block to the next request: the tool's result, the answer, the request."""
    messages: list[dict[str, object]] = [
        {"role": "assistant", "content": ""},
        {"role": "tool", "content": done.result},
        {"role": "assistant", "content": done.reply},
        _user(after),
    ]
    return segment_ids(tokenizer, render_chat(messages)[1:])


def _by_hand(tokenizer: Tokenizer, request: Request) -> list[int]:
    """The right call, for a step that the model did not get right."""
    function = {"name": request.right.name, "arguments": request.right.arguments}
    ids = segment_ids(tokenizer, render_chat([{"role": "assistant", "tool_calls": [{"function": function}]}]))
    return [one for one in ids if one not in (tokenizer.bos_id, tokenizer.eos_id)]


def measure_cost(client: kvdb.Client, tokenizer: Tokenizer, tokens: int) -> Cost:
    """What it costs to stand at a step of a long context again."""
    ids = tokenizer.encode("The ship went on through the night, and nobody on deck spoke a word. " * tokens)[:tokens]
    restore, prefill = [], []
    with client.session() as session:
        session.prefill(ids)
        session.snapshot("cost")
        for number in range(9):
            session.generate(5, seed=number)
            began = time.perf_counter()
            session.restore("cost")
            restore.append((time.perf_counter() - began) * 1e3)
        for _ in range(2):
            began = time.perf_counter()
            session.prefill(ids, reuse="NO")
            prefill.append((time.perf_counter() - began) * 1e3)
    client.delete("cost")
    return Cost(tokens, median(restore), median(prefill))


def wilson(hits: int, n: int) -> tuple[float, float]:
    """The 95 % interval of a proportion."""
    z = 1.96
    p, square = hits / n, z * z / n
    middle = (p + square / 2) / (1 + square)
    half = z / (1 + square) * (p * (1 - p) / n + square / (4 * n)) ** 0.5
    return max(0.0, middle - half), min(1.0, middle + half)


def successes(tries: list[list[int]], length: int, k: int) -> tuple[int, int]:
    """(runs that succeed with k tries a step, runs of this length)."""
    runs = [chain[at : at + length] for chain in tries for at in range(0, len(chain) - length + 1, length)]
    return sum(max(run) <= k for run in runs), len(runs)


def expected(p: float, length: int, k: int) -> float:
    """(1-(1-p)^k)^N: the chance of N steps with k tries each, if steps and tries are independent."""
    return float((1 - (1 - p) ** k) ** length)


def make_result(tries: list[list[int]], cost: Cost) -> Result:
    """The table: measured success beside the two predictions, for each N and k."""
    steps = [one for chain in tries for one in chain]
    failed = {k: sum(one > k for one in steps) for k in TRIES}  # steps that failed k tries in a row
    n = len(steps)
    p = 1 - failed[1] / n
    low, high = wilson(n - failed[1], n)
    columns = ("steps", "tries a step", "runs", "succeed %", "95 %", "formula %", "(1-q)^N %")
    result = Result("A task whose every step must be right", columns)
    lengths = [length for length in LENGTHS if length <= len(tries[0])]
    for length in lengths:
        for k in TRIES:
            good, runs = successes(tries, length, k)
            interval = wilson(good, runs)
            predicted = (expected(p, length, k), (1 - failed[k] / n) ** length)
            row = [f"{100 * good / runs:.1f}", f"{100 * interval[0]:.0f}-{100 * interval[1]:.0f}"]
            result.rows.append([length, k, runs, *row, *(f"{100 * one:.1f}" for one in predicted)])
    result.curves = _curves(tries, lengths, p, {k: failed[k] / n for k in TRIES})
    result.notes.append(
        f"p, one step right at the first try: {p:.3f} (95 %: {low:.3f} to {high:.3f}), {n - failed[1]} of {n} steps at"
        f" temperature {_TEMPERATURE:g}, min_p {_MIN_P:g}"
    )
    shares = []
    for k in TRIES:
        low, high = wilson(failed[k], n)
        shares.append(f"{k}: {100 * failed[k] / n:.2f} ({100 * low:.2f} to {100 * high:.2f})")
    result.notes.append(f"q, % of steps that failed so many tries in a row: {', '.join(shares)}")
    result.notes.append(
        "formula: (1-(1-p)^k)^N, for one try p^N: right if all steps are equally hard; (1-q)^N counts the hard ones"
    )
    ratio = cost.prefill_ms / cost.restore_ms
    result.notes.append(
        f"to stand at a step again at {cost.tokens:,} tokens: RESTORE {cost.restore_ms:.1f} ms, prefill"
        f" {cost.prefill_ms:,.0f} ms: {ratio:,.0f} times as long"
    )
    if cost.tokens >= COST_TOKENS:
        claim = f"at {cost.tokens:,} tokens a retry costs at most 1/{LEAST_RATIO} of prefilling again: 1/{ratio:,.0f}"
        result.claims.append((claim, ratio >= LEAST_RATIO))
    return result


def _tries(k: int) -> str:
    return "1 try" if k == 1 else f"{k} tries"


def _curves(tries: list[list[int]], lengths: list[int], p: float, q: dict[int, float]) -> Curves:
    panels = {}
    for k in TRIES:
        found = [successes(tries, length, k) for length in lengths]
        intervals = [wilson(good, runs) for good, runs in found]
        panels[f"{_tries(k)} a step"] = {
            "measured, 95 % interval": Curve(
                [100 * good / runs for good, runs in found],
                [100 * low for low, _ in intervals],
                [100 * high for _, high in intervals],
            ),
            "formula: all steps equally hard": Curve([100 * expected(p, length, k) for length in lengths]),
            "from the measured share of steps that fail so often": Curve(
                [100 * (1 - q[k]) ** length for length in lengths]
            ),
        }
    return Curves("runs that succeed, %", "steps in a row", lengths, panels)
