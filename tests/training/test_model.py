"""The training model's own parts against the engine's: rounding, export, load. Needs PyTorch; skipped without it."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("safetensors.torch")

TRAINING = Path(__file__).parents[2] / "engine" / "training"
MODEL = Path(__file__).parents[2] / "engine" / "kvdb_engine" / "models" / "dsv4_nano"


@pytest.fixture(autouse=True)
def _training_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(TRAINING), *sys.path])


def _values(rng: np.random.Generator, width: int) -> np.ndarray:
    # Many magnitudes, exact ties of both grids, zeros and a row of equal values.
    values = rng.standard_normal((400, width)) * np.exp2(rng.integers(-12, 12, (400, 1)))
    values[:50] = np.round(values[:50] * 8) / 8
    values[50] = 0
    values[51] = 1
    return values.astype(np.float32)


def test_row_rounding_equals_the_engines():
    import rounding

    from kvdb_engine.rounding import round_kv

    values = _values(np.random.default_rng(1), 96)
    ours = rounding.stored_row(torch.from_numpy(values), 64).numpy()
    assert np.array_equal(ours, round_kv(values.copy(), 32))


def test_index_rounding_equals_the_engines():
    import rounding

    from kvdb_engine.rounding import round_fp4

    values = _values(np.random.default_rng(2), 32)
    assert np.array_equal(rounding.fp4_blocks(torch.from_numpy(values)).numpy(), round_fp4(values.copy()))


def test_hadamard_equals_the_engines():
    import rounding

    from kvdb_engine.rounding import hadamard

    ours = rounding.hadamard(torch.eye(32)).numpy()
    assert np.allclose(ours, hadamard(32) / np.sqrt(32), atol=1e-7)


def test_rounding_lets_gradients_pass():
    import rounding

    x = torch.randn(4, 96, requires_grad=True)
    rounding.stored_row(x, 64).sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))


def test_export_of_the_loaded_model_is_the_shipped_folder(tmp_path: Path):
    import export

    export.save(export.load(MODEL), tmp_path, MODEL / "tokenizer.json")
    for path in sorted(tmp_path.iterdir()):
        assert path.read_bytes() == (MODEL / path.name).read_bytes(), path.name


def test_a_prefix_has_the_same_logits_whatever_follows():
    import export
    import model

    net = export.load(MODEL).eval()
    tokens = torch.randint(7, 2560, (1, 384), generator=torch.Generator().manual_seed(3))
    other = tokens.clone()
    other[:, 200:] = 9
    with torch.no_grad():
        a, _ = net(tokens, model.Mode(rounding=True))
        b, _ = net(other, model.Mode(rounding=True))
    assert torch.allclose(a[:, :200], b[:, :200], atol=1e-4)
