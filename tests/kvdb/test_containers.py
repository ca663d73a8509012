"""Hashes and sorted sets in memory: against plain models, and what a copy shares."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from kvdb.containers import Fields, Members
from kvdb.store.entries import Entry, EntryType, decode_entry, encode_entry

names = st.sampled_from([b"a", b"b", b"c", b"", b"\xff"])
scores = st.sampled_from([0.0, 1.0, -1.5, float("inf"), float("-inf")])
steps = st.lists(st.tuples(st.sampled_from(["add", "remove", "range", "copy"]), names, scores), max_size=40)


@settings(max_examples=300, deadline=None)
@given(steps)
def test_members_stay_ordered(changes: list[tuple[str, bytes, float]]) -> None:
    members, model = Members(), dict[bytes, float]()
    for what, name, score in changes:
        if what == "add":
            assert members.add(name, score) is (name not in model)
            model[name] = score
        elif what == "remove":
            assert members.remove(name) is (model.pop(name, None) is not None)
        elif what == "range":
            for _, gone in sorted((score, name) for name, score in model.items())[:2]:
                del model[gone]
            members.remove_range(0, 2)
        else:
            members = members.duplicate()
        expected = sorted((score, name) for name, score in model.items())
        assert members.ordered == expected and members.scores == model
        assert [members.rank(name) for _, name in expected] == list(range(len(expected)))
        assert members.scan(0, 1)[1] is not None


def test_writable_copies_once_a_round() -> None:
    fields = Fields({b"a": b"1"})
    first = fields.writable(5)
    assert first is not fields and first.writable(5) is first and first.writable(6) is not first
    first.add(b"b", b"2")
    assert b"b" not in fields
    members = Members({b"a": 1.0})
    changed = members.writable(5)
    changed.add(b"b", 2.0)
    assert b"b" not in members.scores and len(members.ordered) == 1


def test_scan_returns_what_stays() -> None:
    """Members are added and removed between calls: those that stay from first to last are seen."""
    rng = random.Random(1)
    for make, add, remove in (
        (
            lambda: Fields((b"k%d" % n, b"") for n in range(1000)),
            lambda c, k: c.add(k, b""),
            lambda c, k: c.pop(k, None),
        ),
        (lambda: Members({b"k%d" % n: 1.0 for n in range(1000)}), lambda c, k: c.add(k, 2.0), lambda c, k: c.remove(k)),
    ):
        container = make()
        stays = {b"k%d" % n for n in range(0, 1000, 2)}
        seen: list[bytes] = []
        cursor = 0
        while True:
            cursor, names = container.scan(cursor, 10)
            seen += names
            for _ in range(20):
                remove(container, b"k%d" % (2 * rng.randrange(500) + 1))
                add(container, b"new%d" % rng.randrange(10**6))
            if not cursor:
                break
        assert stays <= set(seen)


def test_values_come_back_from_disk() -> None:
    fields = Fields([(b"z", b"\x00"), (b"a", b"")])
    entry = decode_entry(encode_entry(b"k", Entry(EntryType.HASH, 7, fields)))
    assert isinstance(entry.value, Fields) and list(entry.value.items()) == [(b"z", b"\x00"), (b"a", b"")]
    members = Members({b"a": float("inf"), b"b": 0.1})
    entry = decode_entry(encode_entry(b"k", Entry(EntryType.ZSET, 0, members)))
    assert isinstance(entry.value, Members) and entry.value.ordered == members.ordered
