"""Every layout of a Hugging Face folder gives the same model; damage is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvdb_engine.catalog import ModelInfo, open_model
from kvdb_engine.config import from_hf
from kvdb_engine.engine import Engine
from kvdb_engine.errors import ModelError
from kvdb_engine.weights_safetensors import SafetensorsSource, read_file
from tests.engine.checkpoints import CONFIG, stored, weights, write_folder, write_safetensors
from tests.engine.layouts import official, transformers_config, transformers_names

PROMPT = np.random.default_rng(3).integers(0, 64, 300)


def logits(info: ModelInfo) -> np.ndarray:
    engine = Engine(info, backend_name="numpy")
    state = engine.new_state()
    for _ in engine.prefill(state, PROMPT):
        pass
    return state.logits


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    return logits(open_model(str(write_folder(tmp_path_factory.mktemp("f32"), stored(weights())))))


@pytest.mark.parametrize("n_shards", [1, 3])
def test_bf16(tmp_path: Path, reference: np.ndarray, n_shards: int) -> None:
    """The weights are exact in bf16, so nothing may differ."""
    info = open_model(str(write_folder(tmp_path / "m", stored(weights(), "BF16"), n_shards)))
    assert info.quant == "BF16"
    assert logits(info).tobytes() == reference.tobytes()


def test_names_with_model_in_front(tmp_path: Path, reference: np.ndarray) -> None:
    entries = {f"model.{name}": entry for name, entry in stored(weights()).items()}
    assert logits(open_model(str(write_folder(tmp_path, entries)))).tobytes() == reference.tobytes()


def test_transformers_own_names_and_config(tmp_path: Path, reference: np.ndarray) -> None:
    """The mapping of names is the one that transformers itself accepted when the golden vectors were made."""
    assert from_hf(transformers_config()) == from_hf(CONFIG)
    entries = stored(transformers_names(weights(), 4), "BF16")
    assert (
        "model.layers.1.mlp.experts.gate_up_proj" in entries and "model.layers.1.self_attn.q_a_proj.weight" in entries
    )
    folder = write_folder(tmp_path, entries, 2)
    (folder / "config.json").write_text(json.dumps(transformers_config()))
    assert logits(open_model(str(folder))).tobytes() == reference.tobytes()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"layer_types": ["linear_attention"] * 4}, "unknown layer types linear_attention"),
        ({"mlp_layer_types": ["moe", "hash_moe", "moe", "moe"]}, "hash layers that are not the first"),
    ],
)
def test_what_transformers_could_say_and_this_engine_not_run(change: dict[str, Any], match: str) -> None:
    with pytest.raises(ModelError, match=match):
        from_hf({**transformers_config(), **change})


def test_official_fp8_and_fp4(tmp_path: Path) -> None:
    entries, meaning = official(weights())
    info = open_model(str(write_folder(tmp_path / "q", entries, 2)))
    plain = open_model(str(write_folder(tmp_path / "f", stored(meaning))))
    assert logits(info).tobytes() == logits(plain).tobytes()
    assert info.family == plain.family and info.fingerprint != plain.fingerprint


def test_missing_and_misshapen_tensors_are_named(tmp_path: Path) -> None:
    tensors = weights()
    for number, (name, change) in enumerate(
        (
            ("layers.2.attn.compressor.wgate.weight", None),
            ("layers.1.ffn.experts.3.w2.weight", None),
            ("head.weight", np.zeros((3, 3), np.float32)),
            ("layers.0.ffn.gate.tid2eid", None),
        )
    ):
        broken = dict(tensors)
        if change is None:
            del broken[name]
        else:
            broken[name] = change
        info = open_model(str(write_folder(tmp_path / str(number), stored(broken))))
        with pytest.raises(ModelError) as caught:
            Engine(info, backend_name="numpy")
        assert name.removesuffix(".weight") in str(caught.value) and str(tmp_path) in str(caught.value)


def test_damaged_files_are_named(tmp_path: Path) -> None:
    good = write_folder(tmp_path / "good", stored({"a": np.ones(8, np.float32)}))
    path = good / "model-00001-of-00001.safetensors"
    data = path.read_bytes()
    for number, (broken, match) in enumerate(
        (
            (b"", "not a safetensors file"),
            (data[:20], "not a safetensors file"),
            (data[:-4], "tensor a is cut short"),
            (data.replace(b'"F32"', b'"X32"'), "unknown kind"),
            (data[:8] + b"!" + data[9:], "unreadable"),
        )
    ):
        file = tmp_path / f"{number}.safetensors"
        file.write_bytes(broken)
        with pytest.raises(ModelError, match=match) as caught:
            read_file(file)
        assert str(file) in str(caught.value)
    with pytest.raises(ModelError, match="missing"):
        read_file(tmp_path / "none.safetensors")
    path.unlink()
    with pytest.raises(ModelError, match="named by the index, but missing"):
        SafetensorsSource(good)
    (good / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(ModelError, match="unreadable index"):
        SafetensorsSource(good)
    (good / "model.safetensors.index.json").unlink()
    with pytest.raises(ModelError, match=r"holds no \.safetensors"):
        SafetensorsSource(good)


def test_experts_of_unequal_shape(tmp_path: Path) -> None:
    write_safetensors(
        tmp_path / "m.safetensors",
        stored({f"layers.0.ffn.experts.{n}.w1.weight": np.ones((2 + n, 2), np.float32) for n in range(2)}),
    )
    with pytest.raises(ModelError, match="differ in shape"):
        SafetensorsSource(tmp_path).find_experts(0, "w1")
