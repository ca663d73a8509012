"""Sorted sets: members and their scores, one by one. Ranges are in sorted_set_ranges."""

from __future__ import annotations

import math
import random
from typing import TYPE_CHECKING

from kvdb.commands.hashes import parse_random_count, pick
from kvdb.commands.keys import parse_cursor, parse_scan_options
from kvdb.commands.members import for_writing, read, store
from kvdb.commands.parse import SYNTAX, parse_float, parse_int
from kvdb.commands.registry import handler
from kvdb.containers import Members
from kvdb.errors import KvdbError
from kvdb.glob import matches
from kvdb_protocol.replies import Reply, format_double

if TYPE_CHECKING:
    from kvdb.net.client import Client

_NOT_A_NUMBER = "resulting score is not a number (NaN)"


def score_text(score: float) -> bytes:
    """A score as RESP2 shows it."""
    return format_double(score).encode()


def pairs_reply(client: Client, pairs: list[tuple[float, bytes]], with_scores: bool) -> Reply:
    """(score, member) pairs as a reply: in RESP3 pairs are arrays, in RESP2 all is flat."""
    if not with_scores:
        return [member for _, member in pairs]
    if client.resp == 3:
        return [[member, score] for score, member in pairs]
    return [item for score, member in pairs for item in (member, score_text(score))]


@handler("ZADD")
def zadd(client: Client, args: list[bytes]) -> Reply:
    """How many members are new (CH: new or changed); with INCR the new score."""
    return _add(client, args)


def _add(client: Client, args: list[bytes]) -> int | float | None:
    key = args[0]
    options: set[bytes] = set()
    at = 1
    while at < len(args) and (word := args[at].upper()) in (b"NX", b"XX", b"GT", b"LT", b"CH", b"INCR"):
        options.add(word)
        at += 1
    rest = args[at:]
    if not rest or len(rest) % 2:
        raise KvdbError(SYNTAX)
    if b"NX" in options and b"XX" in options:
        raise KvdbError("XX and NX options at the same time are not compatible")
    if (b"GT" in options) + (b"LT" in options) + (b"NX" in options) > 1:
        raise KvdbError("GT, LT, and/or NX options at the same time are not compatible")
    if b"INCR" in options and len(rest) > 2:
        raise KvdbError("INCR option supports a single increment-element pair")
    scores = [parse_float(text) for text in rest[::2]]
    members, expire_ms = for_writing(client, key, Members)
    n_new = n_changed = 0
    result: float | None = None
    for score, member in zip(scores, rest[1::2], strict=True):
        old = members.scores.get(member)
        if b"INCR" in options and old is not None:
            score += old
            if math.isnan(score):
                raise KvdbError(_NOT_A_NUMBER)
        if not _is_wanted(options, old, score):
            continue
        result = score
        n_new += old is None
        n_changed += old is not None and old != score
        members.add(member, score)
    if n_new or n_changed:
        store(client, key, members, expire_ms, "zincr" if b"INCR" in options else "zadd")
    if b"INCR" in options:
        return result
    return n_new + n_changed if b"CH" in options else n_new


def _is_wanted(options: set[bytes], old: float | None, score: float) -> bool:
    if old is None:
        return b"XX" not in options
    return not (b"NX" in options or (b"GT" in options and score <= old) or (b"LT" in options and score >= old))


@handler("ZINCRBY")
def zincrby(client: Client, args: list[bytes]) -> Reply:
    """The new score."""
    return _add(client, [args[0], b"INCR", args[1], args[2]])


@handler("ZCARD")
def zcard(client: Client, args: list[bytes]) -> Reply:
    """Number of members."""
    return len(read(client, args[0], Members))


@handler("ZSCORE")
def zscore(client: Client, args: list[bytes]) -> Reply:
    """The score, or null."""
    return read(client, args[0], Members).scores.get(args[1])


@handler("ZMSCORE")
def zmscore(client: Client, args: list[bytes]) -> Reply:
    """The scores, null for missing members."""
    scores = read(client, args[0], Members).scores
    return [scores.get(member) for member in args[1:]]


@handler("ZRANK")
def zrank(client: Client, args: list[bytes]) -> Reply:
    """The rank from the lowest score, or null."""
    return read(client, args[0], Members).rank(args[1])


@handler("ZREVRANK")
def zrevrank(client: Client, args: list[bytes]) -> Reply:
    """The rank from the highest score, or null."""
    members = read(client, args[0], Members)
    rank = members.rank(args[1])
    return None if rank is None else len(members) - 1 - rank


@handler("ZREM")
def zrem(client: Client, args: list[bytes]) -> Reply:
    """How many were there."""
    members, expire_ms = for_writing(client, args[0], Members)
    gone = sum([members.remove(member) for member in args[1:]])
    if gone:
        store(client, args[0], members, expire_ms, "zrem")
    return gone


@handler("ZPOPMIN")
def zpopmin(client: Client, args: list[bytes]) -> Reply:
    """The removed members with their scores, lowest first."""
    return _pop(client, args, highest=False)


@handler("ZPOPMAX")
def zpopmax(client: Client, args: list[bytes]) -> Reply:
    """The removed members with their scores, highest first."""
    return _pop(client, args, highest=True)


def _pop(client: Client, args: list[bytes], *, highest: bool) -> Reply:
    if len(args) > 2:
        raise KvdbError(SYNTAX)
    count = parse_int(args[1], "value is out of range, must be positive") if len(args) == 2 else 1
    if count < 0:
        raise KvdbError("value is out of range, must be positive")
    members, expire_ms = for_writing(client, args[0], Members)
    size = len(members)
    count = min(count, size)
    popped = members.ordered[size - count :][::-1] if highest else members.ordered[:count]
    if popped:
        start = size - count if highest else 0
        members.remove_range(start, start + count)
        store(client, args[0], members, expire_ms, "zpopmax" if highest else "zpopmin")
    if client.resp == 3 and len(args) == 1:
        return [item for score, member in popped for item in (member, score)]
    return pairs_reply(client, popped, True)


@handler("ZRANDMEMBER")
def zrandmember(client: Client, args: list[bytes]) -> Reply:
    """One member; with a count different ones, with a negative count any."""
    count = parse_random_count(args, b"WITHSCORES") if len(args) > 1 else None
    scores = read(client, args[0], Members).scores
    if count is None:
        return random.choice(list(scores)) if scores else None
    chosen = pick(list(scores), count)
    return pairs_reply(client, [(scores[member], member) for member in chosen], len(args) == 3)


@handler("ZSCAN")
def zscan(client: Client, args: list[bytes]) -> Reply:
    """The next cursor, and some members with their scores."""
    cursor = parse_cursor(args[1])
    members = read(client, args[0], Members)
    count, pattern, _ = parse_scan_options(args[2:] if len(members) else [])
    small = cursor == 0 and len(members) <= 128
    cursor, names = (0, [name for _, name in members.ordered]) if small else members.scan(cursor, count)
    items: list[Reply] = []
    for name in names:
        if pattern is None or matches(pattern, name):
            items += [name, score_text(members.scores[name])]
    return [b"%d" % cursor, items]
