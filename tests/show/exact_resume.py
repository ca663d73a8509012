"""Bit-exact resume: after a restart, a FORK or a REWIND a state continues with the very bytes of the undisturbed run.

For random triples (prompt length, position of the snapshot, continuation): the prompt is prefilled, a few tokens
follow, a SNAPSHOT is taken, and the session goes on: sampled tokens, an EXTEND, greedy tokens; LOGITS RAW is kept after
each. The daemon is killed and started again, and the snapshot continues the same way by RESTORE, by FORK and by
REWIND TO. Every one of the logits must be equal byte for byte.

    python tests/show/exact_resume.py [--quick] [--seed N] [--triples N]
"""

from __future__ import annotations

import hashlib
import random
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from kvdb_tools.cli.connection import Connection
from kvdb_tools.daemon import Caller, Daemon, as_ids, as_int
from kvdb_tools.demo.text import demo_text

LONGEST = 3000


@dataclass(frozen=True)
class Triple:
    """A prompt (start in the text and length), tokens sampled before the snapshot, and the continuation."""

    number: int
    prompt: tuple[int, ...]
    n_before: int
    n_sampled: int
    extension: tuple[int, ...]
    n_greedy: int


def random_triples(ids: list[int], count: int, longest: int, seed: int) -> list[Triple]:
    rng = random.Random(seed)
    triples = []
    for number in range(count):
        # Half of the lengths are near a border of windows, rows and pages, where mistakes live.
        length = rng.choice((1, 2, 3, 4, 5, 127, 128, 129, 511, 512, 513, 1023, 1024, 1025, 2047, 2048, 2049))
        if number % 2 or length > longest:
            length = rng.randint(1, longest)
        start = rng.randrange(len(ids) - length - 50)
        extension = tuple(ids[start + length : start + length + rng.randint(1, 40)])
        prompt = tuple(ids[start : start + length])
        triples.append(
            Triple(number, prompt, rng.choice((0, 0, 1, 7)), rng.randint(1, 12), extension, rng.randint(1, 8))
        )
    return triples


def continue_session(call: Caller, session: str, triple: Triple) -> list[bytes]:
    """Go on from the snapshot; one digest per step: sampled ids and logits, extension, greedy ids and logits."""
    found = []
    seed = 1000 + triple.number
    sampled = call.map("GENERATE", session, "MAXTOKENS", triple.n_sampled, "TEMPERATURE", 1, "SEED", seed)
    found.append(digest(call, session, as_ids(sampled["ids"])))
    call("EXTEND", session, "TOKENS", len(triple.extension), *triple.extension)
    found.append(digest(call, session, ()))
    greedy = call.map("GENERATE", session, "MAXTOKENS", triple.n_greedy, "TEMPERATURE", 0)
    found.append(digest(call, session, as_ids(greedy["ids"])))
    return found


def digest(call: Caller, session: str, ids: tuple[int, ...]) -> bytes:
    logits = call.data("LOGITS", session, "RAW")
    assert logits
    return hashlib.sha256(repr(ids).encode() + logits).digest()


def run_undisturbed(call: Caller, triple: Triple) -> list[bytes]:
    name = f"run:{triple.number}"
    call("PREFILL", name, "TOKENS", len(triple.prompt), *triple.prompt, "REUSE", "NO")
    if triple.n_before:
        call("GENERATE", name, "MAXTOKENS", triple.n_before, "TEMPERATURE", 1, "SEED", triple.number)
    at_snapshot = digest(call, name, ())
    call("SNAPSHOT", name, f"snap:{triple.number}")
    return [at_snapshot, *continue_session(call, name, triple)]


def resume(call: Caller, triple: Triple) -> dict[str, list[bytes]]:
    """The same continuation from the stored state, three ways."""
    key, restored, forked = (f"{kind}:{triple.number}" for kind in ("snap", "restored", "forked"))
    ways = {}
    call("RESTORE", key, restored)
    ways["RESTORE"] = [digest(call, restored, ()), *continue_session(call, restored, triple)]
    call("FORK", key, forked)
    ways["FORK"] = [digest(call, forked, ()), *continue_session(call, forked, triple)]
    call("REWIND", restored, "TO", key)
    ways["REWIND TO"] = [digest(call, restored, ()), *continue_session(call, restored, triple)]
    return ways


@click.command()
@click.option("--quick", is_flag=True, help="6 triples of up to 600 tokens.")
@click.option("--triples", "count", default=50, show_default=True)
@click.option("--seed", default=1, show_default=True)
@click.option("--model", default="dsv4-nano", show_default=True)
def main(quick: bool, count: int, seed: int, model: str) -> None:
    """Print the table; exit 1 when any logits differ."""
    console = Console(highlight=False)
    count, longest = (6, 600) if quick else (count, LONGEST)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch, Daemon(Path(scratch) / "data", {"model": model}) as daemon:
        with Connection(daemon.target) as connection:
            call = Caller(connection)
            ids = [as_int(token) for token in call.list("TOKENIZE", model, demo_text())]
            triples = random_triples(ids, count, longest, seed)
            expected = {triple.number: run_undisturbed(call, triple) for triple in triples}
        daemon.kill()
        daemon.start()
        wrong: dict[str, list[int]] = {"RESTORE": [], "FORK": [], "REWIND TO": []}
        with Connection(daemon.target) as connection:
            call = Caller(connection)
            for triple in triples:
                for way, found in resume(call, triple).items():
                    if found != expected[triple.number]:
                        wrong[way].append(triple.number)
                        where = [a == b for a, b in zip(found, expected[triple.number], strict=True)]
                        console.print(
                            f"triple {triple.number} by {way}: equal at each step: {where}; {triple.prompt[:3]}..."
                        )
    lengths = sorted(len(triple.prompt) for triple in triples)
    table = Table(title=f"{count} triples, prompts of {lengths[0]} to {lengths[-1]} tokens, seed {seed}")
    for name in ("after SIGKILL and restart", "triples", "logits compared", "different"):
        table.add_column(name, justify="left" if name.startswith("after") else "right")
    for way, numbers in wrong.items():
        table.add_row(way, str(count), str(4 * count), str(len(numbers)))
    console.print(table)
    console.print(f"{time.perf_counter() - began:.0f} s")
    raise SystemExit(1 if any(wrong.values()) else 0)


if __name__ == "__main__":
    main()
