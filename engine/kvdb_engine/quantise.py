"""Affine quantisation of weights: value = code * scale + bias, one scale and bias (f16) for each group of inputs.

The form MLX multiplies with (weights.AffineCodes). At 2 to 4 bits the ends of a group's range are worth less than the
steps between: several shrunken ranges are tried for each group, and the one with the least squared error is taken.
"""

from __future__ import annotations

import numpy as np

from kvdb_engine.packing import F32
from kvdb_engine.weights import AffineCodes

BITS = (2, 3, 4, 5, 6, 8)
GROUP_SIZES = (32, 64, 128)
# Shares of a group's range that are tried at up to 4 bits.
_SHRINK = (1.0, 0.92, 0.85, 0.78, 0.72, 0.66, 0.6)
# What fits a processor's second-level cache with its temporaries.
_CHUNK_VALUES = 1 << 17


def quantise(values: F32, bits: int, group_size: int) -> AffineCodes:
    """Quantise a matrix (out, in); in must be a multiple of the group size. Scales and biases are exact in f16."""
    if bits not in BITS or group_size not in GROUP_SIZES:
        raise ValueError(f"{bits} bits in groups of {group_size}: bits are {BITS}, groups {GROUP_SIZES}")
    out, inner = values.shape
    if inner % group_size:
        raise ValueError(f"{inner} inputs are no multiple of the group size {group_size}")
    groups = np.ascontiguousarray(values, np.float32).reshape(-1, group_size)
    codes = np.empty((len(groups), group_size * bits // 32), np.uint32)
    scales, biases = np.empty(len(groups), np.float32), np.empty(len(groups), np.float32)
    step = max(1, _CHUNK_VALUES // group_size)
    for first in range(0, len(groups), step):
        part = slice(first, first + step)
        codes[part], scales[part], biases[part] = _quantise_groups(groups[part], bits)
    shape = (out, inner // group_size)
    return AffineCodes(codes.reshape(out, -1), scales.reshape(shape), biases.reshape(shape), group_size, bits)


def _quantise_groups(groups: F32, bits: int) -> tuple[np.ndarray, F32, F32]:
    """(packed codes, scales, biases) of (n, group_size) values."""
    top = np.float32((1 << bits) - 1)
    low, high = groups.min(axis=1), groups.max(axis=1)
    middle, half = (low + high) / 2, (high - low) / 2
    best: tuple[F32, F32, F32] | None = None
    least = np.full(len(groups), np.inf, np.float32)
    for share in _SHRINK if bits <= 4 else _SHRINK[:1]:
        # Rounded to f16 before the codes are chosen, so that codes are the nearest for what will be stored.
        scale = _f16(half * np.float32(2 * share) / top)
        scale[scale == 0] = np.float32(2.0**-24)
        bias = _f16(middle - half * np.float32(share))
        exact = groups - bias[:, None]
        exact *= (1 / scale)[:, None]
        code = np.rint(exact)
        np.clip(code, 0, top, out=code)
        exact -= code
        error = np.einsum("ij,ij->i", exact, exact) * scale * scale
        if best is None:
            best, least = (code, scale, bias), error
            continue
        better = error < least
        least[better] = error[better]
        for kept, new in zip(best, (code, scale, bias), strict=True):
            kept[better] = new[better]
    assert best is not None
    return _packed(best[0].astype(np.uint8), bits), best[1], best[2]


def _f16(values: F32) -> F32:
    return np.clip(values, -65504, 65504).astype(np.float16).astype(np.float32)


def _packed(codes: np.ndarray, bits: int) -> np.ndarray:
    """(n, group) codes -> (n, group * bits / 32) u32, the first code in the lowest bits."""
    if bits == 8:
        return np.ascontiguousarray(codes).view("<u4")
    spread = np.unpackbits(codes[..., None], axis=-1, count=bits, bitorder="little")
    return np.packbits(spread.reshape(len(codes), -1), axis=-1, bitorder="little").view("<u4")
