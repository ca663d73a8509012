"""Longest stored prefix of a prompt, by tokens.

Pages that exist imply their ancestors, so the deepest stored page of a prompt is found by doubling steps and then a
binary search over prefix hashes: the cost follows the length of the match, not of the prompt. From there upwards the
first level at which some snapshot's tail continues the prompt holds the answer, since a tail is shorter than a page.
Within a level table ENDS is ordered by tail length and hash: a step a distinct length, however many snapshots end
there.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

import msgpack

from kvdb.store.index import Table, Txn, from_end_key
from kvdb_protocol.ids import PREFIX_BYTES, extend_prefix, root_prefix
from kvdb_protocol.layout import Layout

_LENGTH = slice(PREFIX_BYTES, PREFIX_BYTES + 4)  # of the tail, in a key of table ENDS
NO_MODEL = msgpack.packb([-1])


@dataclass(frozen=True, slots=True)
class Match:
    """A stored snapshot whose tokens are a prefix of the prompt. same_quant: of the very model that was asked for."""

    snapshot_id: bytes
    n_tokens: int
    same_quant: bool


def longest_prefix(
    txn: Txn,
    family: bytes,
    fingerprint: bytes,
    ids: bytes,
    cross_quant: bool,
    usable: Callable[[bytes], bool] = lambda _: True,
) -> Match | None:
    """The longest stored prefix of `ids` (u32 little-endian) among models of the family, or None.

    cross_quant: also accept snapshots of another quantisation. usable: vetoes single snapshots.
    """
    allowed: dict[int, set[int]] = {}
    own = -1
    for model_fingerprint, model in txn.models().items():
        if model.family != family or not (cross_quant or model_fingerprint == fingerprint):
            continue
        # Quantisations of one family may cut pages differently; each cut has prefix hashes of its own.
        allowed.setdefault(Layout.from_bytes(model.layout).page_tokens, set()).add(model.number)
        if model_fingerprint == fingerprint:
            own = model.number
    found = [
        match
        for page_tokens, models in allowed.items()
        if (match := _search(txn, root_prefix(family), page_tokens, models, own, ids, usable)) is not None
    ]
    return max(found, key=lambda match: (match.n_tokens, match.same_quant), default=None)


def _search(
    txn: Txn,
    root: bytes,
    page_tokens: int,
    models: Collection[int],
    own: int,
    ids: bytes,
    usable: Callable[[bytes], bool],
) -> Match | None:
    view = memoryview(ids)
    page_bytes = 4 * page_tokens
    n_pages = len(ids) // page_bytes
    hashes = [root]

    def hash_up_to(level: int) -> None:
        for page in range(len(hashes) - 1, level):
            hashes.append(extend_prefix(hashes[-1], view[page * page_bytes : (page + 1) * page_bytes]))

    low, step = 0, 1
    high = n_pages + 1  # the lowest level known not to be stored
    while low < n_pages:
        level = min(low + step, n_pages)
        hash_up_to(level)
        if not _has_page(txn, hashes[level], models):
            high = level
            break
        low, step = level, 2 * step
    while high - low > 1:
        middle = (low + high) // 2
        if _has_page(txn, hashes[middle], models):
            low = middle
        else:
            high = middle
    for level in range(low, -1, -1):
        match = _at_level(txn, hashes[level], level * page_tokens, view[level * page_bytes :], models, own, usable)
        if match is not None:
            return match
    return None


def _has_page(txn: Txn, prefix: bytes, models: Collection[int]) -> bool:
    return any(msgpack.unpackb(value)[0] in models for _, value in txn.scan(Table.PREFIXES, prefix=prefix))


def _at_level(
    txn: Txn,
    prefix: bytes,
    first: int,
    rest: memoryview,
    models: Collection[int],
    own: int,
    usable: Callable[[bytes], bool],
) -> Match | None:
    """The longest match among the snapshots whose last full page has this prefix hash."""
    best: Match | None = None
    wanted, n_wanted = b"", -1  # how the keys of matches begin among those of this tail length
    with txn.cursor(Table.ENDS) as cursor:
        found = cursor.set_range(prefix)
        while found and (key := cursor.key()).startswith(prefix):
            n_tail = int.from_bytes(key[_LENGTH], "big")
            if 4 * n_tail > len(rest):
                break
            is_first = n_tail != n_wanted
            if is_first:
                n_wanted, wanted = n_tail, key[: _LENGTH.stop] + extend_prefix(prefix, rest[: 4 * n_tail])
            if key < wanted:
                # Mostly one snapshot has this length: then the next key has another, and no search is needed.
                found = cursor.next() if is_first else cursor.set_range(wanted)
                continue
            if key.startswith(wanted):
                snapshot_id = from_end_key(key)[3]
                model = msgpack.unpackb(txn.opened(Table.ENDS, key, cursor.value()) or NO_MODEL)[0]
                longer = best is None or best.n_tokens < first + n_tail
                if model in models and usable(snapshot_id) and (longer or model == own):
                    best = Match(snapshot_id, first + n_tail, model == own)
                if best is None or not best.same_quant or best.n_tokens < first + n_tail:
                    found = cursor.next()
                    continue
            found = cursor.next()
            if found and cursor.key().startswith(key[: _LENGTH.stop]):
                found = cursor.set_range(prefix + (n_tail + 1).to_bytes(4, "big"))
    return best
