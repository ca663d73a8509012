"""RoPE angles: one table per layer kind, cos and sin of every position that was asked for.

Window-only layers: base rope_theta, no scaling. Compressed layers (their queries, rows and indexer):
base compress_rope_theta with YaRN, no magnitude factor. Angles follow ds4's recurrence in float32 (p, p*t, p*t*t, ...),
which differs from an exact table by hundredths of a radian near position 1,000,000.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kvdb_engine.config import ModelConfig
from kvdb_engine.packing import F32


@dataclass(frozen=True, slots=True)
class Rope:
    """Frequencies of one layer kind. keep: share of the unscaled angle for each pair; 1 everywhere without YaRN."""

    n_pairs: int
    step: np.float32
    factor: np.float32
    keep: F32

    def angles(self, positions: np.ndarray[tuple[int], np.dtype[np.int64]]) -> F32:
        """(len(positions), n_pairs) float32 angles."""
        plain = np.empty((len(positions), self.n_pairs), np.float32)
        angle = positions.astype(np.float32)
        for pair in range(self.n_pairs):
            plain[:, pair] = angle
            angle = angle * self.step
        if self.factor == 1:
            return plain
        scaled = plain * np.float32(1.0 / self.factor)
        return scaled * (1 - self.keep) + plain * self.keep

    def table(self, positions: np.ndarray[tuple[int], np.dtype[np.int64]]) -> tuple[F32, F32]:
        """(cos, sin), each (len(positions), n_pairs) float32."""
        # float64 cosine of the float32 angle, rounded once: the same on every machine, near enough to cosf.
        angles = self.angles(positions).astype(np.float64)
        return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def window_rope(config: ModelConfig) -> Rope:
    """RoPE of layers without compression."""
    return _rope(config.rope_dim, config.rope_theta, 1.0, None)


def compressed_rope(config: ModelConfig) -> Rope:
    """RoPE of layers with compression, of their rows and of their indexer."""
    return _rope(config.rope_dim, config.compress_rope_theta, config.yarn_factor, config.yarn_pairs())


def _rope(dim: int, base: float, factor: float, pairs: tuple[int, int] | None) -> Rope:
    n_pairs = dim // 2
    keep = np.ones(n_pairs, np.float32)
    if pairs is not None and factor != 1:
        low, high = pairs
        width = np.float32(max(high - low, 0.001))
        ramp = (np.arange(n_pairs, dtype=np.float32) - np.float32(low)) / width
        keep = (1 - np.clip(ramp, 0, 1)).astype(np.float32)
    step = np.float32(np.float32(base) ** np.float32(-2.0 / dim))
    return Rope(n_pairs, step, np.float32(factor), keep)
