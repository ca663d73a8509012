"""crash_loop.py's idea of what may be found after a crash can fail: every kind of difference is one."""

from __future__ import annotations

import time

import pytest

from tests.show.crash.truth import NEVER, Seen, Truth, Value, differences


def seen(kind: str, digest: bytes, expires: float = NEVER) -> Seen:
    return Seen(kind, digest, expires, time.time())


def acknowledged(effect: dict[bytes, Value | None]) -> Truth:
    truth = Truth()
    with truth.doing(effect):
        pass
    return truth


STRING = Value("string", b"1")


def test_what_was_acknowledged_must_be_there() -> None:
    assert acknowledged({b"a": STRING}).compare({b"a": seen("string", b"1")}) == []
    assert acknowledged({b"a": STRING}).compare({}) == ["lost: string a"]
    assert acknowledged({b"a": STRING}).compare({b"a": seen("string", b"2")}) == ["wrong: other bytes in string a"]
    assert acknowledged({b"a": STRING}).compare({b"a": seen("hash", b"1")}) == ["wrong: string a is a hash"]
    assert acknowledged({b"a": None}).compare({b"a": seen("string", b"1")})


def test_an_unfinished_transaction_is_whole_or_not_at_all() -> None:
    both = {b"a": seen("string", b"1"), b"b": seen("string", b"1")}
    for found in ({}, both, {b"a": both[b"a"]}):
        truth = Truth()
        with pytest.raises(ConnectionError), truth.doing({b"a": STRING, b"b": STRING}):
            raise ConnectionError
        assert bool(truth.compare(found)) == (len(found) == 1)
        assert truth.compare(found) == []  # what was found is the truth from then on


def test_a_refused_command_changes_nothing() -> None:
    truth = acknowledged({b"a": STRING})
    with pytest.raises(ValueError, match="NOSPACE"), truth.doing({b"a": None}):
        raise ValueError("NOSPACE")
    assert truth.compare({b"a": seen("string", b"1")}) == []


def test_only_volatile_snapshots_may_be_evicted_and_expiries_are_kept() -> None:
    soon = STRING.expiring(1000).settled(time.time())
    assert differences({b"a": Value("snapshot", b"1").expiring(10**7)}, {}) == []
    assert differences({b"a": STRING.expiring(10**7)}, {})
    assert differences({b"a": soon}, {b"a": seen("string", b"1", soon.since)}) == []
    assert differences({b"a": soon}, {b"a": seen("string", b"1")})
    past = Value("string", b"1", 0, 5.0, 6.0)
    assert differences({b"a": past}, {}) == []
    assert differences({b"a": past}, {b"a": seen("string", b"1", 5.0)})
