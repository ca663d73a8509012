"""Work done ahead: every piece once, never further ahead than allowed, errors where they are asked for."""

from __future__ import annotations

import threading

import pytest

from kvdb_engine import read_ahead
from kvdb_engine.read_ahead import ReadAhead


@pytest.mark.parametrize("helpers", [0, 1, 3])
def test_every_piece_is_done_once_and_in_time(monkeypatch: pytest.MonkeyPatch, helpers: int) -> None:
    monkeypatch.setattr(read_ahead, "HELPERS", helpers)
    done: list[int] = []
    asked = 0
    too_early: list[int] = []

    def work(number: int) -> None:
        if number >= asked + 4:
            too_early.append(number)
        done.append(number)

    ahead = ReadAhead(work, 200, 4)
    for number in range(200):
        asked = number
        ahead.wait_for(number)
        assert number in done
    ahead.close()
    assert sorted(done) == list(range(200))
    assert not too_early


def test_who_waits_works_too() -> None:
    """The helper cannot get past piece 0 before piece 1 is done, which only the waiting thread can do."""
    helper_has = threading.Event()
    other_done = threading.Event()
    threads: dict[int, int] = {}

    def work(number: int) -> None:
        threads[number] = threading.get_ident()
        if threading.get_ident() != own:
            helper_has.set()
            assert other_done.wait(10)
        elif helper_has.is_set():
            other_done.set()

    own = threading.get_ident()
    ahead = ReadAhead(work, 8, 8)
    assert helper_has.wait(10)
    for number in range(8):
        ahead.wait_for(number)
    ahead.close()
    assert len(threads) == 8
    assert len(set(threads.values())) >= 2


def test_an_error_is_raised_where_its_piece_is_asked_for() -> None:
    def work(number: int) -> None:
        if number == 2:
            raise ValueError("piece 2")

    ahead = ReadAhead(work, 5, 5)
    ahead.wait_for(0)
    ahead.wait_for(1)
    with pytest.raises(ValueError, match="piece 2"):
        ahead.wait_for(2)
    ahead.wait_for(3)
    ahead.close()


def test_closing_waits_for_what_is_under_way_and_begins_nothing() -> None:
    begun, go_on = threading.Event(), threading.Event()
    done: list[int] = []

    def work(number: int) -> None:
        begun.set()
        assert go_on.wait(10)
        done.append(number)

    ahead = ReadAhead(work, 100, 100)
    assert begun.wait(10)
    threading.Timer(0.05, go_on.set).start()
    ahead.close()
    assert 1 <= len(done) <= read_ahead.HELPERS
    n_done = len(done)
    with pytest.raises(RuntimeError, match="closed"):
        ahead.wait_for(99)
    assert len(done) == n_done
