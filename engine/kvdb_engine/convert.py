"""Convert a model to kvdb's asymmetric recipe (recipe.py): few bits where most weights are, many where mistakes spread.

Tensor by tensor: one expert's matrix is the largest thing in memory. With calibration text (calibrate.py) the routed
experts are fitted to what the text gives them; all other weights are then in memory. The result is a folder of one
shard a layer, with routed experts stacked, that any tool reads which knows MLX's quantised safetensors.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from kvdb_engine.calibrate import calibrate
from kvdb_engine.catalog import open_model
from kvdb_engine.config import ModelConfig
from kvdb_engine.errors import ModelError
from kvdb_engine.packing import F32
from kvdb_engine.quantise import quantise
from kvdb_engine.recipe import (
    ITEM_BYTES,
    PARTS,
    ClassReport,
    Recipe,
    expert_name,
    expert_shape,
    expert_way,
    stored_bytes,
    tensor_class,
    tensor_shapes,
    way_of,
)
from kvdb_engine.weights import AffineCodes, Tensor, TensorSource, need, need_experts

# Experts whose codes calibration has found, stacked, by (layer, part).
Known: TypeAlias = dict[tuple[int, str], AffineCodes]


@dataclass(frozen=True, slots=True)
class _Output:
    """A tensor of the result. values: yields one matrix after the other: its values, or its codes if they are known."""

    name: str
    shape: tuple[int, ...]
    kind: str
    way: tuple[int, int] | None
    values: Callable[[], Iterator[F32 | AffineCodes]]


def convert(
    spec: str,
    target: Path,
    recipe: Recipe | None = None,
    progress: Callable[[int, int, str], None] = lambda done, of, name: None,
    calibration: str = "",
    calibrating: Callable[[int, int], None] = lambda done, of: None,
) -> list[ClassReport]:
    """Write model `spec` to the new folder `target`. progress(bytes done, bytes in all, tensor) after each tensor.

    calibration: text that routed experts are fitted to; calibrating(experts done, experts) after each of them.
    Raises ModelError: what is wrong with the source, or that the target exists. A failed run leaves no target.
    """
    info = open_model(spec)
    if target.exists():
        raise ModelError(f"{target}: exists already; name a new folder")
    building = target.with_name(target.name + ".part")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    try:
        recipe = recipe or Recipe()
        with tempfile.TemporaryDirectory(dir=building) as scratch:
            known: Known = {}
            if calibration:
                known = calibrate(
                    info.config,
                    info.open_weights(),
                    [info.config.bos_id, *info.tokenizer.encode(calibration)],
                    lambda layer, part: expert_way(info.config, recipe, layer, part),
                    Path(scratch),
                    calibrating,
                )
            reports = _write(info.config, info.open_weights(), building, recipe, known, progress)
        _write_config(info.path, info.is_gguf, info.config, building, reports[1])
        if not info.is_gguf:
            shutil.copyfile(info.path / "tokenizer.json", building / "tokenizer.json")
        else:
            info.tokenizer.save(building / "tokenizer.json")
        building.rename(target)
    except FileNotFoundError as error:
        raise ModelError(f"{error.filename}: missing; a model folder needs its tokenizer.json") from error
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return reports[0]


def _plan(config: ModelConfig, source: TensorSource, recipe: Recipe, known: Known) -> list[list[_Output]]:
    """The tensors of the result, shard by shard; checks that the source has them all before anything is written."""
    shards: dict[str, list[_Output]] = defaultdict(list)

    def one(tensor: Tensor) -> Callable[[], Iterator[F32]]:
        return lambda: iter([tensor.dense()])

    for name, shape in tensor_shapes(config).items():
        if name.endswith("gate.bias") and source.find(name) is None:
            continue
        tensor = need(source, name, shape)
        way = way_of(recipe, name, shape[-1], config.n_layers) if len(shape) == 2 else None
        kind = "U32" if way else "I32" if name.endswith("tid2eid") else _kind(tensor.dense())
        shards[name.split(".")[1] if name.startswith("layers.") else ""].append(
            _Output(name, shape, kind, way, one(tensor))
        )
    for layer in range(config.n_layers):
        for part in PARTS:
            name, shape = expert_name(layer, part), expert_shape(config, part)
            way = expert_way(config, recipe, layer, part)
            stacked = need_experts(source, layer, part, shape)
            values = _codes(known[layer, part]) if (layer, part) in known else _experts(stacked)
            shards[str(layer)].append(_Output(name, shape, "U32" if way else "F32", way, values))
    return list(shards.values())


def _experts(stacked: Tensor) -> Callable[[], Iterator[F32]]:
    """The experts' matrices one by one, so that a layer's experts are never in memory together."""
    return lambda: (stacked.matrix(expert) for expert in range(stacked.shape[0]))


def _codes(stacked: AffineCodes) -> Callable[[], Iterator[AffineCodes]]:
    """The same of experts whose codes are known."""
    s = stacked
    return lambda: (
        AffineCodes(s.codes[expert], s.scales[expert], s.biases[expert], s.group_size, s.bits)
        for expert in range(len(s.codes))
    )


def _kind(values: F32) -> str:
    """BF16 if that loses nothing, else F32."""
    return "F32" if (values.view(np.uint32) & 0xFFFF).any() else "BF16"


def _write(
    config: ModelConfig,
    source: TensorSource,
    folder: Path,
    recipe: Recipe,
    known: Known,
    progress: Callable[[int, int, str], None],
) -> tuple[list[ClassReport], dict[str, Any]]:
    shards = _plan(config, source, recipe, known)
    total = sum(_bytes(entry) for shard in shards for entry in shard)
    done = 0
    index: dict[str, str] = {}
    overrides: dict[str, Any] = {}
    counts: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for number, shard in enumerate(shards):
        file = f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
        with (folder / file).open("wb") as out:
            entries = [piece for entry in shard for piece in _entries(entry)]
            out.write(_header(entries))
            start = out.tell()
            places = dict(zip((name for name, _, _, _ in entries), _offsets(entries), strict=True))
            for entry in shard:
                _write_tensor(out, start, places, entry)
                if entry.way and entry.way != recipe.rest:
                    overrides[entry.name] = {"bits": entry.way[0], "group_size": entry.way[1]}
                count = counts[tensor_class(entry.name)]
                count[0] += int(np.prod(entry.shape, dtype=np.int64))
                count[1] += _bytes(entry)
                done += _bytes(entry)
                source.release()
                progress(done, total, entry.name)
            out.flush()
            os.fsync(out.fileno())
        index |= {name: file for name, _, _, _ in entries}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}, indent=1))
    bits, group_size = recipe.rest
    quantization = {"bits": bits, "group_size": group_size, "mode": "affine", **overrides}
    return [ClassReport(name, *count) for name, count in sorted(counts.items())], quantization


def _entries(entry: _Output) -> list[tuple[str, str, tuple[int, ...], int]]:
    """(name in the file, kind, shape, bytes) of a tensor's parts."""
    if entry.way is None:
        suffix = ".weight" if len(entry.shape) >= 2 and "hc_" not in entry.name and "ape" not in entry.name else ""
        suffix = ".weight" if entry.name.endswith("norm") else "" if entry.name.endswith("tid2eid") else suffix
        parts = [(entry.name + suffix, entry.kind, entry.shape)]
    else:
        bits, group_size = entry.way
        *leading, inner = entry.shape
        groups = (*leading, inner // group_size)
        parts = [(f"{entry.name}.weight", "U32", (*leading, inner * bits // 32))]
        parts += [(f"{entry.name}.scales", "F16", groups), (f"{entry.name}.biases", "F16", groups)]
    return [
        (name, kind, tuple(shape), ITEM_BYTES[kind] * int(np.prod(shape, dtype=np.int64)))
        for name, kind, shape in parts
    ]


def _bytes(entry: _Output) -> int:
    return stored_bytes(entry.shape, entry.kind, entry.way)


def _offsets(entries: Sequence[tuple[str, str, tuple[int, ...], int]]) -> list[int]:
    at, found = 0, []
    for _, _, _, size in entries:
        found.append(at)
        at += size
    return found


def _header(entries: Sequence[tuple[str, str, tuple[int, ...], int]]) -> bytes:
    tree: dict[str, Any] = {"__metadata__": {"format": "mlx"}}
    for (name, kind, shape, size), at in zip(entries, _offsets(entries), strict=True):
        tree[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [at, at + size]}
    data = json.dumps(tree).encode()
    data += b" " * (-len(data) % 8)
    return struct.pack("<Q", len(data)) + data


def _write_tensor(out: Any, start: int, places: dict[str, int], entry: _Output) -> None:
    """Write a tensor's parts at their places, matrix by matrix."""
    names = [name for name, _, _, _ in _entries(entry)]
    at = [start + places[name] for name in names]
    for values in entry.values():
        if isinstance(values, AffineCodes):
            pieces = _code_pieces(values)
        elif entry.way is not None:
            pieces = _code_pieces(quantise(values, *entry.way))
        else:
            if entry.kind == "BF16":
                pieces = [(values.view(np.uint32) >> 16).astype("<u2").tobytes()]
            else:
                pieces = [values.astype("<i4" if entry.kind == "I32" else "<f4").tobytes()]
        for number, piece in enumerate(pieces):
            out.seek(at[number])
            out.write(piece)
            at[number] += len(piece)


def _code_pieces(codes: AffineCodes) -> list[bytes]:
    return [codes.codes.tobytes(), *(part.astype("<f2").tobytes() for part in (codes.scales, codes.biases))]


def _write_config(path: Path, is_gguf: bool, config: ModelConfig, folder: Path, quantization: dict[str, Any]) -> None:
    """The source's config.json with what the result is; for a GGUF source, a new one."""
    tree = hf_config(config) if is_gguf else json.loads((path / "config.json").read_text(encoding="utf-8"))
    tree.pop("quantization_config", None)
    tree["quantization"] = quantization
    (folder / "config.json").write_text(json.dumps(tree, indent=1, ensure_ascii=False) + "\n")


def hf_config(config: ModelConfig) -> dict[str, Any]:
    """The config.json of a geometry; `config.from_hf` reads it back."""
    return {
        "architectures": ["DeepseekV4ForCausalLM"],
        "model_type": "deepseek_v4",
        "vocab_size": config.vocab,
        "hidden_size": config.hidden,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": 1,
        "head_dim": config.head_dim,
        "qk_rope_head_dim": config.rope_dim,
        "q_lora_rank": config.q_rank,
        "o_lora_rank": config.o_rank,
        "o_groups": config.o_groups,
        "sliding_window": config.window,
        "compress_ratios": list(config.ratios),
        "index_n_heads": config.index_heads,
        "index_head_dim": config.index_dim,
        "index_topk": config.index_topk,
        "n_routed_experts": config.n_experts,
        "num_experts_per_tok": config.experts_per_token,
        "n_shared_experts": config.n_shared_experts,
        "moe_intermediate_size": config.expert_width,
        "num_hash_layers": config.n_hash_layers,
        "routed_scaling_factor": config.route_scale,
        "swiglu_limit": config.swiglu_limit,
        "rms_norm_eps": config.norm_eps,
        "hc_mult": config.hc_streams,
        "hc_sinkhorn_iters": config.hc_iterations,
        "hc_eps": config.hc_eps,
        "rope_theta": config.rope_theta,
        "compress_rope_theta": config.compress_rope_theta,
        "rope_scaling": {
            "type": "yarn",
            "factor": config.yarn_factor,
            "original_max_position_embeddings": config.yarn_original,
            "beta_fast": config.yarn_beta_fast,
            "beta_slow": config.yarn_beta_slow,
        },
        "max_position_embeddings": config.context,
        "bos_token_id": config.bos_id,
        "eos_token_id": config.eos_id,
        "kv_rounding": config.kv_rounding,
    }
