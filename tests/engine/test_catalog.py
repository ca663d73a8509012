"""Opening models, and when two of them share a fingerprint."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from kvdb_engine.catalog import open_model, weights_digest
from kvdb_engine.errors import ModelError
from tests.engine.checkpoints import stored, weights, write_folder


def test_built_in() -> None:
    info = open_model("dsv4-nano")
    assert info.name == "dsv4-nano" and info.tokenizer.n_tokens <= info.config.vocab
    assert len(info.fingerprint) == len(info.family) == 32
    assert open_model("mine=dsv4-nano").name == "mine"
    assert open_model("mine=dsv4-nano").fingerprint == info.fingerprint


def test_no_mlx_is_imported() -> None:
    code = "import sys; from kvdb_engine.catalog import open_model; open_model('dsv4-nano').tokenizer; "
    code += "import kvdb_engine.chat, kvdb_engine.sampling, kvdb_engine.packing; "
    code += "sys.exit(any(name.split('.')[0] == 'mlx' for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_fingerprints(tmp_path: Path) -> None:
    tensors = weights()
    base = open_model(str(write_folder(tmp_path / "a", stored(tensors))))
    again = open_model(f"x={write_folder(tmp_path / 'b', stored(tensors))}")
    assert (again.fingerprint, again.family) == (base.fingerprint, base.family)
    bf16 = open_model(str(write_folder(tmp_path / "c", stored(tensors, "BF16"))))
    assert bf16.family == base.family and bf16.fingerprint != base.fingerprint
    tuned = dict(tensors)
    tuned["layers.1.attn.wkv.weight"] = tensors["layers.1.attn.wkv.weight"] * np.float32(2)
    other = open_model(str(write_folder(tmp_path / "d", stored(tuned))))
    assert other.fingerprint != base.fingerprint
    trained = open_model(str(write_folder(tmp_path / "e", stored(weights(1)))))
    assert trained.family != base.family
    unrounded = open_model(str(write_folder(tmp_path / "f", stored(tensors), kv_rounding=False)))
    assert unrounded.family != base.family
    narrower = open_model(str(write_folder(tmp_path / "g", stored(tensors), sliding_window=8)))
    assert narrower.family != base.family


def test_digest_of_a_large_file_samples_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from kvdb_engine import catalog

    monkeypatch.setattr(catalog, "_WHOLE_BYTES", 1 << 20)
    monkeypatch.setattr(catalog, "_HEAD_BYTES", 1 << 18)
    path = tmp_path / "big.bin"
    data = np.random.default_rng(0).integers(0, 256, 3 << 20, dtype=np.uint8)
    path.write_bytes(data.tobytes())
    first = weights_digest([path])
    assert weights_digest([path]) == first
    for place in (5, len(data) - 1, 2 << 20):
        changed = data.copy()
        changed[place : place + (1 << 17)] ^= 1
        path.write_bytes(changed.tobytes())
        assert weights_digest([path]) != first
    path.write_bytes(data[:-1].tobytes())
    assert weights_digest([path]) != first


@pytest.mark.parametrize("spec", ["", "no-such-model", "x=/no/such/folder"])
def test_unknown_models(spec: str) -> None:
    with pytest.raises(ModelError, match=r"empty|not found"):
        open_model(spec)


def test_broken_folders(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"config\.json: missing"):
        open_model(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"config\.json: unreadable"):
        open_model(str(tmp_path))
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ModelError, match="not a JSON object"):
        open_model(str(tmp_path))
    (tmp_path / "weights.bin").write_bytes(b"")
    with pytest.raises(ModelError, match=r"folder with config\.json"):
        open_model(str(tmp_path / "weights.bin"))
    tensors = weights()
    del tensors["layers.2.attn_norm.weight"]
    with pytest.raises(ModelError, match=r"layers\.2\.attn_norm is missing"):
        open_model(str(write_folder(tmp_path / "n", stored(tensors))))
