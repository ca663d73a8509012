"""Rows that no model computed: deterministic bytes with valid packing, made at memory speed.

A row is a pure function of the hash of all tokens up to it, its layer and its part: equal prefixes give equal rows,
other tokens give other rows. It is one row of a fixed random pool, chosen by the hash, with 56 or more bits of the hash
stamped over its first values, so that no two prefixes share a row by accident.

Invariant: every row is what `packing.pack_rows` would make of its own values: finite, and each block's exponent is
the smallest that holds the block. So unpacking and packing again gives the same bytes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from kvdb_engine.packing import FP4_BLOCK, FP8_BLOCK
from kvdb_protocol.layout import Codec, row_bytes

U8 = npt.NDArray[np.uint8]
U32 = npt.NDArray[np.uint32]
U64 = npt.NDArray[np.uint64]

POOL_ROWS = 1024
_POOL_SHIFT = np.uint64(54)  # the top ten bits of a hash choose the row
_SEED = 0x6B766462

_STAMP_BYTES = 8
# e4m3 has one NaN in each half, all seven magnitude bits set: with bit 3 cleared no stamped byte can be it, and none
# exceeds 240, so the block's largest value stays the one the pool put after the stamp.
_FP8_MASK = np.uint64(0xF7F7F7F7F7F7F7F7)
_FP8_LARGEST = 0x7E  # 448
_FP4_LARGEST = 0x77  # 6 and 6
# Sign and mantissa from the hash, exponent fixed: finite, magnitude between 0.5 and 1.
_F32_MASK, _F32_EXPONENT = np.uint64(0x807FFFFF807FFFFF), np.uint64(0x3F0000003F000000)
_F16_MASK, _F16_EXPONENT = np.uint64(0x83FF83FF83FF83FF), np.uint64(0x3800380038003800)


def mix(values: U64) -> U64:
    """The finaliser of splitmix64: a bijection of 64-bit words that leaves no visible structure."""
    mixed = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def token_words(ids: U32, first: int) -> U64:
    """One word for each token, of its id and its position; the sum of a prefix's words identifies the prefix."""
    words = np.arange(first, first + len(ids), dtype=np.uint64) << np.uint64(32)
    words |= ids
    return mix(words + np.uint64(0x9E3779B97F4A7C15))


class RowPool:
    """All rows of one codec and width."""

    def __init__(self, codec: Codec, width: int, rope_dim: int) -> None:
        """Raises ValueError for a codec that no layout asks for."""
        self.codec = codec
        self.n_bytes = row_bytes(codec, width, rope_dim)
        random = np.random.default_rng([_SEED, int(codec), width, rope_dim])
        match codec:
            case Codec.FP8_F16:
                self._rows = _fp8_rows(random, width, rope_dim)
            case Codec.FP4:
                self._rows = _fp4_rows(random, width)
            case Codec.F32:
                self._rows = _bytes(random.standard_normal((POOL_ROWS, width), np.float32))
            case Codec.F16:
                self._rows = _bytes(random.standard_normal((POOL_ROWS, width), np.float32).astype(np.float16))
            case _:
                raise ValueError(f"no layout asks for codec {codec.name}")

    def rows(self, hashes: U64) -> U8:
        """The packed rows of these hashes: hashes.shape + (n_bytes,), newly allocated, C-contiguous."""
        packed = self._rows.take(hashes >> _POOL_SHIFT, axis=0, mode="clip")
        packed[..., :_STAMP_BYTES] = self._stamps(hashes).view(np.uint8).reshape(*hashes.shape, _STAMP_BYTES)
        return packed

    def _stamps(self, hashes: U64) -> U64:
        match self.codec:
            case Codec.FP8_F16:
                return hashes & _FP8_MASK
            case Codec.F32:
                return hashes & _F32_MASK | _F32_EXPONENT
            case Codec.F16:
                return hashes & _F16_MASK | _F16_EXPONENT
            case _:
                return np.ascontiguousarray(hashes)


def _fp8_rows(random: np.random.Generator, width: int, rope_dim: int) -> U8:
    nope = width - rope_dim
    codes = random.integers(0, 256, (POOL_ROWS, nope), np.uint8)
    codes[(codes & 0x7F) == 0x7F] = 0
    # One value of 448 in each block, where no stamp lies: then the block's exponent is the smallest one possible.
    codes[:, _STAMP_BYTES::FP8_BLOCK] = _FP8_LARGEST
    exponents = random.integers(-12, 1, (POOL_ROWS, nope // FP8_BLOCK), np.int8)
    wide = random.standard_normal((POOL_ROWS, rope_dim), np.float32).astype(np.float16)
    return np.concatenate([codes, _bytes(exponents), _bytes(wide)], axis=1)


def _fp4_rows(random: np.random.Generator, width: int) -> U8:
    codes = random.integers(0, 256, (POOL_ROWS, width // 2), np.uint8)
    codes[:, _STAMP_BYTES :: FP4_BLOCK // 2] = _FP4_LARGEST
    exponents = random.integers(-8, 1, (POOL_ROWS, width // FP4_BLOCK), np.int8)
    return np.concatenate([codes, _bytes(exponents)], axis=1)


def _bytes(array: npt.NDArray[Any]) -> U8:
    return np.ascontiguousarray(array).view(np.uint8)
