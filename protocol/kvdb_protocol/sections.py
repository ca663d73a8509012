"""A run of packed sections: one codec byte for each, padding to 4 bytes, then the rows, section after section.

Pages and tails end with such a run. How many rows a section has follows from the layout and the token count, so only
the codecs are written: the packer may fall back to a wider codec for a section that the preferred one cannot hold.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvdb_protocol.errors import FormatError
from kvdb_protocol.ids import Buffer
from kvdb_protocol.layout import Codec, Layout, Section


@dataclass(frozen=True, slots=True)
class PackedSection:
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


def decode_sections(
    layout: Layout, wanted: Sequence[Section], n_rows: Sequence[int], data: memoryview, what: str
) -> list[PackedSection]:
    """Split a run into its sections without copying; the run must end where `data` ends.

    n_rows: rows of each wanted section. what: name used in errors.
    """
    codec_bytes = bytes(data[: len(wanted)])
    if len(codec_bytes) < len(wanted):
        raise FormatError(f"{what}: section codecs are truncated")
    at = len(wanted) + len(pad4(len(wanted)))
    found = []
    for section, count, code in zip(wanted, n_rows, codec_bytes, strict=True):
        if code not in Codec.__members__.values():
            raise FormatError(f"{what}: unknown codec {code} in layer {section.layer} {section.part.name}")
        size = layout.section_bytes(section, Codec(code), count)
        found.append(PackedSection(Codec(code), data[at : at + size]))
        at += size
    if at != len(data):
        raise FormatError(f"{what}: sections need {at} bytes, the payload has {len(data)}")
    return found
