"""Quantised weights stay packed on MLX, mean the same everywhere, and give the same logits as their float values."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvdb_engine.catalog import open_model
from kvdb_engine.engine import Engine
from kvdb_engine.errors import ModelError
from kvdb_engine.fidelity import Vectors
from kvdb_engine.weights import AffineTensor, CompactTensor, HostTensor, StackedTensor, regroup
from kvdb_engine.weights_gguf import GgufSource, _affine_q4_k
from kvdb_engine.weights_safetensors import SafetensorsSource
from tests.engine.checkpoints import Stored, stored, write_safetensors
from tests.engine.layouts import mlx_block_floats, quantised_folder
from tests.engine.layouts import mlx_quantise as quantise

mx = pytest.importorskip("mlx.core")
RNG = np.random.default_rng(11)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_codes_mean_what_mlx_says(bits: int) -> None:
    values = RNG.standard_normal((6, 128)).astype(np.float32)
    codes = quantise(values, bits, 64)
    theirs = mx.dequantize(
        mx.array(codes.codes), mx.array(codes.scales), mx.array(codes.biases), group_size=64, bits=bits
    )
    assert np.abs(codes.dense() - np.array(theirs)).max() < 1e-6
    tensor = AffineTensor(codes)
    assert tensor.shape == (6, 128)
    assert regroup(tensor, 2, 3).shape == (2, 3, 128)
    both = StackedTensor((tensor, tensor))
    assert both.shape == (2, 6, 128) and both.affine() is not None
    mixed = StackedTensor((tensor, HostTensor(values)))
    assert mixed.affine() is None and np.array_equal(mixed.dense()[1], values)


def test_q8_0_keeps_every_bit(vectors: Vectors, tmp_path: Path) -> None:
    import gzip

    path = tmp_path / "tiny.gguf"
    path.write_bytes(gzip.decompress((vectors.folder / "tiny.gguf.gz").read_bytes()))
    source = GgufSource(path)
    found = 0
    for name in ("head", "layers.2.attn.wo_a", "layers.0.ffn.shared_experts.w2"):
        tensor = source.find(name)
        assert tensor is not None
        codes = tensor.affine()
        assert codes is not None and codes.bits == 8
        assert np.array_equal(codes.dense(), tensor.dense())
        found += 1
    assert found == 3
    routed = source.find_experts(2, "w1")
    assert routed is not None and routed.affine() is None  # IQ2_XXS is a code book, not an affine code


def test_q4_k_means_what_gguf_says() -> None:
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    raw = RNG.integers(0, 256, (5, 2 * 144), dtype=np.uint8)
    for block in (0, 144):
        raw[:, block : block + 4] = np.array([0.01, 0.02], np.float16).view(np.uint8)
    theirs = dequantize(raw, GGMLQuantizationType.Q4_K)
    ours = _affine_q4_k(raw.reshape(-1), 512).dense()
    assert ours.shape == theirs.shape == (5, 512)
    assert np.abs(ours - theirs).max() < 1e-6 * np.abs(theirs).max()


@pytest.mark.parametrize("bits", [4, 8])
def test_block_floats_mean_what_mlx_says(bits: int) -> None:
    values = RNG.standard_normal((2, 6, 128)).astype(np.float32)
    ours = mlx_block_floats(values, bits)
    theirs = mx.dequantize(mx.array(ours.codes), mx.array(ours.scales), mode=f"mxfp{bits}")
    assert np.array_equal(ours.dense(), np.array(theirs.astype(mx.float32)))
    assert np.array_equal(CompactTensor(ours).matrix(1), ours.dense()[1])


@pytest.mark.parametrize("mode", ["affine", "mxfp"])
@pytest.mark.parametrize("stack_experts", [False, True])
def test_mlx_quantised_folder(tmp_path: Path, stack_experts: bool, mode: str) -> None:
    folders = quantised_folder(tmp_path, stack_experts=stack_experts, mode=mode)
    packed, plain = (open_model(str(path)) for path in folders)
    assert packed.family == plain.family and packed.fingerprint != plain.fingerprint
    prompt = RNG.integers(0, 64, 150)

    def logits(info: Any, name: str) -> np.ndarray:
        engine = Engine(info, backend_name=name)
        state = engine.new_state()
        for _ in engine.prefill(state, prompt):
            pass
        engine.step(state, 7)
        return state.logits

    reference = logits(plain, "numpy")
    assert logits(packed, "numpy").tobytes() == reference.tobytes()
    # On MLX the codes are multiplied as they are; rows round now and then to another code.
    assert np.corrcoef(logits(packed, "mlx-cpu"), reference)[0, 1] > 0.999


def test_overrides_go_by_the_names_in_the_file(tmp_path: Path) -> None:
    codes = quantise(RNG.standard_normal((6, 128)).astype(np.float32), 8, 64)
    entries: Stored = {"lm_head.weight": ("U32", codes.codes.shape, codes.codes.tobytes())}
    for part, data in (("scales", codes.scales), ("biases", codes.biases)):
        entries[f"lm_head.{part}"] = ("F32", data.shape, data.tobytes())
    write_safetensors(tmp_path / "m.safetensors", entries)
    source = SafetensorsSource(tmp_path, {"group_size": 32, "bits": 4, "lm_head": {"group_size": 64, "bits": 8}})
    found = source.find("head")
    assert found is not None and np.array_equal(found.dense(), codes.dense())


def test_one_tensor_under_two_names_is_refused(tmp_path: Path) -> None:
    values = np.zeros((2, 2), np.float32)
    write_safetensors(tmp_path / "m.safetensors", stored({"head.weight": values, "lm_head.weight": values}))
    with pytest.raises(ModelError, match=r"head\.weight and lm_head\.weight are the same tensor"):
        SafetensorsSource(tmp_path)


def test_unclear_quantisation_is_refused(tmp_path: Path) -> None:
    packed, _ = quantised_folder(tmp_path, stack_experts=False)
    for change, match in (
        ({"mode": "nvfp4", "group_size": 16, "bits": 4}, "mode 'nvfp4'; supported are affine, mxfp4, mxfp8"),
        ({"mode": "mxfp4", "group_size": 32, "bits": 4}, "groups of 32 and scales of kind U8"),
        ({}, "does not say how"),
        ({"group_size": 64, "bits": 4}, "config.json says 4 bits in groups of 64"),
    ):
        with pytest.raises(ModelError, match=match):
            SafetensorsSource(packed, change).find("layers.1.attn.wkv")
    config = json.loads((packed / "config.json").read_text())
    assert config["quantization"]["bits"] == 4
    floats, _ = quantised_folder(tmp_path / "mxfp", stack_experts=False, mode="mxfp")
    with pytest.raises(ModelError, match=r"tensor layers\.1\.attn\.wkv\.biases is missing"):
        SafetensorsSource(floats, {"group_size": 32, "bits": 4}).find("layers.1.attn.wkv")
