"""The shipped dsv4-nano folder: complete, small enough, and of the shape that the training program states."""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path

import pytest

TRAINING = Path(__file__).parents[2] / "engine" / "training"
MODEL = Path(__file__).parents[2] / "engine" / "kvdb_engine" / "models" / "dsv4_nano"


def _headers() -> dict[str, tuple[str, tuple[int, ...], str]]:
    found = {}
    for path in sorted(MODEL.glob("*.safetensors")):
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
        for name, entry in header.items():
            if name != "__metadata__":
                found[name] = (entry["dtype"], tuple(entry["shape"]), path.name)
    return found


def test_config_is_the_training_geometry(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "path", [str(TRAINING), *sys.path])
    from geometry import Geometry, hf_config

    assert json.loads((MODEL / "config.json").read_text()) == hf_config(Geometry(), bos=0, eos=1)


def test_index_names_every_tensor_and_its_shard():
    index = json.loads((MODEL / "model.safetensors.index.json").read_text())
    assert {name: shard for name, (_, _, shard) in _headers().items()} == index["weight_map"]


def test_size_and_dtypes():
    assert sum(path.stat().st_size for path in MODEL.iterdir() if path.is_file()) < 25_000_000
    for name, (dtype, _, _) in _headers().items():
        if name.endswith("tid2eid"):
            assert dtype == "I32"
        elif "hc_" in name or "norm" in name or name.endswith((".ape", "_sink", ".gate.weight", ".gate.bias")):
            assert dtype == "F32", name
        else:
            assert dtype == "BF16", name


def test_shapes_follow_the_config():
    config = json.loads((MODEL / "config.json").read_text())
    shapes = {name: shape for name, (_, shape, _) in _headers().items()}
    assert shapes["embed.weight"] == shapes["head.weight"] == (config["vocab_size"], config["hidden_size"])
    group = config["num_attention_heads"] * config["head_dim"] // config["o_groups"]
    for layer, ratio in enumerate(config["compress_ratios"]):
        prefix = f"layers.{layer}.attn."
        assert shapes[prefix + "wo_a.weight"] == (config["o_groups"] * config["o_lora_rank"], group)
        assert (prefix + "compressor.ape" in shapes) == (ratio > 0)
        assert (prefix + "indexer.wq_b.weight" in shapes) == (ratio == 4)
        if ratio:
            width = config["head_dim"] * (2 if ratio == 4 else 1)
            assert shapes[prefix + "compressor.ape"] == (ratio, width)
        hashed = layer < config["num_hash_layers"]
        assert (f"layers.{layer}.ffn.gate.tid2eid" in shapes) == hashed
        assert (f"layers.{layer}.ffn.gate.bias" in shapes) == (not hashed)
