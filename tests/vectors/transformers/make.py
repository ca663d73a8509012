"""Golden vectors from transformers' DeepseekV4ForCausalLM: an implementation that nobody here wrote.

    PYTHONPATH=.:engine:protocol python tests/vectors/transformers/make.py    (torch and transformers installed)

For each configuration below: random weights (tests/engine/checkpoints.py makes the same ones again, so they are not
stored), 302 random tokens in one forward pass, and of that the logits of every position and what the cache holds.
transformers does not round rows, so the engine's rounding is switched off when it is compared. Versions used: see
versions.json. saved.json has what `save_pretrained` (5.24) calls the tensors of one case, and its config.json.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from kvdb_engine.config import from_hf
from tests.engine.checkpoints import CONFIG, weights

HERE = Path(__file__).parent
N_TOKENS = 302
SAVED = "all-kinds"  # the case of which the names and the config that save_pretrained writes are kept: saved.json
YARN = {"factor": 16.0, "original_max_position_embeddings": 65536, "beta_fast": 32, "beta_slow": 1}
# With few index heads exact ties at the top-k border are common (max(0, .) gives zeros), and transformers breaks them
# by array length; from 16 heads on none occurs in these vectors.
CASES: dict[str, dict[str, Any]] = {
    "all-kinds": {"compress_ratios": [0, 4, 128], "sliding_window": 16, "index_topk": 8, "index_n_heads": 16},
    "top-k-larger-than-rows": {"compress_ratios": [4, 4, 0], "sliding_window": 32, "index_topk": 128, "hc_mult": 2},
    "heavy-only": {"compress_ratios": [128, 128], "sliding_window": 64, "hc_mult": 3, "num_hash_layers": 0},
    "window-only": {"compress_ratios": [0, 0, 0], "sliding_window": 128, "num_hash_layers": 3},
    "long-pattern": {"compress_ratios": [0, 0, 4, 128, 4, 128], "index_topk": 16, "index_n_heads": 32},
    "one-group-many-heads": {
        "compress_ratios": [4, 128],
        "num_attention_heads": 8,
        "o_groups": 1,
        "head_dim": 64,
        "qk_rope_head_dim": 64 // 4,
        "index_head_dim": 64,
        "index_n_heads": 16,
        "index_topk": 4,
        "hc_sinkhorn_iters": 3,
    },
    "yarn-that-bites": {
        "compress_ratios": [4, 0, 128],
        "rope_scaling": {**YARN, "factor": 4.0, "original_max_position_embeddings": 64},
        "compress_rope_theta": 10000.0,
        "rope_theta": 500.0,
        "index_n_heads": 16,
    },
    "many-experts": {
        "compress_ratios": [0, 4],
        "n_routed_experts": 16,
        "num_experts_per_tok": 6,
        "moe_intermediate_size": 32,
        "swiglu_limit": 0.5,
        "routed_scaling_factor": 2.5,
        "index_n_heads": 16,
        "sliding_window": 100,
    },
}


def case_config(name: str) -> dict[str, Any]:
    """The config.json of a case."""
    change = CASES[name]
    base = {**CONFIG, "rope_scaling": YARN, "kv_rounding": False, **change}
    return {**base, "num_hidden_layers": len(base["compress_ratios"])}


def case_seed(name: str) -> int:
    return 100 + list(CASES).index(name)


def case_ids(name: str) -> np.ndarray:
    rng = np.random.Generator(np.random.PCG64(case_seed(name)))
    return (rng.random(N_TOKENS) * CONFIG["vocab_size"]).astype(np.uint32)


def transformers_names(tensors: dict[str, np.ndarray], n_experts: int) -> dict[str, np.ndarray]:
    """Official tensor names and shapes -> those of transformers' module."""
    plain = {
        "embed.weight": "model.embed_tokens.weight",
        "head.weight": "lm_head.weight",
        "norm.weight": "model.norm.weight",
        **{f"hc_head_{part}": f"model.hc_head.hc_{part}" for part in ("fn", "base", "scale")},
    }
    rules = (
        ("hc_attn_", "attn_hc."),
        ("hc_ffn_", "ffn_hc."),
        ("attn_norm.", "input_layernorm."),
        ("ffn_norm.", "post_attention_layernorm."),
        ("attn.compressor.", "self_attn.compressor."),
        ("attn.indexer.compressor.", "self_attn.compressor.indexer."),
        ("attn.indexer.wq_b.", "self_attn.compressor.indexer.q_b_proj."),
        ("attn.indexer.weights_proj.", "self_attn.compressor.indexer.scorer.weights_proj."),
        ("attn.wq_a.", "self_attn.q_a_proj."),
        ("attn.q_norm.", "self_attn.q_a_norm."),
        ("attn.wq_b.", "self_attn.q_b_proj."),
        ("attn.wkv.", "self_attn.kv_proj."),
        ("attn.kv_norm.", "self_attn.kv_norm."),
        ("attn.attn_sink", "self_attn.sinks"),
        ("attn.wo_a.", "self_attn.o_a_proj."),
        ("attn.wo_b.", "self_attn.o_b_proj."),
        ("ffn.gate.bias", "mlp.gate.e_score_correction_bias"),
        ("ffn.gate.", "mlp.gate."),
        ("ffn.shared_experts.w1.", "mlp.shared_experts.gate_proj."),
        ("ffn.shared_experts.w3.", "mlp.shared_experts.up_proj."),
        ("ffn.shared_experts.w2.", "mlp.shared_experts.down_proj."),
    )
    inner = (("wkv.", "kv_proj."), ("wgate.", "gate_proj."), ("ape", "position_bias"), ("norm.", "kv_norm."))
    found: dict[str, np.ndarray] = {}
    for name, values in tensors.items():
        if name in plain:
            found[plain[name]] = values
            continue
        _, layer, rest = name.split(".", 2)
        if ".experts." in name:
            continue
        old, new = next(rule for rule in rules if rest.startswith(rule[0]))
        tail = rest[len(old) :]
        if old.endswith("compressor."):
            first, second = next(rule for rule in inner if tail.startswith(rule[0]))
            tail = second + tail[len(first) :]
        found[f"model.layers.{layer}.{new}{tail}"] = values
    for layer in sorted({name.split(".")[1] for name in tensors if name.startswith("layers.")}):
        experts = f"layers.{layer}.ffn.experts"
        gate_up = [
            np.concatenate([tensors[f"{experts}.{e}.{part}.weight"] for part in ("w1", "w3")]) for e in range(n_experts)
        ]
        found[f"model.layers.{layer}.mlp.experts.gate_up_proj"] = np.stack(gate_up)
        down = [tensors[f"{experts}.{e}.w2.weight"] for e in range(n_experts)]
        found[f"model.layers.{layer}.mlp.experts.down_proj"] = np.stack(down)
    return found


def main() -> None:
    """Write one .npz per case."""
    import torch
    import transformers
    from safetensors import safe_open
    from transformers import DeepseekV4Config, DeepseekV4ForCausalLM, DynamicCache

    torch.manual_seed(0)
    for name in CASES:
        tree = case_config(name)
        ours = from_hf(tree)
        fields = {k: v for k, v in tree.items() if k not in ("model_type", "rope_scaling", "kv_rounding")}
        config = DeepseekV4Config(
            **fields,
            hidden_act="silu",
            rope_parameters={"rope_type": "yarn", **tree["rope_scaling"]},
            attn_implementation="eager",
        )
        model = DeepseekV4ForCausalLM(config).to(torch.float32).eval()
        state = transformers_names(weights(case_seed(name), ours), ours.n_experts)
        tensors = {key: torch.from_numpy(np.ascontiguousarray(values)) for key, values in state.items()}
        result = model.load_state_dict(tensors, strict=False)
        missing = [key for key in result.missing_keys if "inv_freq" not in key]
        assert not missing and not result.unexpected_keys, (missing, result.unexpected_keys)
        ids = torch.from_numpy(case_ids(name).astype(np.int64))[None]
        cache = DynamicCache(config=config)
        with torch.no_grad():
            logits = model(ids, past_key_values=cache, use_cache=True).logits[0].numpy()
        found = {"logits": logits}
        for number, (ratio, layer) in enumerate(zip(ours.ratios, cache.layers, strict=True)):
            found[f"window.{number}"] = layer.keys[0, 0].numpy()
            for part in ("compressor", "indexer") if ratio == 4 else ("compressor",) if ratio else ():
                found[f"{part}.{number}"] = layer.compressed_kv[part][0].reshape(
                    -1, layer.compressed_kv[part].shape[-1]
                )
                found[f"{part}.open_kv.{number}"] = layer.buffer_kv[part][0]
                found[f"{part}.open_gate.{number}"] = layer.buffer_gate[part][0]
        if name == SAVED:
            with tempfile.TemporaryDirectory() as scratch:
                model.save_pretrained(scratch)
                (written,) = Path(scratch).glob("*.safetensors")
                with safe_open(written, "np") as file:
                    names = sorted(file.keys())
                saved = {
                    "case": name,
                    "config": json.loads((Path(scratch) / "config.json").read_text()),
                    "names": names,
                }
            (HERE / "saved.json").write_text(json.dumps(saved, indent=1) + "\n")
        np.savez_compressed(HERE / f"{name}.npz", **{k: np.asarray(v, np.float32) for k, v in found.items()})
        print(name, {k: v.shape for k, v in found.items()})
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "numpy": np.__version__}
    (HERE / "versions.json").write_text(json.dumps(versions, indent=1) + "\n")


if __name__ == "__main__":
    main()
