"""Blocks expanded in MLX have the values that the gguf package gives."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest

from kvdb_engine import backend
from kvdb_engine.fidelity import Vectors
from kvdb_engine.ops import ExpertWeights
from kvdb_engine.ops_numpy import NumpyOps
from kvdb_engine.weights_gguf import GgufSource

mx = pytest.importorskip("mlx.core")
gguf = pytest.importorskip("gguf")

from gguf.quants import dequantize  # noqa: E402

from kvdb_engine.gguf_blocks import BLOCK_BYTES, expand, experts, packed_blocks  # noqa: E402

RNG = np.random.default_rng(9)


@pytest.mark.parametrize("kind", ["IQ2_XXS", "Q2_K"])
def test_every_byte_pattern(kind: str) -> None:
    backend.select("mlx-cpu")
    size = BLOCK_BYTES[kind]
    raw = RNG.integers(0, 256, (3, 50, 4 * size), dtype=np.uint8)
    halves = [0] if kind == "IQ2_XXS" else [80, 82]
    for block in range(4):
        for at in halves:
            scale = RNG.uniform(-2, 2, (3, 50, 1)).astype(np.float16).view(np.uint8)
            raw[..., block * size + at : block * size + at + 2] = scale
    theirs = dequantize(raw.reshape(150, -1), gguf.GGMLQuantizationType[kind]).reshape(3, 50, -1)
    ours = np.array(expand(kind, mx.array(raw)))
    assert ours.shape == theirs.shape == (3, 50, 1024)
    assert np.abs(ours - theirs).max() <= 1e-6 * np.abs(theirs).max()


@pytest.mark.parametrize("n_tokens", [1, 2, 40])
def test_experts_of_a_real_file(n_tokens: int, vectors: Vectors, tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    path.write_bytes(gzip.decompress((vectors.folder / "tiny.gguf.gz").read_bytes()))
    source = GgufSource(path)
    tensors = [source.find_experts(2, part) for part in ("w1", "w3", "w2")]
    packed = [packed_blocks(tensor) for tensor in tensors]
    assert [blocks.kind for blocks in packed if blocks] == ["IQ2_XXS", "IQ2_XXS", "Q2_K"]
    ops, plain = backend.select("mlx-cpu"), NumpyOps()
    x = RNG.standard_normal((n_tokens, 256)).astype(np.float32)
    ids = np.argsort(RNG.random((n_tokens, 8)), axis=1)[:, :2].astype(np.int32)
    share = RNG.random((n_tokens, 2)).astype(np.float32)
    wanted = plain.experts(plain.expert_weights(*tensors), x, ids, share, 10.0)
    found = experts(
        ExpertWeights(*packed), mx.array(x), mx.array(ids), mx.array(share), lambda g, u: ops.swiglu(g, u, 10.0)
    )
    assert np.abs(np.array(found) - wanted).max() < 1e-4 * np.abs(wanted).max()
    assert packed_blocks(source.find("head")) is None
