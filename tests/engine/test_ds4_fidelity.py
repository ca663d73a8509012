"""The engine against vectors that ds4 made with the same weights (tests/vectors/ds4/README.md)."""

from __future__ import annotations

import numpy as np
import pytest

from kvdb_engine.engine import Engine
from kvdb_engine.fidelity import (
    WAYS,
    Vectors,
    argmax_agreement,
    decode_logits,
    every_logits,
    main,
    nudged_logits,
    one_step,
    own_noise,
    prefill_table,
)


def test_one_step_from_ds4s_own_state(tiny: Engine, vectors: Vectors) -> None:
    """No drift: the whole difference is float32 arithmetic."""
    for row in one_step(tiny, vectors):
        assert row.largest < 1e-4, row


@pytest.mark.parametrize("chunk", [1024, 128, 1])
def test_sections_after_prefill(tiny: Engine, vectors: Vectors, chunk: int) -> None:
    rows = prefill_table(tiny, vectors, chunk)
    assert len(rows) == 12
    for row in rows:
        assert row.correlation > 0.998, row
        assert row.median < 0.05 * max(row.rms, 1), row


def test_decode_from_the_first_token(tiny: Engine, vectors: Vectors) -> None:
    ours, theirs = decode_logits(tiny, vectors), vectors.from_token_1
    assert np.abs(ours[:5] - theirs[:5]).max() < 1e-3
    assert np.median(np.abs(ours - theirs)) < 0.02
    assert np.corrcoef(ours.ravel(), theirs.ravel())[0, 1] > 0.998


def test_the_most_likely_token(tiny: Engine, vectors: Vectors) -> None:
    """The same wherever the reference is surer than the engine's own ways of computing lie apart."""
    ways = [every_logits(tiny.model, vectors.ids, size) for size in WAYS]
    noise = own_noise([*ways, *nudged_logits(tiny.model, vectors.ids)])
    assert np.median(noise) < 0.1
    for ours in ways:
        agree, counted = argmax_agreement(ours, vectors.from_token_1, noise)
        assert counted > 240 and agree == counted
    wrong = np.roll(vectors.from_token_1, 1, axis=1)
    assert argmax_agreement(wrong, vectors.from_token_1, noise)[0] == 0


def test_mlx_agrees_too(vectors: Vectors) -> None:
    pytest.importorskip("mlx.core")
    engine = vectors.engine("mlx-cpu")
    for row in one_step(engine, vectors):
        assert row.largest < 1e-4, row
    for row in prefill_table(engine, vectors, 128):
        assert row.correlation > 0.998, row


def test_command(vectors: Vectors, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "FOLDER" in capsys.readouterr().err
