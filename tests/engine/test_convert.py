"""Conversion: every layout in, one recipe out, the same model up to the recipe's rounding; refusals leave nothing."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from kvdb_engine.catalog import ModelInfo, open_model
from kvdb_engine.config import from_hf
from kvdb_engine.convert import convert, hf_config
from kvdb_engine.engine import Engine
from kvdb_engine.errors import ModelError
from kvdb_engine.fidelity import Vectors
from kvdb_engine.quantise import quantise
from kvdb_engine.recipe import Recipe, tensor_shapes
from tests.engine.checkpoints import CONFIG, stored, weights, write_folder
from tests.engine.test_config import FLASH

PROMPT = np.random.default_rng(3).integers(0, 64, 200)
RNG = np.random.default_rng(12)


def logits(spec: object) -> np.ndarray:
    engine = Engine(open_model(str(spec)), backend_name="numpy")
    state = engine.new_state()
    for _ in engine.prefill(state, PROMPT):
        pass
    return state.logits


@pytest.fixture
def source(tmp_path: Path, nano_info: ModelInfo) -> Path:
    folder = write_folder(tmp_path / "source", stored(weights(), "BF16"), 2)
    shutil.copy(nano_info.path / "tokenizer.json", folder)
    return folder


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_quantise(bits: int, group_size: int) -> None:
    values = RNG.standard_normal((7, 256)).astype(np.float32)
    values[0] = 0
    values[1] = 3.25
    codes = quantise(values, bits, group_size)
    assert codes.codes.shape == (7, 256 * bits // 32) and codes.scales.shape == (7, 256 // group_size)
    back = codes.dense()
    assert np.array_equal(codes.scales, codes.scales.astype(np.float16).astype(np.float32))
    assert np.abs(back[0]).max() < 1e-3 and np.abs(back[1] - 3.25).max() < 1e-2
    error = np.sqrt(np.mean((back[2:] - values[2:]) ** 2))
    # A uniform step over +-3 deviations; the search does better than the plain range at few bits.
    assert error < 1.2 * 6 / (2**bits - 1) / 12**0.5
    if bits == 2:
        low, high = (f(values[2:].reshape(-1, group_size), axis=1, keepdims=True) for f in (np.min, np.max))
        plain = np.rint((values[2:].reshape(-1, group_size) - low) / (high - low) * 3) * (high - low) / 3 + low
        assert error < np.sqrt(np.mean((plain.reshape(5, 256) - values[2:]) ** 2))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_quantise_for_known_inputs(bits: int) -> None:
    """With the inputs' Gram matrix the product is closer, though the weights are further off."""
    values = RNG.standard_normal((24, 128)).astype(np.float32)
    inputs = (RNG.standard_normal((300, 20)) @ RNG.standard_normal((20, 128))).astype(np.float32)
    gram = inputs.T.astype(np.float64) @ inputs
    plain, fitted = (quantise(values, bits, 64, g).dense() - values for g in (None, gram))
    assert np.linalg.norm(fitted) > np.linalg.norm(plain)
    assert np.linalg.norm(inputs @ fitted.T) < 0.6 * np.linalg.norm(inputs @ plain.T)
    nothing = quantise(values, bits, 64, np.zeros((128, 128)))
    assert np.linalg.norm(nothing.dense() - values) < 1.1 * np.linalg.norm(plain)


def test_quantise_refuses() -> None:
    with pytest.raises(ValueError, match="Gram matrix"):
        quantise(np.zeros((2, 64), np.float32), 4, 64, np.eye(32))
    with pytest.raises(ValueError, match="7 bits"):
        quantise(np.zeros((2, 64), np.float32), 7, 64)
    with pytest.raises(ValueError, match="no multiple"):
        quantise(np.zeros((2, 96), np.float32), 4, 64)


def test_eight_bits_keep_the_model(source: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int, str]] = []
    eight = (8, 32)
    reports = convert(str(source), tmp_path / "q", Recipe(eight, eight, eight, eight), lambda *step: seen.append(step))
    before, after = open_model(str(source)), open_model(str(tmp_path / "q"))
    assert after.family == before.family and after.fingerprint != before.fingerprint
    assert after.config == before.config and after.tokenizer.encode("abc") == before.tokenizer.encode("abc")
    # A loose bound: with random weights one expert or row chosen otherwise changes much.
    assert np.corrcoef(logits(source), logits(tmp_path / "q"))[0, 1] > 0.95
    assert [done for done, _, _ in seen] == sorted({done for done, _, _ in seen}) and seen[-1][0] == seen[-1][1]
    files = sum(p.stat().st_size for p in (tmp_path / "q").glob("*.safetensors"))
    assert sum(report.bytes for report in reports) == seen[-1][1] <= files < seen[-1][1] + 30_000
    assert sum(report.weights for report in reports) == sum(values.size for values in weights().values())
    assert not list(tmp_path.glob("*.part"))


def test_asymmetric_recipe(source: Path, tmp_path: Path) -> None:
    reports = {report.name: report for report in convert(str(source), tmp_path / "q")}
    # Inputs of 64: groups of 128 do not fit and become 64.
    assert reports["routed gate and up"].bits_per_weight == reports["routed down"].bits_per_weight == 2.5
    assert reports["attention and shared expert"].bits_per_weight == pytest.approx(8.5, abs=0.1)
    assert reports["unquantised"].bits_per_weight >= 16
    tree = json.loads((tmp_path / "q" / "config.json").read_text())
    assert tree["quantization"]["layers.1.ffn.experts.w2"] == {"bits": 2, "group_size": 64}
    assert np.isfinite(logits(tmp_path / "q")).all()


def test_calibration(source: Path, nano_info: ModelInfo, tmp_path: Path) -> None:
    """The same bytes, other codes: layers are fitted to the inputs they will have."""
    text, seen = "The same words come back. " * 20, []
    with pytest.raises(ModelError, match="vocabulary of 64"):
        convert(str(source), tmp_path / "q", calibration=text)
    tensors = weights(0, from_hf({**CONFIG, "vocab_size": 2560}))
    source = write_folder(tmp_path / "wide", stored(tensors, "BF16"), 2, vocab_size=2560)
    shutil.copy(nano_info.path / "tokenizer.json", source)
    plain = convert(str(source), tmp_path / "plain")
    fitted = convert(str(source), tmp_path / "q", calibration=text, calibrating=lambda *step: seen.append(step))
    assert plain == fitted and seen == [(n + 1, 16) for n in range(16)] and not list(tmp_path.glob("*.part"))
    assert sorted(p.name for p in (tmp_path / "q").iterdir()) == sorted(p.name for p in (tmp_path / "plain").iterdir())
    sources = [open_model(str(tmp_path / name)).open_weights() for name in ("plain", "q")]
    for part in ("w1", "w2", "w3"):
        a, b = (one.find_experts(3, part) for one in sources)
        assert a is not None and b is not None and not np.array_equal(a.dense(), b.dense())
    a, b = (one.find("head") for one in sources)
    assert a is not None and b is not None and np.array_equal(a.dense(), b.dense())
    assert np.isfinite(logits(tmp_path / "q")).all()


def test_converting_twice_changes_nothing_at_eight_bits(source: Path, tmp_path: Path) -> None:
    eight = (8, 64)
    recipe = Recipe(eight, eight, eight, eight)
    convert(str(source), tmp_path / "once", recipe)
    convert(str(tmp_path / "once"), tmp_path / "twice", recipe)
    a, b = logits(tmp_path / "once"), logits(tmp_path / "twice")
    assert np.corrcoef(a, b)[0, 1] > 0.999


def test_gguf(vectors: Vectors, tmp_path: Path, tiny: Engine) -> None:
    path = tmp_path / "tiny.gguf"
    path.write_bytes(gzip.decompress((vectors.folder / "tiny.gguf.gz").read_bytes()))
    eight = (8, 32)
    convert(str(path), tmp_path / "q", Recipe(eight, eight, eight, eight))
    info = open_model(str(tmp_path / "q"))
    assert info.config == tiny.info.config and info.family == tiny.info.family
    text = "Hello <think> the and 123456 你好"
    for special in (False, True):
        assert info.tokenizer.encode(text, special=special) == tiny.info.tokenizer.encode(text, special=special)
    engine = Engine(info, backend_name="numpy")
    state = engine.new_state()
    engine.step(state, int(vectors.ids[0]))
    assert np.corrcoef(state.logits, vectors.from_token_1[0])[0, 1] > 0.99


def test_shapes_are_those_of_the_checkpoints() -> None:
    shapes = tensor_shapes(from_hf(CONFIG))
    mine = {name.removesuffix(".weight"): values.shape for name, values in weights().items()}
    assert shapes == {name: shape for name, shape in mine.items() if ".experts." not in name}


def test_config_survives() -> None:
    for tree in (CONFIG, FLASH):
        assert from_hf(hf_config(from_hf(tree))) == from_hf(tree)


def test_refusals_leave_nothing(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    (tmp_path / "taken").mkdir()
    with pytest.raises(ModelError, match="exists already"):
        convert(str(source), tmp_path / "taken")
    with pytest.raises(ModelError, match="not found"):
        convert("nothing", target)
    other = write_folder(tmp_path / "llama", stored(weights()), model_type="llama")
    with pytest.raises(ModelError, match="model_type is 'llama'"):
        convert(str(other), target)
    tensors = weights()
    del tensors["layers.2.ffn.experts.3.w2.weight"]
    with pytest.raises(ModelError, match=r"experts\.3\.w2 is missing"):
        convert(str(write_folder(tmp_path / "short", stored(tensors))), target)
    (source / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match="tokenizer"):
        convert(str(source), target)
    assert not target.exists() and not list(tmp_path.glob("*.part"))
