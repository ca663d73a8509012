"""One set of weights in every layout that the loaders know, each with the values it then means.

GGUF's block kinds are filled with random codes instead: what they mean is what the gguf package makes of them.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np

from kvdb_engine import backend
from kvdb_engine.config import from_hf
from kvdb_engine.packing import E2M1, E4M3
from kvdb_engine.weights import AffineCodes, BlockFloats
from kvdb_engine.weights_gguf import gguf_name
from tests.engine.checkpoints import CONFIG, Stored, stored, weights, write_folder

MAKE = Path(__file__).parent.parent / "vectors" / "transformers" / "make.py"
spec = importlib.util.spec_from_file_location("make", MAKE)
assert spec and spec.loader
make = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make)
transformers_names = make.transformers_names


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


def official(tensors: dict[str, np.ndarray]) -> tuple[Stored, dict[str, np.ndarray]]:
    """The official layout: FP8 projections, FP4 routed experts, the rest bf16 or f32; and what it means in f32."""
    entries: Stored = {}
    meaning: dict[str, np.ndarray] = {}
    for name, values in tensors.items():
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


def mlx_quantise(values: np.ndarray, bits: int, group_size: int) -> AffineCodes:
    import mlx.core as mx

    backend.select("mlx-cpu")
    codes, scales, biases = mx.quantize(mx.array(values), group_size=group_size, bits=bits)
    return AffineCodes(np.array(codes), np.array(scales), np.array(biases), group_size, bits)


def mlx_block_floats(values: np.ndarray, bits: int) -> BlockFloats:
    import mlx.core as mx

    backend.select("mlx-cpu")
    codes, scales = mx.quantize(mx.array(values), mode=f"mxfp{bits}")
    return BlockFloats(np.array(codes), np.array(scales), bits)


def quantised_folder(folder: Path, *, stack_experts: bool, mode: str = "affine") -> tuple[Path, Path]:
    """The same values as an MLX-quantised folder (4 bits, head 8) and as float32. mode: affine, or mxfp."""
    entries: Stored = {}
    meaning: dict[str, np.ndarray] = {}
    tensors = weights(5)
    if stack_experts:
        for layer in range(4):
            for part in ("w1", "w2", "w3"):
                names = [f"layers.{layer}.ffn.experts.{e}.{part}.weight" for e in range(4)]
                tensors[f"layers.{layer}.ffn.experts.{part}.weight"] = np.stack([tensors.pop(name) for name in names])
    for name, values in tensors.items():
        base = name.removesuffix(".weight")
        if values.ndim >= 2 and any(part in name for part in (".attn.w", "experts", "head.w", "embed", "indexer.wq")):
            bits = 8 if name.startswith("head") else 4
            codes = mlx_quantise(values, bits, 32) if mode == "affine" else mlx_block_floats(values, bits)
            entries[name] = ("U32", codes.codes.shape, codes.codes.tobytes())
            entries[f"{base}.scales"] = (
                "F32" if mode == "affine" else "U8",
                codes.scales.shape,
                codes.scales.tobytes(),
            )
            if isinstance(codes, AffineCodes):
                entries[f"{base}.biases"] = ("F32", codes.biases.shape, codes.biases.tobytes())
            dense = codes.dense()
        else:
            entries |= stored({name: values})
            dense = values
        if stack_experts and ".ffn.experts." in name:
            layer, part = name.split(".")[1], name.split(".")[4]
            for expert in range(4):
                meaning[f"layers.{layer}.ffn.experts.{expert}.{part}.weight"] = dense[expert]
        else:
            meaning[name] = dense
    modes = ({}, {}) if mode == "affine" else ({"mode": "mxfp4"}, {"mode": "mxfp8"})
    quantization = {"group_size": 32, "bits": 4, **modes[0], "head": {"group_size": 32, "bits": 8, **modes[1]}}
    packed = write_folder(folder / "q", entries, 2, quantization=quantization)
    return packed, write_folder(folder / "f", stored(meaning))


GGUF_CONFIG: dict[str, Any] = {**CONFIG, "hidden_size": 256, "moe_intermediate_size": 256}
# Bytes of a block of 256 values, and where its f16 scales lie; these values make matrices of about unit gain.
_BLOCKS: dict[str, tuple[int, dict[int, float]]] = {
    "IQ2_XXS": (66, {0: 0.0015}),
    "Q2_K": (84, {80: 0.01, 82: 0.015}),
    "Q4_K": (144, {0: 0.0002, 2: 0.0015}),
}
_PARTS = {"w1": "ffn_gate_exps", "w3": "ffn_up_exps", "w2": "ffn_down_exps"}


def gguf_file(path: Path, kinds: dict[str, str], plain: str) -> dict[str, np.ndarray]:
    """Write a GGUF model of GGUF_CONFIG; returns what it means under official names.

    kinds: GGUF type of the routed experts by part (w1, w3, w2). plain: of the other matrices that may be quantised.
    """
    from gguf import GGMLQuantizationType, GGUFWriter
    from gguf.quants import dequantize, quantize

    c, rng = from_hf(GGUF_CONFIG), np.random.default_rng(4)
    writer = GGUFWriter(path, "deepseek4")
    _metadata(writer, GGUF_CONFIG)
    meaning: dict[str, np.ndarray] = {}
    for name, values in weights(4, c).items():
        base = name.removesuffix(".weight")
        if ".ffn.experts." in name:
            continue
        if values.dtype == np.int32:
            writer.add_tensor(gguf_name(base), values)
            meaning[name] = values
            continue
        quantised = values.ndim == 2 and (".attn.w" in name or "shared_experts" in name or base == "head")
        kind = GGMLQuantizationType[plain if quantised else "F16" if values.ndim == 2 else "F32"]
        raw = quantize(values, kind)
        if kind.name in ("F16", "F32"):
            writer.add_tensor(gguf_name(base), raw)
        else:
            writer.add_tensor(gguf_name(base), raw, raw_dtype=kind)
        meaning[name] = dequantize(raw, kind).astype(np.float32)
    for layer in range(c.n_layers):
        for part, file_name in _PARTS.items():
            kind = GGMLQuantizationType[kinds[part]]
            if kind.name in _BLOCKS:
                raw = _random_blocks(rng, kind.name, c.n_experts * 256).reshape(c.n_experts, 256, -1)
            else:
                raw = quantize((rng.standard_normal((c.n_experts, 256, 256)) / 16).astype(np.float32), kind)
            whole = f"blk.{layer}.{file_name}.weight"
            writer.add_tensor(whole, raw, **({} if kind.name == "F16" else {"raw_dtype": kind}))
            for expert, values in enumerate(dequantize(raw, kind).reshape(c.n_experts, 256, 256)):
                meaning[f"layers.{layer}.ffn.experts.{expert}.{part}.weight"] = values.astype(np.float32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return meaning


def _random_blocks(rng: np.random.Generator, kind: str, count: int) -> np.ndarray:
    size, scales = _BLOCKS[kind]
    raw = rng.integers(0, 256, (count, size), dtype=np.uint8)
    for at, scale in scales.items():
        raw[:, at : at + 2] = np.frombuffer(np.float16(scale).tobytes(), np.uint8)
    return raw


def _metadata(writer: Any, tree: dict[str, Any]) -> None:
    c, p = from_hf(tree), "deepseek4."
    for key, number in {
        "block_count": c.n_layers,
        "embedding_length": c.hidden,
        "vocab_size": c.vocab,
        "attention.head_count": c.n_heads,
        "attention.head_count_kv": 1,
        "attention.key_length": c.head_dim,
        "attention.value_length": c.head_dim,
        "rope.dimension_count": c.rope_dim,
        "attention.q_lora_rank": c.q_rank,
        "attention.output_lora_rank": c.o_rank,
        "attention.output_group_count": c.o_groups,
        "expert_count": c.n_experts,
        "expert_used_count": c.experts_per_token,
        "expert_feed_forward_length": c.expert_width,
        "expert_shared_count": c.n_shared_experts,
        "hash_layer_count": c.n_hash_layers,
        "attention.sliding_window": c.window,
        "attention.indexer.head_count": c.index_heads,
        "attention.indexer.key_length": c.index_dim,
        "attention.indexer.top_k": c.index_topk,
        "hyper_connection.count": c.hc_streams,
        "hyper_connection.sinkhorn_iterations": c.hc_iterations,
        "rope.scaling.original_context_length": c.yarn_original,
        "context_length": c.context,
    }.items():
        writer.add_uint32(p + key, number)
    for key, value in {
        "rope.freq_base": c.rope_theta,
        "rope.scaling.factor": c.yarn_factor,
        "rope.scaling.yarn_beta_fast": c.yarn_beta_fast,
        "rope.scaling.yarn_beta_slow": c.yarn_beta_slow,
        "attention.compress_rope_freq_base": c.compress_rope_theta,
        "expert_weights_scale": c.route_scale,
        "attention.layer_norm_rms_epsilon": c.norm_eps,
        "hyper_connection.epsilon": c.hc_eps,
    }.items():
        writer.add_float32(p + key, value)
    writer.add_array(p + "attention.compress_ratios", list(c.ratios))
    writer.add_array(p + "swiglu_clamp_exp", [c.swiglu_limit] * c.n_layers)
