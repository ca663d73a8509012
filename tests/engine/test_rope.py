"""RoPE angles: the recurrence, and YaRN on the compressed layers."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from kvdb_engine.engine import Engine
from kvdb_engine.rope import Rope, compressed_rope, window_rope
from tests.engine.test_config import FLASH, from_hf


def test_window_layers_have_no_scaling(tiny: Engine) -> None:
    rope = window_rope(tiny.info.config)
    positions = np.array([0, 1, 77, 5000])
    exact = positions[:, None] * 10000.0 ** (-2 * np.arange(32) / 64)
    assert np.abs(rope.angles(positions) - exact).max() < 1e-2
    assert np.abs(rope.angles(positions[:3]) - exact[:3]).max() < 1e-4


def test_yarn_of_flash() -> None:
    """Pairs 0 to 15 keep their angle, 25 and above have a sixteenth, between them a ramp."""
    rope = compressed_rope(from_hf(FLASH))
    (angles,) = rope.angles(np.array([1000]))
    plain = 1000 * 160000.0 ** (-2 * np.arange(32) / 64)
    share = angles / plain
    assert share[:16] == pytest.approx(1, abs=1e-4)
    assert share[25:] == pytest.approx(1 / 16, abs=1e-4)
    assert share[20] == pytest.approx(0.5 + 0.5 / 16, abs=1e-4)


def test_angles_follow_the_float32_recurrence() -> None:
    """At a million the recurrence is off an exact table by hundredths of a radian, as ds4's is."""
    rope = window_rope(from_hf(FLASH))
    position = 1_000_003
    angle, step, wanted = np.float32(position), np.float32(np.float32(10000) ** np.float32(-1 / 32)), []
    for _ in range(32):
        wanted.append(angle)
        angle = np.float32(angle * step)
    (found,) = rope.angles(np.array([position]))
    assert found.tolist() == [float(a) for a in wanted]
    exact = [position * 10000.0 ** (-2 * pair / 64) for pair in range(32)]
    assert 1e-3 < max(abs(a - b) for a, b in zip(wanted, exact, strict=True)) < 1


def test_table_is_cos_and_sin() -> None:
    rope = Rope(2, np.float32(0.5), np.float32(1), np.ones(2, np.float32))
    cos, sin = rope.table(np.array([3]))
    assert cos[0].tolist() == [np.float32(math.cos(3)), np.float32(math.cos(1.5))]
    assert sin[0].tolist() == [np.float32(math.sin(3)), np.float32(math.sin(1.5))]


def test_no_yarn_when_the_factor_is_one(tiny: Engine) -> None:
    config = dataclasses.replace(tiny.info.config, yarn_factor=1.0)
    (found,) = compressed_rope(config).angles(np.array([9]))
    assert found == pytest.approx(9 * 160000.0 ** (-2 * np.arange(32) / 64), rel=1e-5)
