from __future__ import annotations

import pytest

from kvdb.client.replies import EngineStatus, Filled, Generated, PrefixMatch, Running, SnapInfo, plain, read

FILLED = {b"tokens": 5, b"reused": 2, b"computed": 3, b"source": b"live", b"ms": 1.5}


def test_a_resp3_map_and_a_resp2_array_read_alike() -> None:
    flat = [b"tokens", 5, b"reused", 2, b"computed", 3, b"source", b"live", b"ms", b"1.5"]
    assert read(Filled, FILLED) == read(Filled, flat) == Filled(5, 2, 3, "live", 1.5)


def test_unknown_fields_are_ignored_and_missing_ones_are_not() -> None:
    assert read(Filled, {**FILLED, b"later": 1}).tokens == 5
    with pytest.raises(KeyError):
        read(Filled, {b"tokens": 5})


def test_text_is_decoded_and_data_is_not() -> None:
    reply = read(Generated, {b"text": b"caf\xc3", b"ids": [1, 2], b"tokens": 9, b"finish": b"length", b"ms": 0})
    assert (reply.data, reply.text, reply.ids) == (b"caf\xc3", "caf\ufffd", (1, 2))


def test_nil_fields_and_flags() -> None:
    fields = {b"key": None, b"id": b"ab", b"tokens": 1, b"of": 2, b"text_bytes": 3, b"same_quant": 1}
    assert read(PrefixMatch, fields) == PrefixMatch(None, "ab", 1, 2, 3, True)


def test_a_map_in_a_map() -> None:
    words = ["id", "key", "reason", "model", "fingerprint", "parent"]
    numbers = ["tokens", "created", "pages", "bytes_own", "bytes_shared", "pinned", "ttl_ms"]
    reply = {**{w.encode(): b"x" for w in words}, **{n.encode(): 1 for n in numbers}, b"meta": [b"step", b"3"]}
    assert read(SnapInfo, reply).meta == {"step": "3"}


def test_plain_makes_text_of_bytes() -> None:
    assert plain({b"a": [b"b", 1, None]}) == {"a": ["b", 1, None]}


def test_a_list_of_maps() -> None:
    numbers = dict.fromkeys([b"uptime_s", b"starts", b"resident_sessions", b"resident_bytes", b"rss_bytes"], 0)
    work = {b"session": None, b"op": b"generate", b"done": 1, b"total": 0, b"seconds": b"0.5"}
    reply = {b"model": b"m", b"state": b"running", b"pid": 7, b"requests": [work], b"backend": {}, **numbers}
    assert read(EngineStatus, reply).requests == (Running(None, "generate", 1, 0, 0.5),)
