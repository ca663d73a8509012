"""GGUF blocks that are no affine codes: kept as they are in memory, expanded in MLX when they are needed.

IQ2_XXS, 66 bytes for 256 values: f16 d, then 8 groups of 32 values: four bytes that each name 8 values of a code book
of 256 entries, and a u32 with four 7-bit sign patterns and a 4-bit scale s. value = d (0.5 + s) / 4 x entry x sign.

Q2_K, 84 bytes for 256 values: 16 bytes with a 4-bit scale s and a 4-bit minimum m for each 16 values, 64 bytes of 2-bit
codes q, f16 d and dmin. value = d s q - dmin m.

So a routed expert of DeepSeek V4 Flash stays at 2.06 and 2.63 bits per weight; a token expands those it uses.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import mlx.core as mx
import numpy as np

from kvdb_engine.ops import ExpertWeights
from kvdb_engine.weights_gguf import GgufTensor

BLOCK_VALUES = 256
BLOCK_BYTES = {"IQ2_XXS": 66, "Q2_K": 84}
# Experts of a long chunk are expanded so many at a time.
_EXPERTS_AT_ONCE = 16


@dataclass(frozen=True, slots=True)
class Blocks:
    """Stacked matrices of one kind. raw: (experts, out, row bytes) uint8."""

    kind: str
    raw: mx.array


def packed_blocks(tensor: Any) -> Blocks | None:
    """A tensor's blocks as they are in the file, if they are of a kind that `expand` knows."""
    if isinstance(tensor, GgufTensor) and tensor.kind in BLOCK_BYTES and len(tensor.shape) == 3:
        return Blocks(tensor.kind, mx.array(np.asarray(tensor.raw.data)))
    return None


def experts(
    weights: ExpertWeights,
    x: mx.array,
    ids: mx.array,
    share: mx.array,
    swiglu: Callable[[mx.array, mx.array], mx.array],
) -> mx.array:
    """Ops.experts for blocks. x: (T, in); ids, share: (T, k); swiglu(gate, up)."""
    gate, up, down = weights.gate, weights.up, weights.down
    (n_tokens, count), n_experts = ids.shape, gate.raw.shape[0]
    if n_tokens == 1:
        chosen = ids[0]
        middle = swiglu(x @ _matrices(gate, chosen), x @ _matrices(up, chosen)) * share[0][:, None, None]
        return (middle @ _matrices(down, chosen)).sum(0)
    # Each expert gets a block of rows as long as the fullest one needs, and a few experts are expanded at a time.
    flat = ids.reshape(-1)
    slot = mx.cumsum((flat[None] == mx.arange(n_experts)[:, None]).astype(mx.int32), axis=1)
    capacity = int(np.array(slot[:, -1]).max())
    place = flat * capacity + (mx.take_along_axis(slot, flat[None], axis=0)[0] - 1)
    source = mx.zeros(n_experts * capacity, mx.int32)
    source[place] = mx.arange(n_tokens * count, dtype=mx.int32) // count
    shares = mx.zeros(n_experts * capacity)
    shares[place] = share.reshape(-1)
    rows = x[source].reshape(n_experts, capacity, -1)
    shares = shares.reshape(n_experts, capacity, 1)
    found = []
    for first in range(0, n_experts, _EXPERTS_AT_ONCE):
        some = mx.arange(first, min(first + _EXPERTS_AT_ONCE, n_experts))
        middle = swiglu(rows[some] @ _matrices(gate, some), rows[some] @ _matrices(up, some)) * shares[some]
        found.append(middle @ _matrices(down, some))
        mx.eval(found[-1])  # frees the expanded matrices before the next ones
    out = mx.concatenate(found, axis=0).reshape(n_experts * capacity, -1)
    return out[place].reshape(n_tokens, count, -1).sum(1)


def _matrices(weight: Blocks, chosen: mx.array) -> mx.array:
    """(k, in, out) float32 of the chosen matrices."""
    return expand(weight.kind, weight.raw[chosen]).swapaxes(1, 2)


def expand(kind: str, blocks: mx.array) -> mx.array:
    """Values of packed rows. blocks: (..., row bytes) uint8. Returns (..., values) float32."""
    *leading, row_bytes = blocks.shape
    size = BLOCK_BYTES[kind]
    split = blocks.reshape(-1, size)
    values = _expand_iq2_xxs(split) if kind == "IQ2_XXS" else _expand_q2_k(split)
    return values.reshape(*leading, row_bytes // size * BLOCK_VALUES)


@cache
def _tables() -> tuple[mx.array, mx.array]:
    """IQ2_XXS: the code book (256, 8) and the signs (128, 8) of each pattern, both float32."""
    from gguf.quants import IQ2_XXS

    IQ2_XXS.init_grid()  # type: ignore[no-untyped-call]
    book = np.asarray(IQ2_XXS.grid, np.float32).reshape(256, 8)
    bits = np.unpackbits(np.frombuffer(IQ2_XXS.ksigns, np.uint8)[:, None], axis=1, bitorder="little")
    return mx.array(book), mx.array(1 - 2 * bits.astype(np.float32))


def _half(pair: Any) -> mx.array:
    """(n, 2) bytes of an f16 -> (n, 1) float32."""
    return mx.contiguous(pair).view(mx.float16).astype(mx.float32)


def _expand_iq2_xxs(blocks: mx.array) -> mx.array:
    book, signs = _tables()
    groups = blocks[:, 2:].reshape(-1, 8, 8)
    word = groups[..., 4:].astype(mx.uint32)
    packed = word[..., 0] | (word[..., 1] << 8) | (word[..., 2] << 16) | (word[..., 3] << 24)
    scale = _half(blocks[:, :2]) * (0.5 + (packed >> 28).astype(mx.float32)) * 0.25
    patterns = (packed[..., None] >> mx.array([0, 7, 14, 21], dtype=mx.uint32)) & 127
    values = book[groups[..., :4]] * signs[patterns]
    return values * scale[..., None, None]


def _expand_q2_k(blocks: mx.array) -> mx.array:
    scales = blocks[:, :16]
    step = (_half(blocks[:, 80:82]) * (scales & 15).astype(mx.float32)).reshape(-1, 2, 4, 2, 1)
    least = (_half(blocks[:, 82:84]) * (scales >> 4).astype(mx.float32)).reshape(-1, 2, 4, 2, 1)
    # 64 bytes hold two runs of 128 values; in a run, bits 2j of byte l are value 32 j + l.
    codes = blocks[:, 16:80].reshape(-1, 2, 1, 32) >> mx.array([0, 2, 4, 6], dtype=mx.uint8).reshape(1, 1, 4, 1)
    values = (codes & 3).astype(mx.float32).reshape(-1, 2, 4, 2, 16)
    return values * step - least
