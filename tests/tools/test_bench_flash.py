"""The scenarios at full geometry, run at a small one: they work, and their tables hold what they say."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from kvdb_tools.bench import flash, fork, prefix, replay, restore, sample, snapshot, startup
from kvdb_tools.bench.redis_bytes import RedisBytes
from kvdb_tools.bench.redis_server import RedisServer
from kvdb_tools.bench.scenario import MissingError, Result, Settings

SMALL = "synthetic:dsv4-flash,layers=4,window=8"
needs_redis = pytest.mark.skipif(not shutil.which("redis-server"), reason="redis-server is not installed")


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(tmp_path, True, SMALL, lambda _: None)


def numbers(result: Result) -> None:
    """Every row is as wide as the table, and every number is positive."""
    assert result.rows
    for row in result.rows:
        assert len(row) == len(result.columns), row
        assert all(cell >= 0 for cell in row if isinstance(cell, int | float)), row


@needs_redis
def test_snapshot(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flash, "SIZES", (3000,))
    monkeypatch.setattr(snapshot, "ds4_file_bytes", lambda _: 1 << 20)
    result = snapshot.run(settings)
    numbers(result)
    row = dict(zip(result.columns, result.rows[0], strict=True))
    # A step writes its pages and a tail, the first snapshot all pages.
    assert 0 < float(row["step MB"] or 0) < float(row["first MB"] or 0)


@needs_redis
def test_restore(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flash, "SIZES", (3000,))
    monkeypatch.setattr(restore, "REDIS_TOKENS", 3000)
    monkeypatch.setattr(restore, "ds4_file_bytes", lambda _: 1 << 20)
    result = restore.run(settings)
    numbers(result)
    assert [row[0] for row in result.rows] == [2048, 3000]
    rows = [dict(zip(result.columns, row, strict=True)) for row in result.rows]
    assert (rows[0]["Redis GET ms"], rows[1]["Redis GET ms"] is None) == (None, False)
    assert all(0 < float(row["in the daemon ms"] or 0) < float(row["warm ms"] or 0) for row in rows)


def test_fork(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flash, "SIZES", (3000,))
    monkeypatch.setattr(fork, "QUICK_FORKS", 20)
    monkeypatch.setattr(fork, "BATCH", 10)
    result = fork.run(settings)
    numbers(result)
    assert [row[1] for row in result.rows[:3]] == [20, 20, 20]
    for row in result.rows[:2]:
        cells = dict(zip(result.columns, row, strict=True))
        assert 0 < float(cells["in the daemon p50"] or 0) <= float(cells["p99"] or 0)


def test_prefix(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix, "BRANCHES", 4)
    monkeypatch.setattr(prefix, "PROMPT_TOKENS", 2000)
    settings = Settings(settings.scratch, False, SMALL, settings.say)
    monkeypatch.setattr(prefix, "SNAPSHOTS", 30)
    result = prefix.run(settings)
    numbers(result)
    assert [row[2] for row in result.rows] == [2000, 1000, 0, 2000]


@needs_redis
def test_sample(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample, "N_TOKENS", 500)
    monkeypatch.setattr(sample, "REPEATS", 20)
    result = sample.run(settings)
    numbers(result)
    assert len(result.rows) == 6


@needs_redis
def test_startup(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(startup, "STATE_TOKENS", 3000)
    monkeypatch.setattr(startup, "QUICK_BYTES", 4 << 20)
    result = startup.run(settings)
    numbers(result)
    assert [row[0] for row in result.rows] == ["kvdb, empty", "kvdb", "redis-server"]


def test_replay_writes_each_row_once(settings: Settings) -> None:
    result = replay.run(settings)
    numbers(result)
    row = dict(zip(result.columns, result.rows[-1], strict=True))
    assert row["snapshots"] == 31
    assert 90 < float(row["reused %"] or 0) <= 100
    # The block layer sees whole file system pages, and the index.
    assert 1 <= float(row["written / unique"] or 0) < 2.5
    assert list(settings.scratch.glob("trace*/")) == []


@needs_redis
def test_redis_gives_back_what_was_set(tmp_path: Path) -> None:
    with RedisServer(tmp_path / "redis", "no") as server, RedisBytes(server.target.port) as redis:
        assert redis.set("a", 3_000_001, b"x" * 1000) > 0
        assert redis.get("a")[0] == 3_000_001
        assert redis.get("a")[0] == 3_000_001
        assert server.pid > 0


def test_without_redis_a_scenario_says_so(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(MissingError, match="redis-server"), RedisServer(settings.scratch, "no"):
        pass


def test_files_are_dropped_and_read(tmp_path: Path) -> None:
    (tmp_path / "segments").mkdir()
    for number in (2, 1):
        (tmp_path / "segments" / f"{number}.seg").write_bytes(bytes(100_000))
    flash.drop_cache(tmp_path)
    paths = flash.segments_of(tmp_path)
    assert [path.name for path in paths] == ["1.seg", "2.seg"]
    assert flash.read_plain(paths, 150_000) > 0 and flash.read_into_memory(paths, 150_000) > 0


def test_what_the_kernel_does_not_tell_is_zero() -> None:
    assert (flash.io_written([-1]), flash.peak_rss(-1), flash.children_of(-1)) == (0, 0, [])
    assert flash.percentile([3.0, 1.0, 2.0], 0.5) == 2.0
