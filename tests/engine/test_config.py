"""Geometry from both kinds of metadata, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kvdb_engine.catalog import ModelInfo
from kvdb_engine.config import from_gguf, from_hf
from kvdb_engine.engine import Engine
from kvdb_engine.errors import ModelError
from kvdb_engine.weights_gguf import GgufSource
from kvdb_protocol.layout import Codec

FLASH: dict[str, Any] = {
    "model_type": "deepseek_v4",
    "vocab_size": 129280,
    "hidden_size": 4096,
    "num_hidden_layers": 43,
    "num_attention_heads": 64,
    "head_dim": 512,
    "qk_rope_head_dim": 64,
    "q_lora_rank": 1024,
    "o_lora_rank": 1024,
    "o_groups": 8,
    "sliding_window": 128,
    "compress_ratios": [0, 0, *([4, 128] * 20), 4, 0],
    "index_n_heads": 64,
    "index_head_dim": 128,
    "index_topk": 512,
    "n_routed_experts": 256,
    "num_experts_per_tok": 6,
    "n_shared_experts": 1,
    "moe_intermediate_size": 2048,
    "num_hash_layers": 3,
    "routed_scaling_factor": 1.5,
    "rope_scaling": {"factor": 16, "original_max_position_embeddings": 65536, "beta_fast": 32, "beta_slow": 1},
    "max_position_embeddings": 1048576,
}


def test_flash() -> None:
    config = from_hf(FLASH)
    assert config.ratios.count(4) == 21 and config.ratios.count(128) == 20 and len(config.ratios) == 43
    assert config.yarn_pairs() == (15, 25)
    layout = config.layout()
    assert (layout.kv_codec, layout.index_codec) == (Codec.FP8_F16, Codec.FP4)
    assert config.without_rounding().layout().kv_codec is Codec.F32


def test_nano_and_its_config_agree(nano_info: ModelInfo) -> None:
    tree = json.loads((nano_info.path / "config.json").read_text(encoding="utf-8"))
    assert from_hf(tree) == nano_info.config
    assert nano_info.layout == nano_info.config.layout()


def test_gguf(tiny: Engine) -> None:
    config = tiny.info.config
    assert (config.hidden, config.n_heads, config.head_dim, config.window) == (256, 8, 192, 32)
    assert config.ratios == (0, 0, 4, 128, 4, 128) and config.n_hash_layers == 3 and config.index_topk == 8


@pytest.mark.parametrize("key", sorted(set(FLASH) - {"rope_scaling", "n_shared_experts", "routed_scaling_factor"}))
def test_missing_fields_are_named(key: str) -> None:
    if key in ("num_hash_layers", "index_n_heads"):
        return  # optional for models without such layers
    with pytest.raises(ModelError, match="index head dim|index top-k" if key.startswith("index_") else key):
        from_hf({k: v for k, v in FLASH.items() if k != key}, "x.json")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"model_type": "llama"}, "model_type is 'llama'"),
        ({"compress_ratios": [0, 4]}, "2 compression ratios for 43 layers"),
        ({"compress_ratios": [8] * 43}, "known are 0, 4, 128"),
        ({"qk_rope_head_dim": 512}, "rope dim 512"),
        ({"o_groups": 7}, "64 heads in 7"),
        ({"num_experts_per_tok": 300}, "300 of 256 experts"),
        ({"sliding_window": 0}, "must be positive"),
        ({"index_head_dim": 96}, "power of two"),
        ({"index_topk": 0}, "top-k 0"),
        ({"hidden_size": "many"}, "invalid literal"),
    ],
)
def test_unusable_geometry_is_refused(change: dict[str, Any], match: str) -> None:
    with pytest.raises(ModelError, match=match):
        from_hf({**FLASH, **change})


def test_gguf_refusals(tiny: Engine, vectors: Any, tmp_path: Path) -> None:
    import gzip

    path = tmp_path / "tiny.gguf"
    path.write_bytes(gzip.decompress((vectors.folder / "tiny.gguf.gz").read_bytes()))
    meta = dict(GgufSource(path).metadata)
    assert from_gguf(meta) == tiny.info.config
    with pytest.raises(ModelError, match="architecture is 'llama'"):
        from_gguf({**meta, "general.architecture": "llama"})
    with pytest.raises(ModelError, match="different SwiGLU"):
        from_gguf({**meta, "deepseek4.swiglu_clamp_exp": [10.0, 9.0]})
    del meta["deepseek4.block_count"]
    with pytest.raises(ModelError, match=r"deepseek4\.block_count is missing"):
        from_gguf(meta)
    path.write_bytes(b"GGUF junk")
    with pytest.raises(ModelError, match="not a readable GGUF"):
        GgufSource(path)
