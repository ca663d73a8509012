"""Every layout of a Hugging Face folder gives the same model; damage is named."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvdb_engine.catalog import ModelInfo, open_model
from kvdb_engine.config import from_hf
from kvdb_engine.engine import Engine
from kvdb_engine.errors import ModelError
from kvdb_engine.packing import E2M1, E4M3
from kvdb_engine.weights_safetensors import SafetensorsSource, read_file
from tests.engine.checkpoints import CONFIG, Stored, stored, weights, write_folder, write_safetensors

MAKE = Path(__file__).parent.parent / "vectors" / "transformers" / "make.py"
spec = importlib.util.spec_from_file_location("make", MAKE)
assert spec and spec.loader
make = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make)
transformers_names = make.transformers_names

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


def transformers_config() -> dict[str, Any]:
    """CONFIG in the form that transformers' save_pretrained writes."""
    kinds = {0: "sliding_attention", 4: "compressed_sparse_attention", 128: "heavily_compressed_attention"}
    old = ("compress_ratios", "num_hash_layers", "qk_rope_head_dim")
    tree = {key: value for key, value in CONFIG.items() if key not in old}
    factor = CONFIG["qk_rope_head_dim"] / CONFIG["head_dim"]
    rope = {"rope_type": "default", "partial_rotary_factor": factor}
    return {
        **tree,
        "layer_types": [kinds[ratio] for ratio in CONFIG["compress_ratios"]],
        "mlp_layer_types": ["hash_moe", "moe", "moe", "moe"],
        "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 128},
        "partial_rotary_factor": factor,
        "rope_parameters": {"main": {**rope, "rope_theta": 1e4}, "compress": {**rope, "rope_theta": 1.6e5}},
        "eos_token_id": [1, 2],
    }


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


def quantise_fp8(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(codes, E8M0 scale bytes, dequantised values) in blocks of 128 x 128."""
    out, inner = values.shape
    rows, columns = -(-out // 128), -(-inner // 128)
    scale = np.empty((rows, columns), np.uint8)
    codes = np.empty(values.shape, np.uint8)
    back = np.empty_like(values)
    grid = E4M3[:127]
    for r in range(rows):
        for c in range(columns):
            at = np.s_[128 * r : 128 * r + 128, 128 * c : 128 * c + 128]
            exponent = int(np.ceil(np.log2(np.abs(values[at]).max() / 448)))
            scale[r, c] = exponent + 127
            nearest = np.abs(np.abs(values[at])[..., None] / 2.0**exponent - grid).argmin(-1).astype(np.uint8)
            codes[at] = nearest | np.where(values[at] < 0, 128, 0).astype(np.uint8)
            back[at] = E4M3[codes[at]] * 2.0**exponent
    return codes, scale, back


def quantise_fp4(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(packed codes, E8M0 scale bytes, dequantised values) with one scale per 32 inputs."""
    out, inner = values.shape
    blocks = values.reshape(out, inner // 32, 32)
    exponents = np.ceil(np.log2(np.abs(blocks).max(-1) / 6)).astype(int)
    scaled = np.abs(blocks) / 2.0 ** exponents[..., None]
    codes = np.abs(scaled[..., None] - E2M1[:8]).argmin(-1) | np.where(blocks < 0, 8, 0)
    back = (E2M1[codes] * 2.0 ** exponents[..., None]).astype(np.float32).reshape(out, inner)
    codes = codes.reshape(out, inner).astype(np.uint8)
    return codes[:, 0::2] | codes[:, 1::2] << 4, (exponents + 127).astype(np.uint8), back


def official() -> tuple[Stored, dict[str, np.ndarray]]:
    """The official layout: FP8 projections, FP4 routed experts, the rest bf16 or f32; and what it means in f32."""
    entries: Stored = {}
    meaning: dict[str, np.ndarray] = {}
    for name, values in weights().items():
        base = name.removesuffix(".weight")
        if ".experts." in name:
            codes, scale, back = quantise_fp4(values)
            entries[name] = ("I8", codes.shape, codes.tobytes())
        elif ".attn.w" in name or "shared_experts" in name or name.endswith("indexer.wq_b.weight"):
            codes, scale, back = quantise_fp8(values)
            entries[name] = ("F8_E4M3", codes.shape, codes.tobytes())
        else:
            entries |= stored({name: values}, "BF16" if "gate.weight" in name or "embed" in name else "F32")
            meaning[name] = values
            continue
        entries[f"{base}.scale"] = ("F8_E8M0", scale.shape, scale.tobytes())
        meaning[name] = back
    return entries, meaning


def test_official_fp8_and_fp4(tmp_path: Path) -> None:
    entries, meaning = official()
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
        part = name.removesuffix(".weight").replace("experts.3", "experts.*")
        assert part in str(caught.value) and str(tmp_path) in str(caught.value)


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
