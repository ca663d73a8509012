"""Tensor names: those that transformers writes, as official DeepSeek names.

transformers' own module tree has names of its own, under which routed experts are stacked, gate and up in one tensor
(weights_safetensors cuts it in two). `save_pretrained` of 5.24 translates most of them back, but not all: the top of
the model keeps its own names, and an attention's `kv_norm` becomes `norm`.
"""

from __future__ import annotations

GATE_UP, DOWN = "ffn.experts.gate_up_proj", "ffn.experts.w2"
_TOP = {
    "embed_tokens": "embed",
    "lm_head": "head",
    "norm": "norm",
    "hc_head.hc_fn": "hc_head_fn",
    "hc_head.hc_base": "hc_head_base",
    "hc_head.hc_scale": "hc_head_scale",
}
# Longest first where one begins like another.
_LAYER = (
    ("self_attn.compressor.indexer.scorer.weights_proj", "attn.indexer.weights_proj"),
    ("self_attn.compressor.indexer.weights_proj", "attn.indexer.weights_proj"),
    ("self_attn.compressor.indexer.q_b_proj", "attn.indexer.wq_b"),
    ("self_attn.compressor.indexer.kv_proj", "attn.indexer.compressor.wkv"),
    ("self_attn.compressor.indexer.gate_proj", "attn.indexer.compressor.wgate"),
    ("self_attn.compressor.indexer.position_bias", "attn.indexer.compressor.ape"),
    ("self_attn.compressor.indexer.kv_norm", "attn.indexer.compressor.norm"),
    ("self_attn.compressor.kv_proj", "attn.compressor.wkv"),
    ("self_attn.compressor.gate_proj", "attn.compressor.wgate"),
    ("self_attn.compressor.position_bias", "attn.compressor.ape"),
    ("self_attn.compressor.kv_norm", "attn.compressor.norm"),
    ("self_attn.q_a_proj", "attn.wq_a"),
    ("self_attn.q_a_norm", "attn.q_norm"),
    ("self_attn.q_b_proj", "attn.wq_b"),
    ("self_attn.kv_proj", "attn.wkv"),
    ("self_attn.kv_norm", "attn.kv_norm"),
    ("self_attn.sinks", "attn.attn_sink"),
    ("self_attn.o_a_proj", "attn.wo_a"),
    ("self_attn.o_b_proj", "attn.wo_b"),
    ("input_layernorm", "attn_norm"),
    ("post_attention_layernorm", "ffn_norm"),
    ("attn.norm", "attn.kv_norm"),
    ("attn_hc.", "hc_attn_"),
    ("ffn_hc.", "hc_ffn_"),
    ("mlp.gate.e_score_correction_bias", "ffn.gate.bias"),
    ("mlp.gate", "ffn.gate"),
    ("mlp.shared_experts.gate_proj", "ffn.shared_experts.w1"),
    ("mlp.shared_experts.up_proj", "ffn.shared_experts.w3"),
    ("mlp.shared_experts.down_proj", "ffn.shared_experts.w2"),
    ("mlp.experts.gate_up_proj", GATE_UP),
    ("mlp.experts.down_proj", DOWN),
)


def official_name(name: str) -> str:
    """The official name of a tensor, without "model." in front; one that is not known stays as it is."""
    plain = name.removeprefix("model.")
    for old, new in _TOP.items():
        if plain == old or plain.startswith(f"{old}."):
            return new + plain[len(old) :]
    head, _, rest = plain.partition(".")
    if head != "layers":
        return plain
    layer, _, part = rest.partition(".")
    for old, new in _LAYER:
        if part.startswith(old):
            return f"layers.{layer}.{new}{part[len(old) :]}"
    return plain
