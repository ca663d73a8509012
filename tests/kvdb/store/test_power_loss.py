"""Power may go at any moment: what was acknowledged is there, bit by bit, and nothing else is wrong.

tests/show/power_loss.py tries many more states.
"""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest

from kvdb.store.store import Store
from tests.kvdb.store.faults import LoggingFiles, power_loss
from tests.kvdb.store.power import KEYS, Verdict, allowed, judge, run_lives, run_load, try_states
from tests.kvdb.store.states import MODEL, PAGE, pack_ids, snapshot_entry, tokens, write_snapshot


@pytest.mark.parametrize("seed", [1, 2])
async def test_power_loss(tmp_path: Path, seed: int) -> None:
    files = await run_load(tmp_path / "load", seed)
    verdict = Verdict()
    await try_states(files, 50, random.Random(seed), tmp_path / "state", verdict)
    assert verdict.problems() == []
    assert verdict.certain > 100


@pytest.mark.parametrize("seed", range(4))
async def test_power_loss_after_kills(tmp_path: Path, seed: int) -> None:
    """What a killed daemon left in memory only, the next one must bring to the disk before it builds on it."""
    files = await run_lives(tmp_path / "load", seed)
    verdict = Verdict()
    await try_states(files, 40, random.Random(seed), tmp_path / "state", verdict)
    assert verdict.problems() == []
    assert verdict.certain > 50


async def test_the_simulation_can_fail(tmp_path: Path) -> None:
    """A store that does not sync its segments is caught."""

    class Careless(LoggingFiles):
        def datasync(self, fd: int) -> None:
            pass

    files = Careless(tmp_path / "load" / "index")
    store = Store.open(tmp_path / "load", loop=asyncio.get_running_loop(), files=files)
    files.take_index()
    await store.register_model(MODEL)
    for number in range(5):
        new = await write_snapshot(store, tokens(PAGE, seed=number))
        files.note(("asked", {KEYS[number]: pack_ids(tokens(PAGE, seed=number))}, False))
        await store.commit_snapshot(new, key=(0, KEYS[number]), entry=snapshot_entry(new.id))
        files.note(("acknowledged", (KEYS[number],)))
    await store.close()
    power_loss(files.log, len(files.log), random.Random(1), tmp_path / "state")
    verdict = Verdict()
    try:
        await judge(tmp_path / "state", allowed(files, len(files.log)), verdict)
    except Exception as error:
        verdict.damaged.append(str(error))
    assert verdict.problems()
