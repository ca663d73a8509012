"""The shape of dsv4-nano: DeepSeek V4 Flash's architecture with every width made small.

Knows numbers only. ``hf_config`` writes them in the keys that a DeepSeek V4 folder's ``config.json`` uses.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Geometry:
    """Sizes and constants of the model; the defaults are dsv4-nano's."""

    vocab: int = 2560
    hidden: int = 256
    ratios: tuple[int, ...] = (0, 0, 4, 128, 4, 128, 4, 128)
    heads: int = 8
    head_dim: int = 96  # 64 rounded to FP8 (one block) + 32 that carry RoPE
    rope_dim: int = 32
    q_lora: int = 128
    window: int = 128
    o_groups: int = 4
    o_lora: int = 64
    index_heads: int = 16
    index_dim: int = 32
    index_topk: int = 64
    experts: int = 8
    experts_used: int = 2
    expert_width: int = 128
    hash_layers: int = 2
    streams: int = 4
    sinkhorn_rounds: int = 20
    clamp: float = 10.0
    route_scale: float = 1.5
    eps: float = 1e-6
    rope_theta: float = 10000.0
    compress_theta: float = 160000.0
    yarn_factor: float = 16.0
    yarn_original: int = 65536
    yarn_beta_fast: float = 32.0
    yarn_beta_slow: float = 1.0
    max_positions: int = 32768

    @property
    def plain_dim(self) -> int:
        """Dims of a row without RoPE: those that FP8 rounding touches."""
        return self.head_dim - self.rope_dim


def hf_config(g: Geometry, *, bos: int, eos: int) -> dict[str, Any]:
    """Return config.json of the exported folder."""
    return {
        "architectures": ["DeepseekV4ForCausalLM"],
        "model_type": "deepseek_v4",
        "name": "dsv4-nano",
        "vocab_size": g.vocab,
        "hidden_size": g.hidden,
        "num_hidden_layers": len(g.ratios),
        "num_attention_heads": g.heads,
        "num_key_value_heads": 1,
        "head_dim": g.head_dim,
        "qk_rope_head_dim": g.rope_dim,
        "q_lora_rank": g.q_lora,
        "o_lora_rank": g.o_lora,
        "o_groups": g.o_groups,
        "sliding_window": g.window,
        "compress_ratios": list(g.ratios),
        "index_n_heads": g.index_heads,
        "index_head_dim": g.index_dim,
        "index_topk": g.index_topk,
        "n_routed_experts": g.experts,
        "num_experts_per_tok": g.experts_used,
        "n_shared_experts": 1,
        "moe_intermediate_size": g.expert_width,
        "num_hash_layers": g.hash_layers,
        "scoring_func": "sqrtsoftplus",
        "norm_topk_prob": True,
        "routed_scaling_factor": g.route_scale,
        "swiglu_limit": g.clamp,
        "hidden_act": "silu",
        "rms_norm_eps": g.eps,
        "hc_mult": g.streams,
        "hc_sinkhorn_iters": g.sinkhorn_rounds,
        "hc_eps": g.eps,
        "rope_theta": g.rope_theta,
        "compress_rope_theta": g.compress_theta,
        "rope_scaling": {
            "type": "yarn",
            "factor": g.yarn_factor,
            "original_max_position_embeddings": g.yarn_original,
            "beta_fast": g.yarn_beta_fast,
            "beta_slow": g.yarn_beta_slow,
        },
        "max_position_embeddings": g.max_positions,
        "num_nextn_predict_layers": 0,
        "tie_word_embeddings": False,
        "bos_token_id": bos,
        "eos_token_id": eos,
        "torch_dtype": "bfloat16",
    }
