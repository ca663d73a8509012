"""The scenarios about the engine: the compression table and its arithmetic, short versions of both."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvdb_engine.catalog import open_model
from kvdb_engine.engine import Engine
from kvdb_engine.synthetic_model import FLASH
from kvdb_tools.bench import compression, compression_quality, engine
from kvdb_tools.bench.scenario import MissingError, Settings


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(tmp_path, True, "dsv4-nano", lambda line: None)


def test_compression(settings: Settings) -> None:
    result = compression.run(settings)
    assert all(holds for _, holds in result.claims), result.claims
    rows = {str(row[0]): row for row in result.rows}
    assert all(len(row) == len(result.columns) == len(set(result.columns)) for row in result.rows)
    whole = rows["rows, stacked"]
    steps = [rows[name] for name in rows if name.startswith(("architecture", "precision"))]
    assert whole[2] == pytest.approx(steps[0][2] * steps[1][2])  # type: ignore[operator]
    assert rows["weights: 16 bits, GB"][6] == 0.0 and rows["weights: the recipe, GB"][5] > 0.1  # type: ignore[operator]


def test_speed(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    ways = engine.ways(settings)
    assert ways[0][1] == "numpy"
    monkeypatch.setattr(engine, "ways", lambda _: ways[:1])
    result = engine.run(settings)
    (row,) = result.rows
    assert len(row) == len(result.columns) and len(result.claims) == 1
    speeds = [cell for cell in row[1:] if cell is not None]
    assert len(speeds) == len(row) - 2 and all(isinstance(cell, (int, float)) and cell > 0 for cell in speeds)


def test_a_back_end_that_cannot_run_says_why() -> None:
    with pytest.raises(MissingError, match="back end 'abacus' is unknown"):
        engine.measure("dsv4-nano", "abacus", (128,), (0,))


def test_bytes_a_token_of_the_full_geometry() -> None:
    """Worked out by hand: 21 layers of ratio 4 with an index, 20 of ratio 128, 43 in all."""
    plain, halves, packed = compression.row_bytes_a_token(FLASH)
    assert plain == 43 * 512 * 2
    assert halves == 2 * (21 * (512 + 128) / 4 + 20 * 512 / 128)
    assert packed == 21 * (448 + 7 + 128 + 64 + 4) / 4 + 20 * (448 + 7 + 128) / 128


def test_a_model_does_not_differ_from_itself(nano: Engine) -> None:
    tokenizer = nano.info.tokenizer
    stretches = compression_quality.sequences(tokenizer, 1, 300)
    found = compression_quality.compare(nano.model, {"same": nano.model}, tokenizer, stretches)
    assert found["same"] == found["reference"] and found["same"].mean_kl == 0 and found["same"].agreement == 1
    assert 0.5 < found["same"].bits_per_byte < 4


def test_held_out_and_calibration_texts_are_apart() -> None:
    held_out, calibration = compression_quality.texts("held-out"), compression_quality.texts("calibration")
    assert len(held_out) == len(calibration) == 14 and not set(held_out) & set(calibration)


@pytest.fixture(scope="module")
def nano() -> Engine:
    return Engine(open_model("dsv4-nano"), backend_name="numpy")
