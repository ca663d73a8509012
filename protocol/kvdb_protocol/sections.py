"""A run of packed sections: one codec byte for each, padding to 4 bytes, then the rows, section after section.

Pages and tails end with such a run. How many rows a section has follows from the layout and the token count, so only
the codecs are written: the packer may fall back to a wider codec for a section that the preferred one cannot hold.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple, overload

from kvdb_protocol.errors import FormatError
from kvdb_protocol.ids import Buffer
from kvdb_protocol.layout import Codec, Layout, Section

# Codec, begin and end of a section in its run.
_Span = tuple[Codec, int, int]


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

    __slots__ = ("_data", "_spans")

    def __init__(self, spans: list[_Span], data: memoryview) -> None:
        self._spans = spans
        self._data = data

    def __len__(self) -> int:
        return len(self._spans)

    @overload
    def __getitem__(self, index: int) -> PackedSection: ...

    @overload
    def __getitem__(self, index: slice) -> list[PackedSection]: ...

    def __getitem__(self, index: int | slice) -> PackedSection | list[PackedSection]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        codec, begin, end = self._spans[index]
        return PackedSection(codec, self._data[begin:end])


def decode_sections(
    layout: Layout, wanted: Sequence[Section], n_rows: Sequence[int], data: memoryview, what: str
) -> PackedRun:
    """Split a run into its sections without copying; the run must end where `data` ends.

    n_rows: rows of each wanted section. what: name used in errors.
    """
    return _cut(lambda codecs: _spans(layout, wanted, n_rows, codecs), bytes(data[: len(wanted)]), data, what)


def decode_page_sections(layout: Layout, data: memoryview, what: str) -> PackedRun:
    """Split a page's run. A restore decodes thousands of pages whose sections lie alike: their places are kept."""
    return _cut(lambda codecs: _page_spans(layout, codecs), bytes(data[: len(layout.streams)]), data, what)


@lru_cache(maxsize=32)
def _page_spans(layout: Layout, codecs: bytes) -> list[_Span]:
    return _spans(layout, layout.streams, [layout.page_rows(stream) for stream in layout.streams], codecs)


def _spans(layout: Layout, wanted: Sequence[Section], n_rows: Sequence[int], codecs: bytes) -> list[_Span]:
    """(codec, begin, end) of each section in a run that starts with these codec bytes."""
    if len(codecs) < len(wanted):
        raise FormatError("section codecs are truncated")
    at = len(wanted) + len(pad4(len(wanted)))
    spans = []
    # A tail has hundreds of sections and few kinds of rows.
    kinds: dict[tuple[int, int], tuple[Codec, int]] = {}
    for section, count, code in zip(wanted, n_rows, codecs, strict=True):
        kind = kinds.get((code, section.width))
        if kind is None:
            if code not in Codec.__members__.values():
                raise FormatError(f"unknown codec {code} in layer {section.layer} {section.part.name}")
            kind = kinds[code, section.width] = Codec(code), layout.section_bytes(section, Codec(code), 1)
        codec, row = kind
        end = at + count * row
        spans.append((codec, at, end))
        at = end
    return spans


def _cut(find: Callable[[bytes], list[_Span]], codecs: bytes, data: memoryview, what: str) -> PackedRun:
    try:
        spans = find(codecs)
    except FormatError as error:
        raise FormatError(f"{what}: {error}") from None
    needed = spans[-1][2] if spans else 0
    if needed != len(data):
        raise FormatError(f"{what}: sections need {needed} bytes, the payload has {len(data)}")
    return PackedRun(spans, data)
