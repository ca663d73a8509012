"""Affine quantisation of weights: value = code * scale + bias, one scale and bias (f16) for each group of inputs.

The form MLX multiplies with (weights.AffineCodes). At 2 to 4 bits the ends of a group's range are worth less than the
steps between: from several shrunken ranges on, codes and (scale, bias) are fitted to each other in turn (nearest codes,
then least squares), and the best of all is taken for each group.

With the inputs' Gram matrix G = X^T X (calibrate.py), what counts is the error of the product, not of the weights:
|X (W - W')^T|^2. Columns are then quantised one after the other, and each column's error is made up for in those that
follow, as far as the inputs correlate (GPTQ: Frantar et al., 2022).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from kvdb_engine.packing import F32
from kvdb_engine.weights import AffineCodes

F64: TypeAlias = npt.NDArray[np.float64]

BITS = (2, 3, 4, 5, 6, 8)
GROUP_SIZES = (32, 64, 128)
# Shares of a group's range to start from at up to 4 bits, and how often codes and (scale, bias) are fitted from each.
_SHRINK = (0.95, 0.75, 0.55)
_FITS = 4
# What is added to the diagonal of G, as a share of its mean: few calibration tokens say little about rare directions.
_DAMPING = 0.2
# What fits a processor's second-level cache with its temporaries.
_CHUNK_VALUES = 1 << 17


def quantise(values: F32, bits: int, group_size: int, gram: F64 | None = None) -> AffineCodes:
    """Quantise a matrix (out, in); in must be a multiple of the group size. Scales and biases are exact in f16.

    gram: (in, in), the Gram matrix of the inputs that the matrix will meet; None weighs all inputs alike.
    """
    if bits not in BITS or group_size not in GROUP_SIZES:
        raise ValueError(f"{bits} bits in groups of {group_size}: bits are {BITS}, groups {GROUP_SIZES}")
    out, inner = values.shape
    if inner % group_size:
        raise ValueError(f"{inner} inputs are no multiple of the group size {group_size}")
    if gram is not None and gram.shape != (inner, inner):
        raise ValueError(f"a Gram matrix of {gram.shape} for {inner} inputs")
    groups = _by_product(values, bits, group_size, gram) if gram is not None else _by_weights(values, bits, group_size)
    codes, scales, biases = groups
    shape = (out, inner // group_size)
    packed = _packed(codes.reshape(-1, group_size), bits).reshape(out, -1)
    return AffineCodes(packed, scales.reshape(shape), biases.reshape(shape), group_size, bits)


def _by_weights(values: F32, bits: int, group_size: int) -> tuple[npt.NDArray[np.uint8], F32, F32]:
    """Codes (n, group_size), scales and biases (n,) with the least squared error of the weights."""
    groups = np.ascontiguousarray(values, np.float32).reshape(-1, group_size)
    codes = np.empty(groups.shape, np.uint8)
    scales, biases = np.empty(len(groups), np.float32), np.empty(len(groups), np.float32)
    step = max(1, _CHUNK_VALUES // group_size)
    for first in range(0, len(groups), step):
        part = slice(first, first + step)
        codes[part], scales[part], biases[part] = _fit(groups[part], bits, None)
    return codes, scales, biases


def _by_product(values: F32, bits: int, group_size: int, gram: F64) -> tuple[npt.NDArray[np.uint8], F32, F32]:
    """The same with the least squared error of the product with inputs of this Gram matrix."""
    top = (1 << bits) - 1
    size = len(gram)
    level = max(float(np.trace(gram)) / size, 1e-12)
    damped = gram + np.eye(size) * (_DAMPING * level)
    # Row j of the upper Cholesky factor of the inverse: how a change of input j is best made up for by later ones.
    follow = np.linalg.cholesky(np.linalg.inv(damped)).T
    importance = np.diag(damped).astype(np.float32)
    left = values.astype(np.float64)
    out = len(values)
    codes = np.empty((out, size), np.uint8)
    scales, biases = (np.empty((out, size // group_size), np.float32) for _ in range(2))
    for number, first in enumerate(range(0, size, group_size)):
        last = first + group_size
        block = np.ascontiguousarray(left[:, first:last], np.float32)
        _, scale, bias = _fit(block, bits, importance[first:last])
        scales[:, number], biases[:, number] = scale, bias
        errors = np.empty((out, group_size))
        for column in range(first, last):
            code = np.clip(np.rint((left[:, column] - bias) / scale), 0, top)
            codes[:, column] = code
            error = (left[:, column] - (code * scale + bias)) / follow[column, column]
            errors[:, column - first] = error
            left[:, column + 1 : last] -= np.outer(error, follow[column, column + 1 : last])
        left[:, last:] -= errors @ follow[first:last, last:]
    return codes.reshape(-1, group_size), scales.ravel(), biases.ravel()


def _fit(groups: F32, bits: int, importance: F32 | None) -> tuple[npt.NDArray[np.uint8], F32, F32]:
    """(codes, scales, biases) of (n, group_size) values. importance: (group_size,) of each input, or all alike."""
    top = np.float32((1 << bits) - 1)
    mean = _weighted_mean(importance, groups.shape[1])
    low, high = groups.min(axis=1), groups.max(axis=1)
    middle, half = (low + high) / 2, (high - low) / 2
    best = (np.zeros(groups.shape, np.float32), np.ones(len(groups), np.float32), low)
    least = np.full(len(groups), np.inf, np.float32)
    mean_value = mean(groups)
    around = groups - mean_value[:, None]
    code = np.zeros_like(groups)
    for share in _SHRINK if bits <= 4 else (1.0,):
        scale, bias = half * np.float32(2 * share) / top, middle - half * np.float32(share)
        for fit in range(_FITS if bits <= 4 else 1):
            if fit:
                mean_code = mean(code)
                spread = mean(code * code) - mean_code * mean_code
                together = mean(code * around)
                scale = np.where(spread > 1e-6, together / np.maximum(spread, np.float32(1e-6)), scale)
                bias = mean_value - scale * mean_code
            # Rounded to f16 before the codes are chosen, so that codes are the nearest for what will be stored.
            scale, bias = _f16(scale), _f16(bias)
            scale[scale == 0] = np.float32(2.0**-24)
            exact = groups - bias[:, None]
            exact *= (1 / scale)[:, None]
            code = np.rint(exact)
            np.clip(code, 0, top, out=code)
            exact -= code
            exact *= exact
            error = mean(exact) * scale * scale
            better = error < least
            least[better] = error[better]
            for kept, new in zip(best, (code, scale, bias), strict=True):
                kept[better] = new[better]
    return best[0].astype(np.uint8), best[1], best[2]


def _weighted_mean(importance: F32 | None, size: int) -> Callable[[F32], F32]:
    """Mean over the values of each group, weighted."""
    weights = np.full(size, 1 / size, np.float32) if importance is None else importance / importance.sum()
    return lambda values: values @ weights


def _f16(values: F32) -> F32:
    return np.clip(values, -65504, 65504).astype(np.float16).astype(np.float32)


def _packed(codes: np.ndarray, bits: int) -> np.ndarray:
    """(n, group) codes -> (n, group * bits / 32) u32, the first code in the lowest bits."""
    if bits == 8:
        return np.ascontiguousarray(codes).view("<u4")
    spread = np.unpackbits(codes[..., None], axis=-1, count=bits, bitorder="little")
    return np.packbits(spread.reshape(len(codes), -1), axis=-1, bitorder="little").view("<u4")
