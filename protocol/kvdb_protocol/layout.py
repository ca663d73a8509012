"""Layout: what a state looks like to the store. Ratios, widths and codecs; never tensors.

A state of a model with `n` tokens holds, for each layer,

    window      the last min(n, window) raw rows                          width head_dim
    compressed  floor(n / ratio) rows, if ratio is not 0                  width head_dim
    index       floor(n / ratio) rows, if ratio is 4                      width index_dim
    frontier    the unfinished group: kv and score rows of the compressor, for ratio 4 also of the indexer's

Every array of rows is a *section*: a number of rows of one width, each row packed by one codec. This module counts
sections, rows and bytes. How a row is packed and unpacked is the engine's business (`kvdb_engine.packing`).

Numbers of this file are on disk: a codec's number never changes its meaning.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property

import msgpack
import numpy as np
import numpy.typing as npt

from kvdb_protocol.errors import FormatError

MiB = 1 << 20

I64 = npt.NDArray[np.int64]

# A page is meant to be about 1 MiB: large enough that one record's 4096-byte rounding and index entry do not count,
# small enough that the unfinished page, which every tail repeats, stays small beside window and frontier.
PAGE_BYTES_TARGET = MiB
PAGE_TOKENS_MIN = 128
# A small model would reach 1 MiB only after thousands of tokens, and each tail repeats half a page on average.
PAGE_TOKENS_MAX = 512


class Codec(IntEnum):
    """How one row is packed. On disk as u8."""

    F32 = 1  # width x f32
    F16 = 2  # width x f16
    FP8_F16 = 3  # (width - rope) e4m3, one i8 exponent per 64 of them, rope x f16
    FP8_F32 = 4  # the same with rope x f32 (rows of ds4's Metal and CUDA files)
    FP4 = 5  # width / 2 bytes of two e2m1, low nibble first; one i8 exponent per 32 values


class Part(IntEnum):
    """Which of a layer's arrays a section holds."""

    COMPRESSED = 1
    INDEX = 2
    WINDOW = 3
    FRONTIER_KV = 4
    FRONTIER_SCORE = 5
    INDEX_FRONTIER_KV = 6
    INDEX_FRONTIER_SCORE = 7


@dataclass(frozen=True, slots=True)
class Section:
    """One array of rows of one layer, with the codec the layout prefers for it."""

    layer: int
    part: Part
    width: int
    codec: Codec


def row_bytes(codec: Codec, width: int, rope_dim: int) -> int:
    """Bytes of one packed row. Raises FormatError where the codec cannot hold that width."""
    nope = width - rope_dim
    match codec:
        case Codec.F32:
            return 4 * width
        case Codec.F16:
            return 2 * width
        case Codec.FP8_F16 | Codec.FP8_F32:
            if nope <= 0 or nope % 64:
                raise FormatError(f"codec {codec.name} needs a multiple of 64 non-RoPE values, got {nope}")
            return nope + nope // 64 + (2 if codec is Codec.FP8_F16 else 4) * rope_dim
        case Codec.FP4:
            if width % 32:
                raise FormatError(f"codec FP4 needs a width that is a multiple of 32, got {width}")
            return width // 2 + width // 32


@dataclass(frozen=True)
class Layout:
    """Describes the states of one model to the store.

    ratios: one per layer, 0, 4 or 128. Built by `make_layout`.
    `kv_codec` is for window and compressed rows, `index_codec` for index rows.
    """

    vocab: int
    context: int
    window: int
    head_dim: int
    rope_dim: int
    index_dim: int
    ratios: tuple[int, ...]
    page_tokens: int
    kv_codec: Codec
    index_codec: Codec

    def __post_init__(self) -> None:
        """Refuse a layout whose pages would cut a group of rows in two."""
        if any(ratio not in (0, 4, 128) for ratio in self.ratios):
            raise FormatError(f"ratios must be 0, 4 or 128, got {sorted(set(self.ratios))}")
        if self.page_tokens <= 0 or self.page_tokens % PAGE_TOKENS_MIN:
            raise FormatError(f"page_tokens must be a positive multiple of {PAGE_TOKENS_MIN}, got {self.page_tokens}")

    @cached_property
    def streams(self) -> tuple[Section, ...]:
        """The append-only sections, in the order pages hold them."""
        found = []
        for layer, ratio in enumerate(self.ratios):
            if ratio:
                found.append(Section(layer, Part.COMPRESSED, self.head_dim, self.kv_codec))
            if ratio == 4:
                found.append(Section(layer, Part.INDEX, self.index_dim, self.index_codec))
        return tuple(found)

    @cached_property
    def tail_sections(self) -> tuple[Section, ...]:
        """The sections of a tail in order: rows past the last page, windows, frontiers."""
        windows = [Section(layer, Part.WINDOW, self.head_dim, self.kv_codec) for layer in range(len(self.ratios))]
        frontiers = []
        for layer, ratio in enumerate(self.ratios):
            overlap = 2 if ratio == 4 else 1
            if ratio:
                frontiers.append(Section(layer, Part.FRONTIER_KV, overlap * self.head_dim, Codec.F32))
                frontiers.append(Section(layer, Part.FRONTIER_SCORE, overlap * self.head_dim, Codec.F32))
            if ratio == 4:
                frontiers.append(Section(layer, Part.INDEX_FRONTIER_KV, overlap * self.index_dim, Codec.F32))
                frontiers.append(Section(layer, Part.INDEX_FRONTIER_SCORE, overlap * self.index_dim, Codec.F32))
        return (*self.streams, *windows, *frontiers)

    def page_rows(self, section: Section) -> int:
        """Rows of a stream that one page holds."""
        return self.page_tokens // self.ratios[section.layer]

    def tail_rows(self, section: Section, n_tokens: int) -> int:
        """Rows of a section that the tail of a state of `n_tokens` holds."""
        ratio = self.ratios[section.layer]
        match section.part:
            case Part.COMPRESSED | Part.INDEX:
                return n_tokens // ratio - self.n_pages(n_tokens) * self.page_rows(section)
            case Part.WINDOW:
                return min(n_tokens, self.window)
            case _:
                return frontier_rows(ratio, n_tokens)

    def tail_row_counts(self, n_tokens: int) -> I64:
        """`tail_rows` of each tail section. Sections of one part and ratio have as many: one of each is computed."""
        kinds, places = self._tail_kinds
        return np.array([self.tail_rows(section, n_tokens) for section in kinds], np.int64)[places]

    @cached_property
    def _tail_kinds(self) -> tuple[list[Section], I64]:
        """One section of each part and ratio, and for every tail section the number of its kind among them."""
        kinds: dict[tuple[Part, int], int] = {}
        firsts: list[Section] = []
        places: list[int] = []
        for section in self.tail_sections:
            kind = (section.part, self.ratios[section.layer])
            if kind not in kinds:
                kinds[kind] = len(firsts)
                firsts.append(section)
            places.append(kinds[kind])
        return firsts, np.array(places, np.int64)

    def n_pages(self, n_tokens: int) -> int:
        """Full pages of a state of `n_tokens`."""
        return n_tokens // self.page_tokens

    def section_bytes(self, section: Section, codec: Codec, n_rows: int) -> int:
        """Bytes of `n_rows` rows packed with `codec`."""
        return n_rows * row_bytes(codec, section.width, self.rope_dim)

    def to_bytes(self) -> bytes:
        """Serialise for the index (msgpack array, field order as declared)."""
        packed: bytes = msgpack.packb(
            (
                *(1, self.vocab, self.context, self.window, self.head_dim, self.rope_dim, self.index_dim),
                *(self.ratios, self.page_tokens, int(self.kv_codec), int(self.index_codec)),
            )
        )
        return packed

    @classmethod
    def from_bytes(cls, data: bytes) -> Layout:
        """Inverse of to_bytes; raises FormatError on anything else."""
        try:
            version, *ints, ratios, page_tokens, kv_codec, index_codec = msgpack.unpackb(data)
            if version != 1:
                raise FormatError(f"layout version {version} is not supported")
            vocab, context, window, head_dim, rope_dim, index_dim = ints
            return cls(
                vocab,
                context,
                window,
                head_dim,
                rope_dim,
                index_dim,
                tuple(ratios),
                page_tokens,
                Codec(kv_codec),
                Codec(index_codec),
            )
        except (ValueError, TypeError) as error:
            raise FormatError(f"bad layout: {error}") from error


def frontier_rows(ratio: int, n_tokens: int) -> int:
    """Occupied frontier rows after `n_tokens`: the open group and, for ratio 4, the previous group before it."""
    previous = 4 if ratio == 4 and n_tokens >= 4 else 0
    return previous + n_tokens % ratio


def default_page_tokens(ratios: tuple[int, ...], compressed_bytes: int, index_bytes: int) -> int:
    """The largest power-of-two multiple of 128 tokens whose rows are at most 1 MiB, between 128 and 512.

    compressed_bytes, index_bytes: packed bytes of one compressed and of one index row.
    """
    page_tokens = PAGE_TOKENS_MIN
    while page_tokens < PAGE_TOKENS_MAX:
        wider = 2 * page_tokens
        total = sum(wider // r * (compressed_bytes + (index_bytes if r == 4 else 0)) for r in ratios if r)
        if total > PAGE_BYTES_TARGET:
            break
        page_tokens = wider
    return page_tokens


def make_layout(
    *,
    vocab: int,
    context: int,
    window: int,
    head_dim: int,
    rope_dim: int,
    index_dim: int,
    ratios: tuple[int, ...],
    page_tokens: int = 0,
    rounded: bool = True,
) -> Layout:
    """Build a layout with the tightest codecs the widths allow.

    rounded: whether the engine rounds rows to FP8 and FP4 (ds4-spec 1.5 to 1.7); without that rows are f32.
    """
    nope = head_dim - rope_dim
    kv_codec = Codec.FP8_F16 if rounded and nope > 0 and nope % 64 == 0 else Codec.F16 if rounded else Codec.F32
    index_codec = Codec.FP4 if rounded and index_dim and index_dim % 32 == 0 else Codec.F32
    if not page_tokens:
        page_tokens = default_page_tokens(
            ratios,
            row_bytes(kv_codec, head_dim, rope_dim),
            row_bytes(index_codec, index_dim, rope_dim) if index_dim else 0,
        )
    return Layout(
        vocab, context, window, head_dim, rope_dim, index_dim, tuple(ratios), page_tokens, kv_codec, index_codec
    )
