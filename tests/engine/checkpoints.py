"""Synthetic checkpoints at tiny geometry: one set of random weights written in any layout the loaders know."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np

from kvdb_engine.config import ModelConfig, from_hf

CONFIG: dict[str, Any] = {
    "model_type": "deepseek_v4",
    "vocab_size": 64,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "head_dim": 96,
    "qk_rope_head_dim": 32,
    "q_lora_rank": 64,
    "o_lora_rank": 32,
    "o_groups": 2,
    "sliding_window": 16,
    "compress_ratios": [0, 4, 128, 4],
    "index_n_heads": 8,
    "index_head_dim": 32,
    "index_topk": 8,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "moe_intermediate_size": 64,
    "num_hash_layers": 1,
    "routed_scaling_factor": 1.5,
    "max_position_embeddings": 1024,
}


def weights(seed: int = 0, config: ModelConfig | None = None) -> dict[str, np.ndarray]:
    """Random float32 weights under official names; every value is exact in bf16. The same in every version of numpy."""
    c, rng = config or from_hf(CONFIG), _Uniform(seed)

    def exact(values: np.ndarray) -> np.ndarray:
        return (values.astype(np.float32).view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)

    def matrix(out: int, inner: int) -> np.ndarray:
        return exact(rng.standard_normal((out, inner)) / np.sqrt(inner))

    def vector(n: int) -> np.ndarray:
        return exact(1 + rng.standard_normal(n) * 0.1)

    n = c.hc_streams
    found: dict[str, np.ndarray] = {
        "embed.weight": exact(rng.standard_normal((c.vocab, c.hidden))),
        "head.weight": matrix(c.vocab, c.hidden),
        "norm.weight": vector(c.hidden),
        "hc_head_fn": matrix(n, n * c.hidden),
        "hc_head_base": vector(n),
        "hc_head_scale": vector(1),
    }
    for layer, ratio in enumerate(c.ratios):
        p, a, f = f"layers.{layer}.", f"layers.{layer}.attn.", f"layers.{layer}.ffn."
        for site in ("hc_attn", "hc_ffn"):
            found |= {f"{p}{site}_fn": matrix(2 * n + n * n, n * c.hidden), f"{p}{site}_scale": vector(3)}
            found[f"{p}{site}_base"] = vector(2 * n + n * n)
        found |= {f"{p}attn_norm.weight": vector(c.hidden), f"{p}ffn_norm.weight": vector(c.hidden)}
        found |= {
            f"{a}wq_a.weight": matrix(c.q_rank, c.hidden),
            f"{a}q_norm.weight": vector(c.q_rank),
            f"{a}wq_b.weight": matrix(c.n_heads * c.head_dim, c.q_rank),
            f"{a}wkv.weight": matrix(c.head_dim, c.hidden),
            f"{a}kv_norm.weight": vector(c.head_dim),
            f"{a}attn_sink": vector(c.n_heads),
            f"{a}wo_a.weight": matrix(c.o_groups * c.o_rank, c.n_heads * c.head_dim // c.o_groups),
            f"{a}wo_b.weight": matrix(c.hidden, c.o_groups * c.o_rank),
        }
        compressors = [(f"{a}compressor.", c.head_dim)] if ratio else []
        if ratio == 4:
            compressors.append((f"{a}indexer.compressor.", c.index_dim))
            found[f"{a}indexer.wq_b.weight"] = matrix(c.index_heads * c.index_dim, c.q_rank)
            found[f"{a}indexer.weights_proj.weight"] = matrix(c.index_heads, c.hidden)
        for name, width in compressors:
            columns = width * (2 if ratio == 4 else 1)
            found |= {f"{name}wkv.weight": matrix(columns, c.hidden), f"{name}wgate.weight": matrix(columns, c.hidden)}
            found |= {f"{name}ape": matrix(ratio, columns), f"{name}norm.weight": vector(width)}
        found[f"{f}gate.weight"] = matrix(c.n_experts, c.hidden)
        if layer < c.n_hash_layers:
            table = np.argsort(rng.random((c.vocab, c.n_experts)), axis=1)[:, : c.experts_per_token]
            found[f"{f}gate.tid2eid"] = table.astype(np.int32)
        else:
            found[f"{f}gate.bias"] = exact(rng.standard_normal(c.n_experts) * 0.1)
        for expert in [f"experts.{e}" for e in range(c.n_experts)] + ["shared_experts"]:
            for part in ("w1", "w3"):
                found[f"{f}{expert}.{part}.weight"] = matrix(c.expert_width, c.hidden)
            found[f"{f}{expert}.w2.weight"] = matrix(c.hidden, c.expert_width)
    return found


class _Uniform:
    """Random numbers of mean 0 and variance 1, and in [0, 1), from the plainest stream that numpy has."""

    def __init__(self, seed: int) -> None:
        self._rng = np.random.Generator(np.random.PCG64(seed))

    def random(self, shape: int | tuple[int, ...]) -> np.ndarray:
        return self._rng.random(shape)

    def standard_normal(self, shape: int | tuple[int, ...]) -> np.ndarray:
        return (self._rng.random(shape) - 0.5) * 12**0.5


Stored = dict[str, tuple[str, tuple[int, ...], bytes]]


def stored(tensors: dict[str, np.ndarray], kind: str = "F32") -> Stored:
    """Tensors as safetensors entries: F32, BF16 or F16 for float values, I32 for whole numbers."""
    found: Stored = {}
    for name, values in tensors.items():
        if values.dtype == np.int32:
            found[name] = ("I32", values.shape, values.tobytes())
        elif kind == "BF16":
            found[name] = ("BF16", values.shape, (values.view(np.uint32) >> 16).astype("<u2").tobytes())
        else:
            found[name] = (kind, values.shape, values.astype("<f2" if kind == "F16" else "<f4").tobytes())
    return found


def write_safetensors(path: Path, entries: Stored) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, (kind, shape, data) in entries.items():
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [at, at + len(data)]}
        at += len(data)
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    path.write_bytes(struct.pack("<Q", len(head)) + head + b"".join(data for _, _, data in entries.values()))


def write_folder(folder: Path, entries: Stored, n_shards: int = 1, **changes: Any) -> Path:
    """A model folder: config.json, shards with an index, nano's tokenizer is not needed by the loaders."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**CONFIG, **changes}))
    names = list(entries)
    index = {}
    for shard in range(n_shards):
        mine = names[shard::n_shards]
        name = f"model-{shard + 1:05}-of-{n_shards:05}.safetensors"
        write_safetensors(folder / name, {key: entries[key] for key in mine})
        index |= dict.fromkeys(mine, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return folder
