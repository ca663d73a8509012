"""A run of packed sections: one codec byte for each, padding to 4 bytes, then the rows, section after section.

Pages and tails end with such a run. How many rows a section has follows from the layout and the token count, so only
the codecs are written: the packer may fall back to a wider codec for a section that the preferred one cannot hold.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple, overload

import numpy as np

from kvdb_protocol.errors import FormatError
from kvdb_protocol.ids import Buffer
from kvdb_protocol.layout import I64, Codec, Layout


class PackedSection(NamedTuple):
    """The packed rows of one section. `data` is n_rows x row_bytes(codec) bytes, row after row."""

    codec: Codec
    data: Buffer


def pad4(n_bytes: int) -> bytes:
    """Zeros up to the next multiple of 4."""
    return bytes(-n_bytes % 4)


def encode_sections(sections: Sequence[PackedSection]) -> list[Buffer]:
    """The run as a list of buffers; row data is not copied."""
    codecs = bytes(section.codec for section in sections)
    return [codecs + pad4(len(codecs)), *(section.data for section in sections)]


class PackedRun(Sequence[PackedSection]):
    """The sections of a decoded run, cut out of it when they are asked for: not every reader wants the rows."""

    __slots__ = ("_bounds", "_codecs", "_data")

    def __init__(self, codecs: Sequence[Codec], bounds: Sequence[int], data: memoryview) -> None:
        """bounds: where each section begins in `data`, and where the last one ends."""
        self._codecs = codecs
        self._bounds = bounds
        self._data = data

    def __len__(self) -> int:
        return len(self._codecs)

    @overload
    def __getitem__(self, index: int) -> PackedSection: ...

    @overload
    def __getitem__(self, index: slice) -> list[PackedSection]: ...

    def __getitem__(self, index: int | slice) -> PackedSection | list[PackedSection]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        return PackedSection(self._codecs[index], self._data[self._bounds[index] : self._bounds[index + 1]])


def decode_sections(layout: Layout, n_rows: Sequence[int] | I64, data: memoryview, what: str) -> PackedRun:
    """Split a run into its sections without copying; the run must end where `data` ends.

    n_rows: rows of each section, in the order of layout.tail_sections, or of the first of them: layout.streams.
    what: name used in errors.
    """
    try:
        codecs, sizes = _row_sizes(layout, bytes(data[: len(n_rows)]), len(n_rows))
    except FormatError as error:
        raise FormatError(f"{what}: {error}") from None
    bounds = np.empty(len(n_rows) + 1, np.int64)
    bounds[0] = len(n_rows) + len(pad4(len(n_rows)))
    np.cumsum(sizes * n_rows, out=bounds[1:])
    bounds[1:] += bounds[0]
    return _run(codecs, bounds.tolist(), data, what)


def decode_page_sections(layout: Layout, data: memoryview, what: str) -> PackedRun:
    """Split a page's run. A restore decodes thousands of pages whose sections lie alike: their places are kept."""
    try:
        codecs, bounds = _page_bounds(layout, bytes(data[: len(layout.streams)]))
    except FormatError as error:
        raise FormatError(f"{what}: {error}") from None
    return _run(codecs, bounds, data, what)


@lru_cache(maxsize=64)
def _row_sizes(layout: Layout, codecs: bytes, n_wanted: int) -> tuple[tuple[Codec, ...], I64]:
    """The codecs, and the bytes of one row of each section."""
    if len(codecs) < n_wanted:
        raise FormatError("section codecs are truncated")
    sizes = []
    for section, code in zip(layout.tail_sections, codecs, strict=False):
        if code not in Codec.__members__.values():
            raise FormatError(f"unknown codec {code} in layer {section.layer} {section.part.name}")
        sizes.append(layout.section_bytes(section, Codec(code), 1))
    return tuple(map(Codec, codecs)), np.array(sizes, np.int64)


@lru_cache(maxsize=32)
def _page_bounds(layout: Layout, codecs: bytes) -> tuple[tuple[Codec, ...], list[int]]:
    found, sizes = _row_sizes(layout, codecs, len(layout.streams))
    at = len(codecs) + len(pad4(len(codecs)))
    bounds = [at]
    for stream, size in zip(layout.streams, sizes.tolist(), strict=True):
        at += layout.page_rows(stream) * size
        bounds.append(at)
    return found, bounds


def _run(codecs: Sequence[Codec], bounds: list[int], data: memoryview, what: str) -> PackedRun:
    if bounds[-1] != len(data):
        raise FormatError(f"{what}: sections need {bounds[-1]} bytes, the payload has {len(data)}")
    return PackedRun(codecs, bounds, data)
