"""Packing of rows: float32 rows <-> the bytes of a `kvdb_protocol.layout.Codec`, without loss.

Invariant: `pack_rows` returns bytes only if unpacking them gives back every bit of its input (-0.0 included); otherwise
it returns None, and `pack_section` takes the next wider codec. F32 holds anything.

FP8 (e4m3): blocks of 64 values share a power-of-two scale 2^k, k = ceil(log2(max(amax, 1e-4) / 448)).
FP4 (e2m1): blocks of 32, k = ceil(log2(max(amax, 7.052966e-38) / 6)); two values a byte, the first in the low nibble.
k comes from the bits of amax, never from a float logarithm: 448 = 1.75 * 2^8 and 6 = 1.5 * 2^2, so comparing the
mantissa with .75 or .5 decides exactly. The values were rounded by the same rule before (rounding.py); repacking
rounded values may find a smaller k for a block, and that k holds them too.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kvdb_protocol.ids import Buffer
from kvdb_protocol.layout import Codec, Section, row_bytes
from kvdb_protocol.sections import PackedSection

F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]

FP8_BLOCK = 64
FP4_BLOCK = 32
FP8_FLOOR = np.float32(1e-4)
FP4_FLOOR = np.float32(7.052966e-38)

_FALLBACK = {
    Codec.FP8_F16: (Codec.FP8_F16, Codec.FP8_F32, Codec.F32),
    Codec.FP8_F32: (Codec.FP8_F32, Codec.F32),
    Codec.FP4: (Codec.FP4, Codec.F32),
    Codec.F16: (Codec.F16, Codec.F32),
    Codec.F32: (Codec.F32,),
}


def _e4m3_values() -> F32:
    """The value of each of the 256 e4m3 codes; the two NaN codes are given 480, which no packer emits."""
    code = np.arange(256)
    exponent = (code >> 3) & 15
    mantissa = code & 7
    magnitude = np.where(
        exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * 2.0 ** (np.maximum(exponent, 1) - 10)
    ).astype(np.float32)
    return np.where(code & 128, -magnitude, magnitude).astype(np.float32)


def _code_table(values: F32, drop_bits: int) -> U8:
    """Map the top bits of a float32 to the code whose value has exactly those bits (0 where there is none)."""
    table = np.zeros(1 << (32 - drop_bits), np.uint8)
    table[values.view(np.uint32) >> drop_bits] = np.arange(values.size, dtype=np.uint8)
    return table


E4M3 = _e4m3_values()
E2M1: F32 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
# Sign, exponent and three mantissa bits identify an e4m3 value, subnormals included; one mantissa bit does for e2m1.
_E4M3_CODE = _code_table(E4M3, 20)
_E2M1_CODE = _code_table(E2M1, 22)
_E2M1_PAIR: F32 = np.stack([np.tile(E2M1, 16), np.repeat(E2M1, 16)], axis=-1).copy()


def block_exponents(values: F32, block: int) -> npt.NDArray[np.int32]:
    """The exponent k of each block. values: (..., n * block) float32, finite. Returns (..., n) int32."""
    shaped = np.abs(values).reshape(*values.shape[:-1], -1, block)
    floor, shift, limit = (FP8_FLOOR, 8, 0x600000) if block == FP8_BLOCK else (FP4_FLOOR, 2, 0x400000)
    bits = np.maximum(shaped.max(axis=-1), floor).view(np.uint32)
    above = (bits & np.uint32(0x7FFFFF)) > limit
    exponents: npt.NDArray[np.int32] = (bits >> np.uint32(23)).astype(np.int32) - (127 + shift) + above
    return exponents


def power_of_two(exponents: npt.NDArray[np.int32]) -> F32:
    """2^k as float32, exact for normal results (-126 <= k <= 127)."""
    return ((exponents + 127).astype(np.uint32) << np.uint32(23)).view(np.float32)


def pack_rows(codec: Codec, rows: F32, rope_dim: int) -> bytes | None:
    """Pack rows, or return None if this codec cannot hold every bit of them.

    rows: (n_rows, width) float32, C-contiguous. rope_dim: values at the end of a row that FP8 codecs keep wide.
    """
    rows = np.ascontiguousarray(rows, dtype=np.float32)
    if codec is Codec.F32:
        return rows.tobytes()
    if not rows.size:
        return b""
    if codec is Codec.F16:
        with np.errstate(over="ignore", invalid="ignore"):
            packed = rows.astype(np.float16)
        return packed.tobytes() if _same_bits(packed.astype(np.float32), rows) else None
    if not np.isfinite(rows).all():
        return None
    if codec is Codec.FP4:
        exponents = block_exponents(rows, FP4_BLOCK)
        scaled = rows.reshape(len(rows), -1, FP4_BLOCK) / power_of_two(exponents)[..., None]
        codes = _E2M1_CODE[scaled.view(np.uint32) >> 22].reshape(len(rows), -1)
        nibbles = codes[:, 0::2] | (codes[:, 1::2] << 4)
        data = np.concatenate([nibbles, exponents.astype(np.int8).view(np.uint8)], axis=1)
    else:
        nope = rows.shape[1] - rope_dim
        head, tail = rows[:, :nope], rows[:, nope:]
        exponents = block_exponents(head, FP8_BLOCK)
        scaled = head.reshape(len(rows), -1, FP8_BLOCK) / power_of_two(exponents)[..., None]
        codes = _E4M3_CODE[scaled.view(np.uint32) >> 20].reshape(len(rows), -1)
        with np.errstate(over="ignore"):
            wide = np.ascontiguousarray(tail.astype(np.float16 if codec is Codec.FP8_F16 else np.float32))
        data = np.concatenate([codes, exponents.astype(np.int8).view(np.uint8), wide.view(np.uint8)], axis=1)
    packed_bytes = data.tobytes()
    back = unpack_rows(codec, packed_bytes, len(rows), rows.shape[1], rope_dim)
    return packed_bytes if _same_bits(back, rows) else None


def unpack_rows(codec: Codec, data: Buffer, n_rows: int, width: int, rope_dim: int) -> F32:
    """Inverse of pack_rows: a new (n_rows, width) float32 array. data: n_rows * row_bytes(codec) bytes."""
    n_bytes = row_bytes(codec, width, rope_dim)
    if len(data) != n_rows * n_bytes:
        raise ValueError(f"{n_rows} rows of {n_bytes} bytes expected, got {len(data)} bytes")
    if codec is Codec.F32:
        return np.frombuffer(data, "<f4").reshape(n_rows, width).copy()
    if codec is Codec.F16:
        return np.frombuffer(data, "<f2").reshape(n_rows, width).astype(np.float32)
    packed = np.frombuffer(data, np.uint8).reshape(n_rows, n_bytes)
    rows = np.empty((n_rows, width), np.float32)
    if codec is Codec.FP4:
        half, n_blocks = width // 2, width // FP4_BLOCK
        exponents = packed[:, half:].copy().view(np.int8).astype(np.int32)
        values = _E2M1_PAIR[packed[:, :half]].reshape(n_rows, n_blocks, FP4_BLOCK)
        np.multiply(values, power_of_two(exponents)[..., None], out=rows.reshape(n_rows, n_blocks, FP4_BLOCK))
        return rows
    nope = width - rope_dim
    n_blocks = nope // FP8_BLOCK
    exponents = packed[:, nope : nope + n_blocks].copy().view(np.int8).astype(np.int32)
    values = E4M3[packed[:, :nope]].reshape(n_rows, n_blocks, FP8_BLOCK)
    rows[:, :nope] = (values * power_of_two(exponents)[..., None]).reshape(n_rows, nope)
    wide = packed[:, nope + n_blocks :].copy().view("<f2" if codec is Codec.FP8_F16 else "<f4")
    rows[:, nope:] = wide
    return rows


def pack_section(section: Section, rows: F32, rope_dim: int) -> PackedSection:
    """Pack rows with the section's codec, or with the next wider one that loses nothing."""
    for codec in _FALLBACK[section.codec]:
        data = pack_rows(codec, rows, rope_dim)
        if data is not None:
            return PackedSection(codec, data)
    raise AssertionError("codec F32 holds any row")


def unpack_section(section: Section, packed: PackedSection, n_rows: int, rope_dim: int) -> F32:
    """The rows of a packed section: (n_rows, section.width) float32, newly allocated."""
    return unpack_rows(packed.codec, packed.data, n_rows, section.width, rope_dim)


def _same_bits(a: F32, b: F32) -> bool:
    return bool(np.array_equal(a.view(np.uint32), b.view(np.uint32)))
