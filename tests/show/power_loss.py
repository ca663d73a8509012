"""Simulated power losses: whatever was acknowledged is there, nothing else is wrong, and the store opens clean.

A load of three clients at once (snapshots, forks, copies, renames, small and large strings, deletes, expiries,
evictions, collections, compactions) runs on a file layer that records every call; every other load is killed some
times, at any call, and started again. From the log the disk is rebuilt as
power may leave it at a random moment: writes since a file's last sync are kept, dropped or torn at a 512-byte sector
one by one, which covers reordering, and names whose directory was not synced may be missing. Each such disk is opened
as a daemon opens it, checked deeply, and every key is compared with what clients had been told by then.

    python tests/show/power_loss.py [--quick] [--states N] [--seed N]
"""

from __future__ import annotations

import asyncio
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import click
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parents[2]))

from kvdb.store import compact, segments
from tests.kvdb.store.power import Verdict, run_lives, run_load, try_states

STATES_EACH = 50  # of one load


async def run(states: int, seed: int, scratch: Path, verdict: Verdict) -> tuple[Counter[str], int]:
    actions: Counter[str] = Counter()
    loads = 0
    while verdict.states < states:
        loads += 1
        folder = scratch / f"load{loads}"
        files = await (run_lives(folder, seed + loads) if loads % 2 else run_load(folder, seed + loads))
        share = min(STATES_EACH, states - verdict.states)
        rng = random.Random(f"{seed} {loads}")
        actions += await try_states(files, share, rng, scratch / "state", verdict)
    return actions, loads


@click.command()
@click.option("--quick", is_flag=True, help="40 states.")
@click.option("--states", default=1000, show_default=True)
@click.option("--seed", default=1, show_default=True)
def main(quick: bool, states: int, seed: int) -> None:
    """Print what was tried and compared; exit 1 when anything is lost, wrong or damaged."""
    console = Console(highlight=False, soft_wrap=True)
    segments.SEGMENT_BYTES, compact.BATCH_BYTES = 300_000, 100_000  # so that there are many, and compaction has work
    states = 40 if quick else states
    verdict = Verdict()
    began = time.time()
    with tempfile.TemporaryDirectory() as scratch:
        actions, loads = asyncio.run(run(states, seed, Path(scratch), verdict))
    console.print(f"{loads} loads: {', '.join(f'{name} {count}' for name, count in actions.most_common())}")
    for problem in verdict.problems():
        console.print(problem, markup=False)
    console.print(
        f"{verdict.states} power losses in {time.time() - began:.0f} s: {verdict.compared} keys compared, "
        f"{verdict.certain} of them with one acknowledged value: {len(verdict.lost)} lost, {len(verdict.wrong)} wrong, "
        f"{len(verdict.damaged)} findings of the deep check"
    )
    raise SystemExit(1 if verdict.problems() or not verdict.certain else 0)


if __name__ == "__main__":
    main()
