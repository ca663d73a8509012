"""ModelConfig: the whole geometry of one DSV4 model, and nothing else.

Two sources exist: a Hugging Face `config.json` and the metadata of a GGUF file. Both give equal values for equal
models: real numbers are rounded to float32, as GGUF stores them, so that fingerprints do not depend on the source.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from kvdb_engine.errors import ModelError
from kvdb_protocol.layout import Layout, make_layout

HF_MODEL_TYPES = ("deepseek_v4",)
GGUF_ARCHITECTURE = "deepseek4"
RATIOS = (0, 4, 128)


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Geometry of one model. Words as in docs/format.md and docs/engine.md.

    ratios: one per layer: 0 (window only), 4 (overlapping groups with indexer) or 128.
    head_dim: width of a KV row, of which the last rope_dim values carry RoPE. index_*: the indexer of ratio-4 layers.
    kv_rounding: rows are rounded to FP8/FP4 and f16 as ds4 does; off only to compare with references that do not.
    """

    vocab: int
    hidden: int
    n_layers: int
    n_heads: int
    head_dim: int
    rope_dim: int
    q_rank: int
    o_rank: int
    o_groups: int
    window: int
    ratios: tuple[int, ...]
    index_heads: int
    index_dim: int
    index_topk: int
    n_experts: int
    experts_per_token: int
    n_shared_experts: int
    expert_width: int
    n_hash_layers: int
    route_scale: float
    swiglu_limit: float
    norm_eps: float
    hc_streams: int
    hc_iterations: int
    hc_eps: float
    rope_theta: float
    compress_rope_theta: float
    yarn_factor: float
    yarn_original: int
    yarn_beta_fast: float
    yarn_beta_slow: float
    context: int
    bos_id: int
    eos_id: int
    kv_rounding: bool = True

    def __post_init__(self) -> None:
        """Refuse geometry that the engine's formulas cannot express; the message names the field."""
        checks = (
            (len(self.ratios) == self.n_layers, f"{len(self.ratios)} compression ratios for {self.n_layers} layers"),
            (
                all(r in RATIOS for r in self.ratios),
                f"compression ratios {sorted(set(self.ratios))}, known are 0, 4, 128",
            ),
            (self.rope_dim % 2 == 0 and 0 < self.rope_dim < self.head_dim, f"rope dim {self.rope_dim}"),
            (self.n_heads % max(self.o_groups, 1) == 0, f"{self.n_heads} heads in {self.o_groups} output groups"),
            (0 < self.experts_per_token <= self.n_experts, f"{self.experts_per_token} of {self.n_experts} experts"),
            (
                self.window > 0 and self.context > 0 and self.vocab > 0,
                "window, context and vocabulary must be positive",
            ),
            (
                4 not in self.ratios
                or (self.index_dim & (self.index_dim - 1) == 0 and self.index_dim >= self.rope_dim),
                f"index head dim {self.index_dim} must be a power of two not below the rope dim {self.rope_dim}",
            ),
            (4 not in self.ratios or self.index_topk > 0, f"index top-k {self.index_topk}"),
        )
        for fine, message in checks:
            if not fine:
                raise ModelError(f"model geometry is not usable: {message}")

    def layout(self) -> Layout:
        """What this model's states look like to the store."""
        return make_layout(
            vocab=self.vocab,
            context=self.context,
            window=self.window,
            head_dim=self.head_dim,
            rope_dim=self.rope_dim,
            index_dim=self.index_dim if 4 in self.ratios else 0,
            ratios=self.ratios,
            rounded=self.kv_rounding,
        )

    def without_rounding(self) -> ModelConfig:
        """The same model with unrounded rows, for comparison with references that do not round."""
        return replace(self, kv_rounding=False)

    def yarn_pairs(self) -> tuple[int, int]:
        """(low, high): RoPE pairs below low keep their frequency, above high it is divided by the YaRN factor."""
        return _yarn_range(
            self.rope_dim, self.compress_rope_theta, self.yarn_original, self.yarn_beta_fast, self.yarn_beta_slow
        )


def _yarn_range(dim: int, base: float, original: int, fast: float, slow: float) -> tuple[int, int]:
    def pair(rotations: float) -> float:
        return dim * math.log(original / (2 * math.pi * rotations)) / (2 * math.log(base))

    return max(math.floor(pair(fast)), 0), min(math.ceil(pair(slow)), dim - 1)


def _f32(value: float) -> float:
    rounded: float = struct.unpack("<f", struct.pack("<f", value))[0]
    return rounded


def from_hf(config: Mapping[str, Any], where: str = "config.json") -> ModelConfig:
    """Read a Hugging Face config of a DeepSeek-V4 model, with the official keys or those that transformers writes.

    config: the parsed JSON. where: the file's name for messages. Raises ModelError naming the field.
    """
    kind = config.get("model_type")
    if kind not in HF_MODEL_TYPES:
        raise ModelError(f"{where}: model_type is {kind!r}; this engine runs {', '.join(HF_MODEL_TYPES)} only")
    config = _official_keys(config, where)
    rope = dict(config.get("rope_scaling") or {})

    def need(key: str) -> Any:
        if config.get(key) is None:
            raise ModelError(f"{where}: {key} is missing")
        return config[key]

    try:
        n_layers = int(need("num_hidden_layers"))
        return ModelConfig(
            vocab=int(need("vocab_size")),
            hidden=int(need("hidden_size")),
            n_layers=n_layers,
            n_heads=int(need("num_attention_heads")),
            head_dim=int(need("head_dim")),
            rope_dim=int(need("qk_rope_head_dim")),
            q_rank=int(need("q_lora_rank")),
            o_rank=int(need("o_lora_rank")),
            o_groups=int(need("o_groups")),
            window=int(need("sliding_window")),
            # The official list may go on for the draft (MTP) layers.
            ratios=tuple(int(r) for r in need("compress_ratios"))[:n_layers],
            index_heads=int(config.get("index_n_heads") or 0),
            index_dim=int(config.get("index_head_dim") or 0),
            index_topk=int(config.get("index_topk") or 0),
            n_experts=int(need("n_routed_experts")),
            experts_per_token=int(need("num_experts_per_tok")),
            n_shared_experts=int(config.get("n_shared_experts", 1)),
            expert_width=int(need("moe_intermediate_size")),
            n_hash_layers=int(config.get("num_hash_layers", 0)),
            route_scale=_f32(config.get("routed_scaling_factor", 1.0)),
            swiglu_limit=_f32(config.get("swiglu_limit", 10.0)),
            norm_eps=_f32(config.get("rms_norm_eps", 1e-6)),
            hc_streams=int(config.get("hc_mult", 4)),
            hc_iterations=int(config.get("hc_sinkhorn_iters", 20)),
            hc_eps=_f32(config.get("hc_eps", 1e-6)),
            rope_theta=_f32(config.get("rope_theta", 10000.0)),
            compress_rope_theta=_f32(config.get("compress_rope_theta", 160000.0)),
            yarn_factor=_f32(rope.get("factor", 1.0)),
            yarn_original=int(rope.get("original_max_position_embeddings", 65536)),
            yarn_beta_fast=_f32(rope.get("beta_fast", 32)),
            yarn_beta_slow=_f32(rope.get("beta_slow", 1)),
            context=int(need("max_position_embeddings")),
            bos_id=int(config.get("bos_token_id", 0)),
            eos_id=int(config.get("eos_token_id", 1)),
            kv_rounding=bool(config.get("kv_rounding", True)),
        )
    except (TypeError, ValueError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(f"{where}: {error}") from error


_LAYER_TYPES = {
    "sliding_attention": 0,
    "compressed_sparse_attention": 4,
    "heavily_compressed_attention": 128,
}


def _official_keys(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The same config with the official keys in place of those that transformers' save_pretrained writes.

    transformers names layer types instead of ratios and hash layers, and keeps the two RoPEs under rope_parameters.
    """
    tree = dict(config)
    if "compress_ratios" not in tree and isinstance(tree.get("layer_types"), list):
        ratios = {**_LAYER_TYPES, **(tree.get("compress_rates") or {})}
        unknown = sorted({str(kind) for kind in tree["layer_types"] if kind not in ratios})
        if unknown:
            raise ModelError(f"{where}: unknown layer types {', '.join(unknown)}")
        tree["compress_ratios"] = [ratios[kind] for kind in tree["layer_types"]]
    if "num_hash_layers" not in tree and isinstance(tree.get("mlp_layer_types"), list):
        kinds = tree["mlp_layer_types"]
        tree["num_hash_layers"] = kinds.count("hash_moe")
        if "hash_moe" in kinds[tree["num_hash_layers"] :]:
            raise ModelError(f"{where}: hash layers that are not the first ones are not supported")
    if "qk_rope_head_dim" not in tree and tree.get("partial_rotary_factor") and tree.get("head_dim"):
        tree["qk_rope_head_dim"] = int(tree["head_dim"] * tree["partial_rotary_factor"])
    rope = tree.get("rope_parameters")
    if (
        isinstance(rope, Mapping)
        and isinstance(rope.get("main"), Mapping)
        and isinstance(rope.get("compress"), Mapping)
    ):
        tree["rope_theta"] = rope["main"].get("rope_theta", tree.get("rope_theta", 10000.0))
        tree["compress_rope_theta"] = rope["compress"].get("rope_theta", tree.get("compress_rope_theta", 160000.0))
        tree.setdefault("rope_scaling", rope["compress"])
    if isinstance(tree.get("eos_token_id"), list):
        tree["eos_token_id"] = tree["eos_token_id"][0]
    return tree


def from_gguf(meta: Mapping[str, Any], where: str = "the GGUF file") -> ModelConfig:
    """Read the metadata of ds4's GGUF layout (docs/engine.md lists the keys).

    meta: every key with its value as Python numbers, strings or lists. Raises ModelError naming the key.
    """
    kind = meta.get("general.architecture")
    if kind != GGUF_ARCHITECTURE:
        raise ModelError(f"{where}: architecture is {kind!r}; this engine runs {GGUF_ARCHITECTURE!r} only")

    def need(key: str) -> Any:
        full = f"{GGUF_ARCHITECTURE}.{key}"
        if full not in meta:
            raise ModelError(f"{where}: metadata {full} is missing")
        return meta[full]

    clamps = need("swiglu_clamp_exp")
    if len(set(clamps)) != 1:
        raise ModelError(f"{where}: layers with different SwiGLU limits are not supported, got {sorted(set(clamps))}")
    n_layers = int(need("block_count"))
    tokens = meta.get("tokenizer.ggml.tokens", ())
    return ModelConfig(
        vocab=int(need("vocab_size")),
        hidden=int(need("embedding_length")),
        n_layers=n_layers,
        n_heads=int(need("attention.head_count")),
        head_dim=int(need("attention.key_length")),
        rope_dim=int(need("rope.dimension_count")),
        q_rank=int(need("attention.q_lora_rank")),
        o_rank=int(need("attention.output_lora_rank")),
        o_groups=int(need("attention.output_group_count")),
        window=int(need("attention.sliding_window")),
        ratios=tuple(int(r) for r in need("attention.compress_ratios"))[:n_layers],
        index_heads=int(need("attention.indexer.head_count")),
        index_dim=int(need("attention.indexer.key_length")),
        index_topk=int(need("attention.indexer.top_k")),
        n_experts=int(need("expert_count")),
        experts_per_token=int(need("expert_used_count")),
        n_shared_experts=int(need("expert_shared_count")),
        expert_width=int(need("expert_feed_forward_length")),
        n_hash_layers=int(need("hash_layer_count")),
        route_scale=_f32(need("expert_weights_scale")),
        swiglu_limit=_f32(clamps[0]),
        norm_eps=_f32(need("attention.layer_norm_rms_epsilon")),
        hc_streams=int(need("hyper_connection.count")),
        hc_iterations=int(need("hyper_connection.sinkhorn_iterations")),
        hc_eps=_f32(need("hyper_connection.epsilon")),
        rope_theta=_f32(need("rope.freq_base")),
        compress_rope_theta=_f32(need("attention.compress_rope_freq_base")),
        yarn_factor=_f32(need("rope.scaling.factor")),
        yarn_original=int(need("rope.scaling.original_context_length")),
        yarn_beta_fast=_f32(need("rope.scaling.yarn_beta_fast")),
        yarn_beta_slow=_f32(need("rope.scaling.yarn_beta_slow")),
        context=int(meta.get(f"{GGUF_ARCHITECTURE}.context_length", 1 << 20)),
        bos_id=int(meta.get("tokenizer.ggml.bos_token_id", _id_of(tokens, "<｜begin▁of▁sentence｜>", 0))),
        eos_id=int(meta.get("tokenizer.ggml.eos_token_id", _id_of(tokens, "<｜end▁of▁sentence｜>", 1))),
    )


def _id_of(tokens: Any, text: str, default: int) -> int:
    return tokens.index(text) if text in tokens else default
