"""Glob patterns against a slow, plain matcher written from Redis' description of them."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvdb.glob import matches

CASES = [
    (b"*", b"", True),
    (b"h?llo", b"hello", True),
    (b"h?llo", b"hllo", False),
    (b"h*llo", b"heeeello", True),
    (b"h[ae]llo", b"hallo", True),
    (b"h[^e]llo", b"hello", False),
    (b"h[a-c]llo", b"hbllo", True),
    (b"h[c-a]llo", b"hbllo", True),
    (b"\\*", b"*", True),
    (b"\\*", b"a", False),
    (b"[\\]]", b"]", True),
    (b"[]", b"a", False),
    (b"[^]", b"a", True),
    (b"[a", b"a", True),
    (b"a\\", b"a\\", True),
    (b"a.c", b"abc", False),
    (b"**a", b"bba", True),
    (b"*\n*", b"a\nb", True),
    (b"\xff*", b"\xff\x00", True),
    (b"", b"", True),
    (b"", b"a", False),
]


@pytest.mark.parametrize(("pattern", "text", "expected"), CASES)
def test_cases(pattern: bytes, text: bytes, expected: bool) -> None:
    assert matches(pattern, text) is expected


def plain(pattern: bytes, text: bytes) -> bool:
    """Without sets: try everything."""
    if not pattern:
        return not text
    if pattern[:1] == b"*":
        return any(plain(pattern[1:], text[at:]) for at in range(len(text) + 1))
    if pattern[:1] == b"\\" and len(pattern) > 1:
        return text[:1] == pattern[1:2] and plain(pattern[2:], text[1:])
    return bool(text) and pattern[:1] in (b"?", text[:1]) and plain(pattern[1:], text[1:])


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.sampled_from([b"a", b"b", b"*", b"?", b"\\a", b"\\*", b"."]), max_size=8).map(b"".join),
    st.lists(st.sampled_from([b"a", b"b", b"*", b"."]), max_size=8).map(b"".join),
)
def test_like_the_plain_matcher(pattern: bytes, text: bytes) -> None:
    assert matches(pattern, text) is plain(pattern, text)


def test_no_pattern_is_slow() -> None:
    began = time.perf_counter()
    assert not matches(b"*a" * 50 + b"b", b"a" * 5000)
    assert not matches(b"*?" * 50 + b"b", b"a" * 5000)
    assert time.perf_counter() - began < 1
