"""The simulated store against a slow one that recounts everything, and what the policies come to."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from kvdb_engine.catalog import open_model
from kvdb_tools.bench import eviction
from kvdb_tools.bench.cachesim import CacheSim, Columns, Workload, build_workload, snapshot_tail_bytes
from kvdb_tools.bench.ds4_files import ds4_file_bytes, noise, write_file
from kvdb_tools.bench.scenario import Settings
from kvdb_tools.traces import Request, Trace

LAYOUT = open_model("synthetic:dsv4-flash").layout
TRACES = Path(__file__).parents[1] / "vectors" / "traces"


def made_up(n_requests: int = 60, seed: int = 1) -> Trace:
    """Prompts that extend, repeat and branch off earlier ones; blocks of 64."""
    choose = random.Random(seed)
    prompts: list[tuple[int, ...]] = []
    requests = []
    for number in range(n_requests):
        base = choose.choice(prompts) if prompts and choose.random() < 0.8 else ()
        base = base[: choose.randint(len(base) // 2, len(base))]
        blocks = (*base, *(1000 * number + block for block in range(choose.randint(1, 60))))
        prompts.append(blocks)
        requests.append(Request(float(number), 64 * len(blocks), 0, blocks))
    return Trace("made up", 64, tuple(requests))


class Checked(CacheSim):
    """Recounts bytes, freed bytes, covers and children after every step."""

    def _make_room(self, new: int, source: int, now: float) -> None:
        self.check()
        super()._make_room(new, source, now)
        self.check()
        assert self.bytes <= self.budget

    def check(self) -> None:
        points, work, columns = self.work.points, self.work, self.columns
        stored = [int(n) for n in np.flatnonzero(self._stored)]
        reach: dict[int, int] = {}
        for n in stored:
            for page in points[n].pages:
                reach[page] = reach.get(page, 0) + 1
        total = work.page_bytes * len(reach) + sum(points[n].tail_bytes for n in stored)
        assert self.bytes == total
        covers = {}
        for n in stored:
            alone = sum(reach[page] == 1 for page in points[n].pages)
            assert columns.freed[n] == points[n].tail_bytes + work.page_bytes * alone
            covers[n] = next((one for one in points[n].ancestors if one in stored), -1)
            assert columns.covered[n] == (points[covers[n]].n_tokens if covers[n] >= 0 else 0)
        for n in stored:
            assert columns.children[n] == sum(cover == n for cover in covers.values())


@pytest.fixture(scope="module")
def work() -> Workload:
    return build_workload([made_up()], LAYOUT, spacing_s=0, every_tokens=1024)


@pytest.mark.parametrize("name", sorted(eviction.POLICIES))
def test_the_books_are_right_under_every_policy(work: Workload, name: str) -> None:
    outcome = Checked(work, 150e6, eviction.POLICIES[name]).run()
    assert outcome.evicted > 0
    assert 0 < outcome.share < 1
    assert outcome.requests == 60


def test_without_a_limit_nothing_is_evicted(work: Workload) -> None:
    outcome = Checked(work, float("inf"), eviction.lru).run()
    assert outcome.evicted == 0
    tight = Checked(work, 150e6, eviction.lru).run()
    assert tight.saved < outcome.saved <= outcome.n_tokens
    assert tight.peak_bytes <= outcome.peak_bytes


def test_a_state_larger_than_the_budget_is_not_kept(work: Workload) -> None:
    outcome = CacheSim(work, 1e6, eviction.lru).run()
    assert outcome.saved == 0 and outcome.hits == 0


def test_candidates_are_the_prefixes_of_a_prompt() -> None:
    trace = Trace("t", 64, (Request(0, 64, 0, (1,)), Request(1, 192, 0, (1, 2, 3)), Request(2, 128, 0, (1, 9))))
    made = build_workload([trace, trace], LAYOUT, spacing_s=10, every_tokens=1 << 20)
    assert [point.n_tokens for point in made.points] == [64, 192, 128] * 2
    assert [point.ancestors for point in made.points] == [(), (0,), (0,), (), (3,), (3,)]
    assert [event.candidates for event in made.events] == [(0,), (1, 0), (2, 0), (3,), (4, 3), (5, 3)]
    assert [event.time_s for event in made.events] == [0, 1, 2, 10, 11, 12]


def test_tail_bytes_are_those_of_the_layout() -> None:
    # Ids, text, logits, windows, frontiers: 43 windows of 128 rows; after 512 tokens only the ratio-4 group is open.
    least = 4 * 129280 + 43 * 128 * 583 + 21 * 2 * 4 * (4 * 1024 + 4 * 256)
    assert least < snapshot_tail_bytes(LAYOUT, 512) < least + 8192
    assert snapshot_tail_bytes(LAYOUT, 511) > snapshot_tail_bytes(LAYOUT, 512) + 20 * 2 * 2048 * 127


def columns(**changes: float) -> Columns:
    plain = dict.fromkeys(Columns.__dataclass_fields__, 1.0) | {"n_tokens": 1000.0, "covered": 0.0, "children": 0.0}
    return Columns(**{name: np.array([value, changes.get(name, value)]) for name, value in plain.items()})


@pytest.mark.parametrize(
    ("changes", "order"),
    [
        ({"used": 50.0}, 1),
        ({"hits": 5.0}, 1),
        ({"freed": 2.0}, -1),
        ({"covered": 900.0}, -1),
        ({"children": 1.0}, -1),
    ],
)
def test_value_orders_as_it_says(changes: dict[str, float], order: int) -> None:
    first, second = eviction.value(columns(**changes), 100.0)
    assert np.sign(second - first) == order


def test_ds4_file_sizes() -> None:
    # Sizes that files of ds4 have at these token counts.
    assert [ds4_file_bytes(n) for n in (2048, 20480, 100_000)] == [52_184_460, 305_882_508, 1_400_385_548]


def test_files_are_written_whole(tmp_path: Path) -> None:
    chunk = noise(1000)
    for sync in (False, True):
        assert write_file(tmp_path / "a.kv", 2500, chunk, sync=sync) > 0
        assert (tmp_path / "a.kv").read_bytes() == chunk + chunk + chunk[:500]
    assert [path.name for path in tmp_path.iterdir()] == ["a.kv"]


def test_the_scenario_on_the_repositorys_traces(tmp_path: Path) -> None:
    result = eviction.run(Settings(tmp_path, True, "dsv4-nano", lambda _: None))
    assert [row[:2] for row in result.rows] == [["3 agents", 4], ["3 agents", 16], ["3 agents", 64]]
    assert all(len(row) == len(result.columns) for row in result.rows)
