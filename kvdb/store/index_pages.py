"""The pages of the index file, read without LMDB: is the structure sound that LMDB takes on trust?

LMDB checks nothing it maps: a flipped page number sends it to another page or out of the file. Rows carry a checksum
(index.py); this file checks what holds the rows together. A walk from a meta page accounts for every byte that LMDB
would ever use:

    meta pages     two, for transactions n-1 and n; in each, table META names the transaction that wrote it. So neither
                   an old state can pass for the newest, nor the newest for an old one
    trees          each page says its own number and kind; its nodes fill it without gap or overlap; keys are in order
                   and between the separators above them; depth and numbers of pages and rows are those of the table
    the whole      every page belongs to exactly one tree, run of overflow pages or free list, and none is left over

What a walk does not look at cannot matter: free pages and free space within pages, padding, the map's size and address.

    page    0 8 number | 8 2 unused | 10 2 flags | 12 2 end of pointers | 14 2 start of nodes (or 12 4: pages of a run)
            16 .. u16 offsets of nodes, in key order; nodes are packed at the end of the page
    node    0 4 data bytes (leaf) or 0 6 page (branch) | 4 2 flags (leaf) | 6 2 key bytes | 8 .. key, data or first page
    meta    16 4 magic | 20 4 version | 24 8 address | 32 8 map bytes | 40 48 free tree | 88 48 main tree
            136 8 last page | 144 8 transaction
    tree    0 4 page bytes (of the free tree) | 4 2 flags | 6 2 depth | 8 8 branch pages | 16 8 leaf pages
            24 8 overflow pages | 32 8 rows | 40 8 root page

All little-endian, as LMDB 0.9 writes them on every machine that kvdb runs on.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import NamedTuple

from kvdb_protocol.errors import FormatError

Read = Callable[[int, int], bytes]  # (offset, bytes) -> those bytes, fewer at the end of the file
Row = tuple[bytes, bytes, int]  # key, data, flags

_HEADER = struct.Struct("<QHHHH")
_NODE = struct.Struct("<HHHH")
_META = struct.Struct("<IIQQ48s48sQQ")
_TREE = struct.Struct("<IHHQQQQQ")
_HEADER_BYTES = 16
_NODE_BYTES = 8
_MAGIC, _VERSION = 0xBEEFC0DE, 1
_BRANCH, _LEAF, _OVERFLOW, _META_FLAG = 1, 2, 4, 8
_BIG, _SUB = 1, 2  # node flags: the data is a run of pages; the data is a tree
_INTEGER_KEYS = 8
_NO_PAGE = (1 << 64) - 1
_FAR_PAGE = 1 << 46  # behind every file, and still an offset
_SMALLEST_PAGE, _LARGEST_PAGE = 512, 1 << 16


class Tree(NamedTuple):
    """A tree's own description, as a meta page or the main tree holds it."""

    page_bytes: int
    flags: int
    depth: int
    branch_pages: int
    leaf_pages: int
    overflow_pages: int
    rows: int
    root: int

    @classmethod
    def decode(cls, data: bytes) -> Tree:
        """Raises FormatError."""
        if len(data) != _TREE.size:
            raise FormatError(f"a tree's description has {len(data)} bytes")
        return cls._make(_TREE.unpack(data))


@dataclass(frozen=True, slots=True)
class Meta:
    """One of the two meta pages."""

    free: Tree
    main: Tree
    last_page: int
    txn: int

    @property
    def page_bytes(self) -> int:
        """Size of every page."""
        return self.free.page_bytes


def read_metas(read: Read) -> tuple[Meta, Meta]:
    """The older and the newer meta page. Raises FormatError where they are not what one commit after another leaves."""
    first = _decode_meta(read(0, _HEADER_BYTES + _META.size), 0)
    second = _decode_meta(read(first.page_bytes, _HEADER_BYTES + _META.size), 1)
    older, newer = (first, second) if first.txn < second.txn else (second, first)
    if first.page_bytes != second.page_bytes or first.free.flags != second.free.flags:
        raise FormatError("its two meta pages disagree")
    for number, meta in enumerate((first, second)):
        if meta.txn % 2 != number and newer.txn:
            raise FormatError(f"meta page {number} says it is of transaction {meta.txn}")
    if newer.txn - older.txn > 1:
        raise FormatError(f"its meta pages are of transactions {older.txn} and {newer.txn}")
    return older, newer


def _decode_meta(data: bytes, number: int) -> Meta:
    if len(data) < _HEADER_BYTES + _META.size:
        raise FormatError("it ends within a meta page")
    page, _, flags, _, _ = _HEADER.unpack_from(data)
    magic, version, _, _, free, main, last_page, txn = _META.unpack_from(data, _HEADER_BYTES)
    if (page, flags, magic, version) != (number, _META_FLAG, _MAGIC, _VERSION):
        raise FormatError(f"page {number} is no meta page of LMDB")
    meta = Meta(Tree.decode(free), Tree.decode(main), last_page, txn)
    size = meta.page_bytes
    if size & (size - 1) or not _SMALLEST_PAGE <= size <= _LARGEST_PAGE or meta.free.flags != _INTEGER_KEYS:
        raise FormatError(f"meta page {number} is damaged")
    return meta


class Walk:
    """Walks the trees of one meta page and counts what they use. Every method raises FormatError at damage."""

    def __init__(self, read: Read, meta: Meta) -> None:
        self._read = read
        self._meta = meta
        self._size = meta.page_bytes
        self._used = {0, 1}  # the meta pages

    def tables(self) -> dict[bytes, Tree]:
        """The named tables."""
        found = {}
        for name, data, flags in self.tree(self._meta.main, "main"):
            if flags != _SUB:
                raise FormatError(f"the main tree holds {name!r}, which is no table")
            found[name] = Tree.decode(data)
        return found

    def all(self, known: Collection[bytes], look: Callable[[bytes, list[Row]], None]) -> None:
        """Account for every page: all tables, whose names must be among `known`, and the free list.

        look: is shown every table's rows, leaf by leaf.
        """
        tables = self.tables()
        if unknown := tables.keys() - known:
            raise FormatError(f"it has a table {min(unknown)!r} that this program does not know")
        for name, tree in tables.items():
            what = name.decode()
            for rows in self.leaves(tree, what):
                if flags := max(row[2] for row in rows):
                    raise FormatError(f"table {what}: a row with flags {flags}")
                look(name, rows)
        for _, data, flags in self.tree(self._meta.free, "free"):
            if flags:
                raise FormatError(f"the free list has a row with flags {flags}")
            self._use_free(data)
        if (unused := self._meta.last_page + 1 - len(self._used)) > 0:
            raise FormatError(f"{unused} of {self._meta.last_page + 1} pages belong to nothing")

    def _use_free(self, data: bytes) -> None:
        if len(data) % 8 or not data or len(data) < 8 * (count := int.from_bytes(data[:8], "little")) + 8:
            raise FormatError("the free list is damaged")
        for page in struct.unpack_from(f"<{count}Q", data, 8):
            self._use(page, "the free list")

    def _use(self, page: int, what: str) -> None:
        if not 2 <= page <= self._meta.last_page:
            raise FormatError(f"{what} names page {page} of {self._meta.last_page + 1}")
        if page in self._used:
            raise FormatError(f"page {page} is used twice, by {what} the second time")
        self._used.add(page)

    def tree(self, tree: Tree, name: str) -> Iterator[Row]:
        """(key, data, flags) of every row in order."""
        for rows in self.leaves(tree, name):
            yield from rows

    def leaves(self, tree: Tree, name: str) -> Iterator[list[Row]]:
        """The same, leaf by leaf."""
        if tree.root == _NO_PAGE:
            if any((tree.depth, tree.branch_pages, tree.leaf_pages, tree.overflow_pages, tree.rows)):
                raise FormatError(f"table {name} has no root")
            return
        is_number = bool(tree.flags & _INTEGER_KEYS)
        if not tree.depth or tree.flags & ~_INTEGER_KEYS or is_number != (name == "free"):
            raise FormatError(f"table {name} has depth {tree.depth} and flags {tree.flags}")
        counts = {_BRANCH: 0, _LEAF: 0, _OVERFLOW: 0}
        n_rows = 0
        for rows in self._below(tree.root, tree.depth, None, None, name, is_number, counts):
            n_rows += len(rows)
            yield rows
        found = (counts[_BRANCH], counts[_LEAF], counts[_OVERFLOW], n_rows)
        if found != (tree.branch_pages, tree.leaf_pages, tree.overflow_pages, tree.rows):
            raise FormatError(f"table {name} has {found} pages and rows, {tree[3:7]} are counted")

    def _below(
        self,
        page: int,
        depth: int,
        low: bytes | None,
        high: bytes | None,
        name: str,
        is_number: bool,
        counts: dict[int, int],
    ) -> Iterator[list[Row]]:
        """The rows below a page, leaf by leaf, whose keys must lie in [low, high)."""
        what = f"table {name}"
        self._use(page, what)
        data = self._read(page * self._size, self._size)
        kind = _BRANCH if depth > 1 else _LEAF
        nodes = _nodes(data, page, kind, self._size, what)
        counts[kind] += 1
        keys = [key for key, _, _ in nodes]
        if kind == _BRANCH:
            keys[0] = low or b""  # LMDB does not look at the first separator
        _check_order(keys, low, high, is_number, f"page {page} of {what}")
        if kind == _LEAF:
            if any(flags & _BIG for _, _, flags in nodes):
                nodes = [
                    (key, self._run(value, counts, what), flags & ~_BIG) if flags & _BIG else (key, value, flags)
                    for key, value, flags in nodes
                ]
            yield nodes
            return
        for at, (_, value, flags) in enumerate(nodes):
            child = int.from_bytes(value, "little") | flags << 32
            upper = keys[at + 1] if at + 1 < len(keys) else high
            yield from self._below(child, depth - 1, keys[at] if at else low, upper, name, is_number, counts)

    def _run(self, value: bytes, counts: dict[int, int], what: str) -> bytes:
        """The data of a large row. value: its size (u32), then its first page (u64).

        A row that was written twice in one transaction, smaller the second time, keeps the longer run.
        """
        n_bytes, page = struct.unpack("<IQ", value)
        self._use(page, what)
        data = self._read(page * self._size, _HEADER_BYTES + n_bytes)
        if len(data) < _HEADER_BYTES + n_bytes:
            raise FormatError(f"{what}: the file ends within page {page}")
        found, _, flags, low, high = _HEADER.unpack_from(data)
        n_pages = low | high << 16
        if (found, flags) != (page, _OVERFLOW) or n_pages * self._size < _HEADER_BYTES + n_bytes:
            raise FormatError(f"{what}: page {page} begins no run of {n_bytes} bytes")
        for number in range(page + 1, page + n_pages):
            self._use(number, what)
        counts[_OVERFLOW] += n_pages
        return data[_HEADER_BYTES:]


def _nodes(data: bytes, page: int, kind: int, size: int, what: str) -> list[Row]:
    """(key, data, flags) of a page's nodes. Data of a branch: 4 bytes of the page; of a large row: size, first page."""
    if len(data) < size:
        raise FormatError(f"{what}: the file ends within page {page}")
    number, _, flags, lower, upper = _HEADER.unpack_from(data)
    if number != page or flags != kind:
        raise FormatError(f"{what}: page {page} says it is page {number} with flags {flags}")
    if lower % 2 or not _HEADER_BYTES < lower <= upper <= size:
        raise FormatError(f"{what}: page {page} is damaged")
    offsets = struct.unpack_from(f"<{(lower - _HEADER_BYTES) // 2}H", data, _HEADER_BYTES)
    if not offsets or min(offsets) != upper or max(offsets) + _NODE_BYTES > size:
        raise FormatError(f"{what}: a node of page {page} lies outside")
    nodes: list[Row] = []
    ends = [upper]
    for at in offsets:
        low, high, node_flags, n_key = _NODE.unpack_from(data, at)
        value_at = at + _NODE_BYTES + n_key
        if kind == _BRANCH:
            end, value = value_at, data[at : at + 4]
        elif node_flags & _BIG:
            end = value_at + 8
            value = data[at : at + 4] + data[value_at:end]
        else:
            end = value_at + low + (high << 16)
            value = data[value_at:end]
        if end > size:
            raise FormatError(f"{what}: a node of page {page} ends outside")
        nodes.append((data[at + _NODE_BYTES : value_at], value, node_flags))
        ends.append(end + (end & 1))
    # Each node ends where another begins, or the page ends: they lie in one row, since none is empty.
    ends.sort()
    if ends != [*sorted(offsets), size]:
        raise FormatError(f"{what}: the nodes of page {page} do not fill it")
    return nodes


def _check_order(keys: list[bytes], low: bytes | None, high: bytes | None, is_number: bool, what: str) -> None:
    if is_number:
        numbers = [int.from_bytes(key, "little") for key in keys]
        bounds = (
            None if low is None else int.from_bytes(low, "little"),
            None if high is None else int.from_bytes(high, "little"),
        )
        in_order = _is_in_order(numbers, *bounds)
    else:
        in_order = _is_in_order(keys, low, high)
    if not in_order:
        raise FormatError(f"{what}: its keys are out of order")


def _is_in_order(keys: list[int] | list[bytes], low: int | bytes | None, high: int | bytes | None) -> bool:
    if keys != sorted(keys) or len(set(keys)) != len(keys):
        return False
    return (low is None or keys[0] >= low) and (high is None or keys[-1] < high)  # type: ignore[operator]


def check_stamps(read: Read, decode: Callable[[bytes, bytes], int | None]) -> None:
    """Compare each meta page with the transaction that its own table META names. Raises FormatError.

    decode: (key, data) of a row of META -> the transaction it names, or None if it is another row.

    When writing the meta page of transaction n fails, LMDB puts the number n - 2 back on it, and the last page, but
    leaves the roots of n: nobody uses it, n - 1 is newer, and the next commit overwrites first its pages, then it. That
    is not damage. So the older meta page may lead to what transaction n wrote, or to what is no tree at all; the
    newest, were it to look like the older one, would lead to a whole tree.
    """
    older, newer = read_metas(read)
    _check_stamp(read, newer, decode, {newer.txn})
    if older.txn + 1 == newer.txn:
        # Its roots may lie behind what it says is the last page.
        unbounded = replace(older, last_page=_FAR_PAGE)
        with suppress(_NoTreeError):
            _check_stamp(read, unbounded, decode, {older.txn, older.txn + 2})


class MetaPagesError(FormatError):
    """The two meta pages are damaged, or of other transactions than is looked for."""


class _NoTreeError(FormatError):
    """The pages that a meta page leads to are not those of a table META."""


def _check_stamp(read: Read, meta: Meta, decode: Callable[[bytes, bytes], int | None], allowed: set[int]) -> None:
    if meta.main.root == _NO_PAGE:
        return
    try:
        walk = Walk(read, meta)
        table = walk.tables().get(b"meta")
        rows = [] if table is None else list(walk.tree(table, "meta"))
        stamps = {found for key, data, _ in rows if (found := decode(key, data)) is not None}
    except (FormatError, struct.error) as error:
        raise _NoTreeError(str(error)) from error
    if table is None:
        raise _NoTreeError(f"transaction {meta.txn} has no table META")
    if wrong := stamps - allowed:
        raise FormatError(f"a meta page of transaction {meta.txn} leads to what transaction {min(wrong)} wrote")


def check_pages(
    read: Read, txn: int | None, known: Collection[bytes], look: Callable[[bytes, list[Row]], None]
) -> None:
    """Walk everything that a transaction sees, which must not be overwritten meanwhile. Raises FormatError.

    txn: its number; None for the newest. known: the names of the tables that may exist. look: is shown the rows of
    each leaf, with the name of their table. Raises MetaPagesError where no meta page leads to it: while somebody writes
    that may be because two commits have been made since.
    """
    try:
        older, newer = read_metas(read)
    except FormatError as error:
        raise MetaPagesError(str(error)) from error
    meta = {older.txn: older, newer.txn: newer}.get(newer.txn if txn is None else txn)
    if meta is None:
        raise MetaPagesError(f"no meta page is of transaction {txn}")
    Walk(read, meta).all(known, look)
