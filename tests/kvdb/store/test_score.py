"""Scores: their directions, their limits, and that columns and single numbers agree."""

from __future__ import annotations

import numpy as np
import pytest

from kvdb.store.score import HALF_LIFE_S, decayed_hits, ds4_score, value


def test_hits_halve() -> None:
    assert decayed_hits(8.0, 0.0) == 8.0
    assert decayed_hits(8.0, HALF_LIFE_S) == pytest.approx(4.0)
    assert decayed_hits(8.0, 3 * HALF_LIFE_S) == pytest.approx(1.0)


def test_value_is_seconds_per_byte() -> None:
    base = value(1.0, 60.0, 0.0, 1.0, 10.0, 1e6)
    assert value(1.0, 60.0, 0.0, 1.0, 20.0, 1e6) == pytest.approx(2 * base)
    assert value(1.0, 60.0, 0.0, 1.0, 10.0, 2e6) == pytest.approx(base / 2)
    assert value(2.0, 60.0, 0.0, 1.0, 10.0, 1e6) > base > value(1.0, 600.0, 0.0, 1.0, 10.0, 1e6)


def test_a_continued_snapshot_is_worth_less_until_it_branches() -> None:
    tip = value(0.0, 60.0, 0.0, 1.0, 10.0, 1e6)
    continued = value(0.0, 60.0, 1.0, 0.0, 10.0, 1e6)
    branched = value(0.0, 60.0, 8.0, 0.0, 10.0, 1e6)
    assert continued < tip < branched


def test_what_another_snapshot_covers_is_worth_nothing() -> None:
    assert value(5.0, 60.0, 0.0, 1.0, 0.0, 1e6) == 0


def test_ds4_score_is_ds4s() -> None:
    assert ds4_score(0.0, 2048.0, 52_184_460.0) == pytest.approx(2048 / 52_184_460)
    assert ds4_score(0.005, 2048.0, 52_184_460.0) == ds4_score(0.0, 2048.0, 52_184_460.0)
    assert ds4_score(1.0, 2048.0, 52_184_460.0) == pytest.approx(2 * 2048 / 52_184_460)


def test_columns_and_numbers_agree() -> None:
    rows = np.random.default_rng(1).uniform(0.5, 100.0, (6, 50))
    together = value(rows[0], rows[1], rows[2], rows[3], rows[4], rows[5])
    assert together.tolist() == pytest.approx([value(*map(float, column)) for column in rows.T])
    assert ds4_score(*rows[:3]).tolist() == pytest.approx([ds4_score(*map(float, column)) for column in rows[:3].T])
