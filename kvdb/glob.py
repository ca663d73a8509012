"""Glob patterns as in KEYS, SCAN, PSUBSCRIBE and ACL rules: `*`, `?`, `[a-c]`, `[^x]`, and `\\` before a character.

A pattern is translated into a regular expression once. Runs of `*` become one, and each `*` takes as little as it can
without going back (atomic groups), so that no pattern takes exponential time.
"""

from __future__ import annotations

import re
from functools import lru_cache


def matches(pattern: bytes, text: bytes) -> bool:
    """Whether the whole text matches the pattern."""
    return pattern == b"*" or compiled(pattern).fullmatch(text) is not None


@lru_cache(maxsize=1024)
def compiled(pattern: bytes) -> re.Pattern[bytes]:
    """The pattern as a compiled regular expression."""
    pieces = [b""]  # what stands between two stars
    at = 0
    while at < len(pattern):
        char = pattern[at : at + 1]
        at += 1
        if char == b"*":
            pieces.append(b"")
        elif char == b"?":
            pieces[-1] += b"."
        elif char == b"[":
            at, one = _set(pattern, at)
            pieces[-1] += one
        else:
            if char == b"\\" and at < len(pattern):
                char = pattern[at : at + 1]
                at += 1
            pieces[-1] += re.escape(char)
    if len(pieces) == 1:
        return re.compile(pieces[0], re.DOTALL)
    # The first place where a middle piece fits is always good enough: later pieces only gain room from it.
    middle = b"".join(b"(?>.*?" + piece + b")" for piece in pieces[1:-1] if piece)
    return re.compile(pieces[0] + middle + b".*" + pieces[-1], re.DOTALL)


def _set(pattern: bytes, at: int) -> tuple[int, bytes]:
    """Translate a `[...]` set that starts behind its bracket; a missing end bracket ends with the pattern."""
    negated = pattern[at : at + 1] == b"^"
    if negated:
        at += 1
    members: set[int] = set()
    while at < len(pattern) and pattern[at] != 0x5D:
        if pattern[at] == 0x5C and at + 1 < len(pattern):
            members.add(pattern[at + 1])
            at += 2
        elif at + 2 < len(pattern) and pattern[at + 1] == 0x2D:
            low, high = sorted((pattern[at], pattern[at + 2]))
            members.update(range(low, high + 1))
            at += 3
        else:
            members.add(pattern[at])
            at += 1
    if not members:
        return at + 1, b"." if negated else b"(?!)"
    inside = b"".join(b"\\x%02x" % member for member in sorted(members))
    return at + 1, b"[%b%b]" % (b"^" if negated else b"", inside)
