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


E4M3 = _e4m3_values()
E2M1: F32 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
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

    rows: (n_rows, width) float32. rope_dim: values at the end of a row that FP8 codecs keep wide.
    """
    rows = np.ascontiguousarray(rows, dtype=np.float32)
    if codec is Codec.F32:
        return rows.tobytes()
    width = rows.shape[1]
    data = np.empty((len(rows), row_bytes(codec, width, rope_dim)), np.uint8)
    # In slabs that stay in the processor's cache from the first pass over them to the check.
    for first in range(0, len(rows), slab := max(1, _SLAB_BYTES // (4 * width))):
        part, out = rows[first : first + slab], data[first : first + slab]
        with np.errstate(over="ignore", invalid="ignore"):
            _PACKERS[codec](part, rope_dim, out)
            if not _same_bits(_unpacked(codec, out, width, rope_dim), part):
                return None
    return data.tobytes()


def _pack_f16(rows: F32, rope_dim: int, out: U8) -> None:
    out[:] = rows.astype("<f2").view(np.uint8)


def _pack_fp8_f16(rows: F32, rope_dim: int, out: U8) -> None:
    _pack_fp8(rows, rope_dim, out, "<f2")


def _pack_fp8_f32(rows: F32, rope_dim: int, out: U8) -> None:
    _pack_fp8(rows, rope_dim, out, "<f4")


def _pack_fp8(rows: F32, rope_dim: int, out: U8, wide: str) -> None:
    """An e4m3 value times 2^-120 has its code in bits 20 to 26 of a float32, subnormal codes included."""
    nope = rows.shape[1] - rope_dim
    n_blocks = nope // FP8_BLOCK
    head = np.ascontiguousarray(rows[:, :nope])
    exponents = block_exponents(head, FP8_BLOCK)
    scaled = head.reshape(len(rows), n_blocks, FP8_BLOCK) * power_of_two(-exponents)[..., None]
    scaled *= _TINY
    bits = scaled.view(np.uint32).reshape(len(rows), nope)
    codes = bits >> np.uint32(24)
    codes &= np.uint32(0x80)
    bits >>= np.uint32(20)
    bits &= np.uint32(0x7F)
    codes |= bits
    out[:, :nope] = codes
    out[:, nope : nope + n_blocks] = exponents.astype(np.int8).view(np.uint8)
    out[:, nope + n_blocks :] = np.ascontiguousarray(rows[:, nope:].astype(wide)).view(np.uint8)


def _pack_fp4(rows: F32, rope_dim: int, out: U8) -> None:
    """An e2m1 value times 2^-126 has its code in bits 22 to 24 of a float32, the subnormal code included."""
    n_rows, width = rows.shape
    exponents = block_exponents(rows, FP4_BLOCK)
    scaled = rows.reshape(n_rows, -1, FP4_BLOCK) * power_of_two(np.minimum(-exponents, 126))[..., None]
    scaled *= _TINIER
    bits = scaled.view(np.uint32).reshape(n_rows, width)
    codes = (bits >> np.uint32(28)) & np.uint32(8)
    codes |= (bits >> np.uint32(22)) & np.uint32(7)
    out[:, : width // 2] = codes[:, 0::2] | (codes[:, 1::2] << np.uint32(4))
    out[:, width // 2 :] = exponents.astype(np.int8).view(np.uint8)


_SLAB_BYTES = 128 << 10
_TINY, _TINIER = np.float32(2.0**-120), np.float32(2.0**-126)
_PACKERS = {
    Codec.F16: _pack_f16,
    Codec.FP8_F16: _pack_fp8_f16,
    Codec.FP8_F32: _pack_fp8_f32,
    Codec.FP4: _pack_fp4,
}


def unpack_rows(codec: Codec, data: Buffer, n_rows: int, width: int, rope_dim: int) -> F32:
    """Inverse of pack_rows: a new (n_rows, width) float32 array. data: n_rows * row_bytes(codec) bytes."""
    n_bytes = row_bytes(codec, width, rope_dim)
    if len(data) != n_rows * n_bytes:
        raise ValueError(f"{n_rows} rows of {n_bytes} bytes expected, got {len(data)} bytes")
    if codec is Codec.F32:
        return np.frombuffer(data, "<f4").reshape(n_rows, width).copy()
    packed = np.frombuffer(data, np.uint8).reshape(n_rows, n_bytes)
    rows = np.empty((n_rows, width), np.float32)
    for first in range(0, n_rows, slab := max(1, _SLAB_BYTES // (4 * width))):
        rows[first : first + slab] = _unpacked(codec, packed[first : first + slab], width, rope_dim)
    return rows


def _unpacked(codec: Codec, packed: U8, width: int, rope_dim: int) -> F32:
    """The values of some packed rows: (n_rows, row_bytes) uint8 -> (n_rows, width) float32."""
    n_rows = len(packed)
    if codec is Codec.F16:
        return packed.copy().view("<f2").astype(np.float32)
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
    values *= power_of_two(exponents)[..., None]
    rows[:, :nope] = values.reshape(n_rows, nope)
    rows[:, nope:] = packed[:, nope + n_blocks :].copy().view("<f2" if codec is Codec.FP8_F16 else "<f4")
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
