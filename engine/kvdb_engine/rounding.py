"""Rounding of rows: what the model does to KV and index values before they are kept (numpy form).

FP8: the non-RoPE values of a KV row, in blocks of 64 with a power-of-two scale, go to the nearest e4m3 value. FP4:
index values in blocks of 32 to the nearest e2m1 value. Ties go to the even code. Then everything is rounded to f16, as
ds4 keeps it. Scales come from exact bit arithmetic (packing.block_exponents), so packing finds the same grid again.

Rounding to a grid of 2^q around |v| in [2^e, 2^(e+1)) is done by adding and subtracting 2^(q + 23): float32 addition
rounds to nearest even at exactly that bit. e comes from the exponent bits of v; below the smallest normal code the
grid stays.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from kvdb_engine.packing import F32, FP4_BLOCK, FP8_BLOCK, block_exponents, power_of_two

F16 = npt.NDArray[np.float16]

_EXPONENT_BITS = np.uint32(0x7F800000)
# An f16 moved into the place of an f32's bits is too small by this factor, its subnormal values included.
_HALF_SCALE = np.float32(2.0**112)
_HALF_BITS = np.int32(-0x70002000)  # sign, and what an f16's exponent and mantissa become: 0x8FFFE000


def _round_to_grid(values: F32, mantissa_bits: int, smallest_exponent: int, largest: float) -> F32:
    magnitude = np.minimum(np.abs(values), np.float32(largest))
    exponent = np.maximum(magnitude.view(np.uint32) & _EXPONENT_BITS, np.uint32((smallest_exponent + 127) << 23))
    anchor = (exponent + np.uint32((23 - mantissa_bits) << 23)).view(np.float32)
    magnitude += anchor
    magnitude -= anchor
    return np.copysign(magnitude, values)


def _round_blocks(values: F32, block: int, mantissa_bits: int, smallest_exponent: int, largest: float) -> F32:
    scale = power_of_two(block_exponents(values, block))[..., None]
    shaped = values.reshape(*values.shape[:-1], -1, block)
    return (_round_to_grid(shaped / scale, mantissa_bits, smallest_exponent, largest) * scale).reshape(values.shape)


def round_fp8(values: F32) -> F32:
    """Nearest e4m3 times the block's scale. values: (..., n * 64) float32, contiguous. Returns a new array."""
    return _round_blocks(values, FP8_BLOCK, 3, -6, 448.0)


def round_fp4(values: F32) -> F32:
    """Nearest e2m1 times the block's scale. values: (..., n * 32) float32, contiguous. Returns a new array."""
    return _round_blocks(values, FP4_BLOCK, 1, 0, 6.0)


def widen(values: npt.NDArray[Any]) -> F32:
    """f16 values as f32, exactly; f32 values as they are. Finite values only.

    By integer shifts: numpy's own conversion takes seven times as long, and every decode step reads many rows.
    """
    if values.dtype != np.float16:
        return values
    bits = values.view(np.int16).astype(np.int32)
    bits <<= 13
    bits &= _HALF_BITS
    wide: F32 = bits.view(np.float32)
    wide *= _HALF_SCALE
    return wide


def halve(values: F32) -> F16 | F32:
    """values as f16 if each of them is one, bit for bit; as they are otherwise."""
    bits = (values * (1 / _HALF_SCALE)).view(np.int32)
    half = ((bits >> 13) & 0x7FFF | (bits >> 16) & 0x8000).astype(np.uint16).view(np.float16)
    return half if np.array_equal(widen(half).view(np.int32), values.view(np.int32)) else values


def round_kv(rows: F32, rope_dim: int) -> F16:
    """A KV row as it is kept: FP8 outside the RoPE values where their number allows blocks of 64, f16 everywhere.

    rows: (..., width) float32. Source: docs/engine.md, rounding.
    """
    nope = rows.shape[-1] - rope_dim
    out = rows.copy()
    if nope % FP8_BLOCK == 0:
        out[..., :nope] = round_fp8(np.ascontiguousarray(rows[..., :nope]))
    return out.astype(np.float16)


def hadamard(size: int) -> F32:
    """The Walsh-Hadamard matrix in natural order, entries +-1, not scaled. size: a power of two."""
    matrix = np.ones((1, 1), np.float32)
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return np.ascontiguousarray(matrix)
