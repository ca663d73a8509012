"""Sorted sets: ranges by rank, score and name; reading, counting, removing and storing them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvdb.commands.access import changed
from kvdb.commands.members import for_writing, read, store
from kvdb.commands.parse import SYNTAX, parse_bound, parse_int
from kvdb.commands.registry import handler
from kvdb.commands.sorted_sets import pairs_reply
from kvdb.containers import Members
from kvdb.errors import KvdbError
from kvdb.store.entries import Entry, EntryType
from kvdb_protocol.replies import Reply

if TYPE_CHECKING:
    from kvdb.net.client import Client

Pairs = list[tuple[float, bytes]]


def by_rank(members: Members, start: int, stop: int) -> tuple[int, int]:
    """Ranks as a half-open range; negative ones count from the end."""
    size = len(members)
    start = max(start + size, 0) if start < 0 else start
    stop = stop + size if stop < 0 else stop
    return (start, min(stop, size - 1) + 1) if start <= stop and start < size else (0, 0)


def by_score(members: Members, low: bytes, high: bytes) -> tuple[int, int]:
    """Scores between two bounds as a half-open range of ranks; `(` in front makes a bound exclusive."""
    (least, low_open), (most, high_open) = _score_bound(low), _score_bound(high)
    start = members.first_at_least(least, low_open)
    return start, max(members.first_at_least(most, not high_open), start)


def _score_bound(text: bytes) -> tuple[float, bool]:
    exclusive = text[:1] == b"("
    return parse_bound(text[1:] if exclusive else text, "min or max is not a float"), exclusive


def by_name(members: Members, low: bytes, high: bytes) -> tuple[int, int]:
    """Names between two bounds as a half-open range of ranks: `[` inclusive, `(` exclusive, `-` and `+` infinite."""
    for bound in (low, high):
        if bound not in (b"-", b"+") and bound[:1] not in (b"(", b"["):
            raise KvdbError("min or max not valid string range item")
    start = _name_place(members, low, low[:1] == b"(")
    return start, max(_name_place(members, high, high[:1] == b"["), start)


def _name_place(members: Members, bound: bytes, after: bool) -> int:
    if bound == b"-":
        return 0
    return len(members) if bound == b"+" else members.first_named(bound[1:], after)


@dataclass(frozen=True, slots=True)
class _Query:
    """A range command's arguments. kind: RANK, SCORE or LEX; `low` and `high` as given, in order of the words."""

    kind: bytes
    low: bytes
    high: bytes
    reverse: bool = False
    offset: int = 0
    limit: int = -1
    with_scores: bool = False


def _select(members: Members, query: _Query) -> Pairs:
    """The (score, member) pairs that a query means, in its order."""
    if query.kind == b"RANK":
        low, high = parse_int(query.low), parse_int(query.high)
        start, stop = by_rank(members, low, high)
        if query.reverse:
            start, stop = len(members) - stop, len(members) - start
            return members.ordered[start:stop][::-1]
        return members.ordered[start:stop]
    find = by_score if query.kind == b"SCORE" else by_name
    low_bound, high_bound = (query.high, query.low) if query.reverse else (query.low, query.high)
    start, stop = find(members, low_bound, high_bound)
    found = members.ordered[start:stop]
    if query.reverse:
        found.reverse()
    if query.offset < 0:
        return []
    return found[query.offset :] if query.limit < 0 else found[query.offset : query.offset + query.limit]


def _check(query: _Query) -> None:
    """Refuse bad bounds even when the key does not exist."""
    _select(Members(), query)


def _parse(args: list[bytes], *, store: bool = False) -> _Query:
    """ZRANGE and ZRANGESTORE: start stop [BYSCORE|BYLEX] [REV] [LIMIT offset count] [WITHSCORES]."""
    kind, reverse, with_scores = b"RANK", False, False
    limits: tuple[int, int] | None = None
    at = 2
    while at < len(args):
        word = args[at].upper()
        if word == b"BYSCORE":
            kind = b"SCORE"
        elif word == b"BYLEX":
            kind = b"LEX"
        elif word == b"REV":
            reverse = True
        elif word == b"WITHSCORES" and not store:
            with_scores = True
        elif word == b"LIMIT" and at + 2 < len(args):
            limits = (parse_int(args[at + 1]), parse_int(args[at + 2]))
            at += 2
        else:
            raise KvdbError(SYNTAX)
        at += 1
    if limits is not None and kind == b"RANK" and limits != (0, -1):
        raise KvdbError("syntax error, LIMIT is only supported in combination with either BYSCORE or BYLEX")
    if with_scores and kind == b"LEX":
        raise KvdbError("syntax error, WITHSCORES not supported in combination with BYLEX")
    offset, limit = limits or (0, -1)
    return _Query(kind, args[0], args[1], reverse, offset, limit, with_scores)


def _parse_old(args: list[bytes], kind: bytes, *, reverse: bool) -> _Query:
    """The commands before ZRANGE had options: bounds, then [WITHSCORES] [LIMIT offset count]."""
    with_scores = False
    offset, limit = 0, -1
    at = 2
    while at < len(args):
        word = args[at].upper()
        if word == b"WITHSCORES" and kind != b"LEX":
            with_scores = True
        elif word == b"LIMIT" and kind != b"RANK" and at + 2 < len(args):
            offset, limit = parse_int(args[at + 1]), parse_int(args[at + 2])
            at += 2
        else:
            raise KvdbError(SYNTAX)
        at += 1
    return _Query(kind, args[0], args[1], reverse, offset, limit, with_scores)


def _answer(client: Client, key: bytes, query: _Query) -> Reply:
    _check(query)
    return pairs_reply(client, _select(read(client, key, Members), query), query.with_scores)


@handler("ZRANGE")
def zrange(client: Client, args: list[bytes]) -> Reply:
    """The members in a range."""
    return _answer(client, args[0], _parse(args[1:]))


@handler("ZREVRANGE")
def zrevrange(client: Client, args: list[bytes]) -> Reply:
    """The members by rank, highest score first."""
    return _answer(client, args[0], _parse_old(args[1:], b"RANK", reverse=True))


@handler("ZRANGEBYSCORE")
def zrangebyscore(client: Client, args: list[bytes]) -> Reply:
    """The members by score."""
    return _answer(client, args[0], _parse_old(args[1:], b"SCORE", reverse=False))


@handler("ZREVRANGEBYSCORE")
def zrevrangebyscore(client: Client, args: list[bytes]) -> Reply:
    """The members by score, highest first; the larger bound comes first."""
    return _answer(client, args[0], _parse_old(args[1:], b"SCORE", reverse=True))


@handler("ZRANGEBYLEX")
def zrangebylex(client: Client, args: list[bytes]) -> Reply:
    """The members by name."""
    return _answer(client, args[0], _parse_old(args[1:], b"LEX", reverse=False))


@handler("ZREVRANGEBYLEX")
def zrevrangebylex(client: Client, args: list[bytes]) -> Reply:
    """The members by name, last first; the larger bound comes first."""
    return _answer(client, args[0], _parse_old(args[1:], b"LEX", reverse=True))


@handler("ZRANGESTORE")
def zrangestore(client: Client, args: list[bytes]) -> Reply:
    """How many members the target has now; it is deleted if there are none."""
    target, source = args[:2]
    query = _parse(args[2:], store=True)
    _check(query)
    found = _select(read(client, source, Members), query)
    keyspace = client.server.keyspace
    if found:
        members = Members({member: score for score, member in found})
        keyspace.put(client.db, target, Entry(EntryType.ZSET, 0, members))
        changed(client, target, "zrangestore", "z")
    elif keyspace.delete(client.db, target):
        changed(client, target, "del", "g")
    return len(found)


@handler("ZCOUNT")
def zcount(client: Client, args: list[bytes]) -> Reply:
    """Number of members with scores in a range."""
    by_score(Members(), args[1], args[2])
    start, stop = by_score(read(client, args[0], Members), args[1], args[2])
    return stop - start


@handler("ZLEXCOUNT")
def zlexcount(client: Client, args: list[bytes]) -> Reply:
    """Number of members with names in a range."""
    by_name(Members(), args[1], args[2])
    start, stop = by_name(read(client, args[0], Members), args[1], args[2])
    return stop - start


@handler("ZREMRANGEBYRANK")
def zremrangebyrank(client: Client, args: list[bytes]) -> Reply:
    """How many were removed."""
    low, high = parse_int(args[1]), parse_int(args[2])
    members, expire_ms = for_writing(client, args[0], Members)
    return _remove(client, args[0], members, expire_ms, by_rank(members, low, high), "zremrangebyrank")


@handler("ZREMRANGEBYSCORE")
def zremrangebyscore(client: Client, args: list[bytes]) -> Reply:
    """How many were removed."""
    by_score(Members(), args[1], args[2])
    members, expire_ms = for_writing(client, args[0], Members)
    return _remove(client, args[0], members, expire_ms, by_score(members, args[1], args[2]), "zremrangebyscore")


@handler("ZREMRANGEBYLEX")
def zremrangebylex(client: Client, args: list[bytes]) -> Reply:
    """How many were removed."""
    by_name(Members(), args[1], args[2])
    members, expire_ms = for_writing(client, args[0], Members)
    return _remove(client, args[0], members, expire_ms, by_name(members, args[1], args[2]), "zremrangebylex")


def _remove(client: Client, key: bytes, members: Members, expire_ms: int, ranks: tuple[int, int], event: str) -> int:
    gone = members.remove_range(*ranks)
    if gone:
        store(client, key, members, expire_ms, event)
    return gone
