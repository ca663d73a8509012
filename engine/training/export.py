"""Write a trained (or random) model as a Hugging Face folder with DeepSeek's tensor names, and read one back.

Matrices are bfloat16. What decides routing and mixing (router, mHC, sinks, position biases, norms) stays float32:
rounding there moves decisions, not only values.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from geometry import Geometry, hf_config
from model import Nano
from safetensors.torch import load_file, save_file
from torch import Tensor

SHARD_BYTES = 13_000_000  # small files are kinder to hosts and tools that dislike large ones


def is_float32(name: str) -> bool:
    """Return whether a tensor of this name ships in float32."""
    plain = name.removesuffix(".weight")
    return plain.endswith(("norm", ".ape", "_sink", ".gate", ".bias")) or "hc_" in name


def tensors(model: Nano) -> dict[str, Tensor]:
    """Return every tensor of the folder under its official name, in its shipping dtype."""
    out: dict[str, Tensor] = {}
    n = model.g.experts
    for name, value in model.state_dict().items():
        value = value.detach().cpu()
        if name.endswith(("ffn.w13", "ffn.w2")):
            base = name.rpartition(".")[0]
            for e in range(n + 1):
                prefix = f"{base}.experts.{e}" if e < n else f"{base}.shared_experts"
                if name.endswith("w2"):
                    out[f"{prefix}.w2.weight"] = value[e]
                else:
                    out[f"{prefix}.w1.weight"], out[f"{prefix}.w3.weight"] = value[e].chunk(2)
        else:
            out[name] = value
    for name, value in out.items():
        if value.is_floating_point():
            out[name] = value.to(torch.float32 if is_float32(name) else torch.bfloat16).contiguous().clone()
    return out


def save(model: Nano, folder: Path, tokenizer: Path) -> int:
    """Write config.json, tokenizer files, shards and their index; return the bytes of all of them."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.safetensors"):
        old.unlink()
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, value in tensors(model).items():
        n_bytes = value.numel() * value.element_size()
        if size + n_bytes > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = value
        size += n_bytes
    where: dict[str, str] = {}
    total = 0
    for i, shard in enumerate(shards):
        file = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        (folder / file).chmod(0o644)
        where |= dict.fromkeys(shard, file)
        total += sum(v.numel() * v.element_size() for v in shard.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")
    (folder / "config.json").write_text(json.dumps(hf_config(model.g, bos=0, eos=1), indent=2) + "\n")
    if tokenizer.resolve() != (folder / "tokenizer.json").resolve():
        shutil.copyfile(tokenizer, folder / "tokenizer.json")
    return sum(f.stat().st_size for f in folder.iterdir() if f.is_file())


def load(folder: Path, geometry: Geometry | None = None) -> Nano:
    """Return a model with the folder's weights, as float32 parameters."""
    flat: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        flat |= load_file(file)
    model = Nano(geometry or Geometry())
    state: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        if name.endswith(("ffn.w13", "ffn.w2")):
            base = name.rpartition(".")[0]
            experts = [*(f"{base}.experts.{e}" for e in range(model.g.experts)), f"{base}.shared_experts"]
            kinds = ("w2",) if name.endswith("w2") else ("w1", "w3")
            value = torch.stack([torch.cat([flat.pop(f"{e}.{k}.weight") for k in kinds]) for e in experts])
        else:
            value = flat.pop(name)
        state[name] = value.float() if value.is_floating_point() else value
    if flat:
        raise ValueError(f"unknown tensors in {folder}: {sorted(flat)[:5]}")
    model.load_state_dict(state)
    return model


def main() -> None:
    """Write a folder with random weights, for tests of everything that reads one."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    torch.manual_seed(0)
    model = Nano(Geometry())
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters")
    print(f"{save(model, args.folder, args.tokenizer) / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
