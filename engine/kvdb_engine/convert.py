"""Convert a model to kvdb's asymmetric recipe: few bits where most weights are, many where mistakes spread.

| tensors | stored as | bits per weight |
|---|---|---|
| routed experts, gate and up | 2 bits, groups of 128 | 2.25 |
| routed experts, down | 2 bits, groups of 64 | 2.5 |
| attention projections, shared expert, embedding, head | 8 bits, groups of 64 | 8.5 |
| router, mHC, compressors, indexer, norms, sinks, tables | bf16 where that is exact, else f32 | 16 or 32 |

At DeepSeek V4 Flash's size, 284.3 G weights, this is 89.1 GB = 83.0 GiB, of which routed experts are 80.8 GB
(`kvdb-convert size`); with groups of 128 for down too, 86.2 GB = 80.3 GiB. ds4's own file of "81 GB" has 2.06 and 2.63
bits there.

Tensor by tensor: one expert's matrix is the largest thing in memory. The result is a folder of one shard a layer, with
routed experts stacked, that any tool reads which knows MLX's quantised safetensors.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kvdb_engine.catalog import open_model
from kvdb_engine.config import ModelConfig
from kvdb_engine.errors import ModelError
from kvdb_engine.packing import F32
from kvdb_engine.quantise import GROUP_SIZES, quantise
from kvdb_engine.weights import Tensor, TensorSource, need, need_experts


@dataclass(frozen=True, slots=True)
class Recipe:
    """(bits, group size) of each class of tensors."""

    gate_up: tuple[int, int] = (2, 128)
    down: tuple[int, int] = (2, 64)
    rest: tuple[int, int] = (8, 64)


@dataclass(frozen=True, slots=True)
class ClassReport:
    """One class of tensors in the result."""

    name: str
    weights: int
    bytes: int

    @property
    def bits_per_weight(self) -> float:
        """Stored bits for each weight, scales and biases included."""
        return 8 * self.bytes / self.weights


@dataclass(frozen=True, slots=True)
class _Output:
    """A tensor of the result. values: yields the values of one matrix after the other."""

    name: str
    shape: tuple[int, ...]
    kind: str
    way: tuple[int, int] | None
    values: Callable[[], Iterator[F32]]


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Official name -> shape of every tensor but the routed experts.

    Optional: router biases of layers that lack one.
    """
    c, n = config, config.hc_streams
    shapes: dict[str, tuple[int, ...]] = {
        "embed": (c.vocab, c.hidden),
        "head": (c.vocab, c.hidden),
        "norm": (c.hidden,),
        "hc_head_fn": (n, n * c.hidden),
        "hc_head_base": (n,),
        "hc_head_scale": (1,),
    }
    for layer, ratio in enumerate(c.ratios):
        p, a, f = f"layers.{layer}.", f"layers.{layer}.attn.", f"layers.{layer}.ffn."
        outputs = 2 * n + n * n
        for site in ("hc_attn", "hc_ffn"):
            shapes |= {
                f"{p}{site}_fn": (outputs, n * c.hidden),
                f"{p}{site}_base": (outputs,),
                f"{p}{site}_scale": (3,),
            }
        shapes |= {
            f"{p}attn_norm": (c.hidden,),
            f"{p}ffn_norm": (c.hidden,),
            f"{a}wq_a": (c.q_rank, c.hidden),
            f"{a}q_norm": (c.q_rank,),
            f"{a}wq_b": (c.n_heads * c.head_dim, c.q_rank),
            f"{a}wkv": (c.head_dim, c.hidden),
            f"{a}kv_norm": (c.head_dim,),
            f"{a}attn_sink": (c.n_heads,),
            f"{a}wo_a": (c.o_groups * c.o_rank, c.n_heads * c.head_dim // c.o_groups),
            f"{a}wo_b": (c.hidden, c.o_groups * c.o_rank),
            f"{f}gate": (c.n_experts, c.hidden),
        }
        compressors = [(f"{a}compressor.", c.head_dim)] if ratio else []
        if ratio == 4:
            compressors.append((f"{a}indexer.compressor.", c.index_dim))
            shapes[f"{a}indexer.wq_b"] = (c.index_heads * c.index_dim, c.q_rank)
            shapes[f"{a}indexer.weights_proj"] = (c.index_heads, c.hidden)
        for name, width in compressors:
            columns = width * (2 if ratio == 4 else 1)
            shapes |= {f"{name}wkv": (columns, c.hidden), f"{name}wgate": (columns, c.hidden)}
            shapes |= {f"{name}ape": (ratio, columns), f"{name}norm": (width,)}
        if layer < c.n_hash_layers:
            shapes[f"{f}gate.tid2eid"] = (c.vocab, c.experts_per_token)
        else:
            shapes[f"{f}gate.bias"] = (c.n_experts,)
        shared = c.expert_width * c.n_shared_experts
        shapes |= {f"{f}shared_experts.w1": (shared, c.hidden), f"{f}shared_experts.w3": (shared, c.hidden)}
        shapes[f"{f}shared_experts.w2"] = (c.hidden, shared)
    return shapes


_REST = ("embed", "head", "wq_a", "wq_b", "wkv", "wo_a", "wo_b", "w1", "w2", "w3")


def _class(name: str) -> str:
    """The class of a tensor, as in the module's table."""
    last = name.rsplit(".", 1)[-1]
    if ".ffn.experts." in name:
        return "routed down" if last == "w2" else "routed gate and up"
    if last in _REST and "compressor" not in name and "indexer" not in name:
        return "embedding and head" if last in ("embed", "head") else "attention and shared expert"
    return "unquantised"


def _way(recipe: Recipe, name: str, inner: int) -> tuple[int, int] | None:
    """(bits, group size) of a tensor; the group shrinks until it divides the inputs. None: not quantised."""
    by_class = {"routed gate and up": recipe.gate_up, "routed down": recipe.down, "unquantised": None}
    wanted = by_class.get(_class(name), recipe.rest)
    if wanted is None:
        return None
    fitting = [size for size in GROUP_SIZES if size <= wanted[1] and inner % size == 0]
    return (wanted[0], max(fitting)) if fitting else None


def convert(
    spec: str,
    target: Path,
    recipe: Recipe | None = None,
    progress: Callable[[int, int, str], None] = lambda done, of, name: None,
) -> list[ClassReport]:
    """Write model `spec` to the new folder `target`. progress(bytes done, bytes in all, tensor) after each tensor.

    Raises ModelError: what is wrong with the source, or that the target exists. A failed run leaves no target.
    """
    info = open_model(spec)
    if target.exists():
        raise ModelError(f"{target}: exists already; name a new folder")
    building = target.with_name(target.name + ".part")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    try:
        reports = _write(info.config, info.open_weights(), building, recipe or Recipe(), progress)
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


def recipe_size(config: ModelConfig, recipe: Recipe | None = None) -> list[ClassReport]:
    """What a model of this geometry takes, from the shapes alone (matrices left alone in bf16, vectors in f32)."""
    counts: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for entry in _shapes(config, recipe or Recipe()):
        count = counts[_class(entry.name)]
        count[0] += int(np.prod(entry.shape, dtype=np.int64))
        count[1] += _bytes(entry)
    return [ClassReport(name, *count) for name, count in sorted(counts.items())]


def _shapes(config: ModelConfig, recipe: Recipe) -> Iterator[_Output]:
    for name, shape in tensor_shapes(config).items():
        way = _way(recipe, name, shape[-1]) if len(shape) == 2 else None
        kind = "I32" if name.endswith("tid2eid") else "BF16" if len(shape) == 2 else "F32"
        yield _Output(name, shape, kind, way, lambda: iter(()))
    for layer in range(config.n_layers):
        for part, out, inner in (
            ("w1", config.expert_width, config.hidden),
            ("w3", config.expert_width, config.hidden),
            ("w2", config.hidden, config.expert_width),
        ):
            name = f"layers.{layer}.ffn.experts.{part}"
            yield _Output(name, (config.n_experts, out, inner), "F32", _way(recipe, name, inner), lambda: iter(()))


def _plan(config: ModelConfig, source: TensorSource, recipe: Recipe) -> list[list[_Output]]:
    """The tensors of the result, shard by shard; checks that the source has them all before anything is written."""
    shards: dict[str, list[_Output]] = defaultdict(list)

    def one(tensor: Tensor) -> Callable[[], Iterator[F32]]:
        return lambda: iter([tensor.dense()])

    for name, shape in tensor_shapes(config).items():
        if name.endswith("gate.bias") and source.find(name) is None:
            continue
        tensor = need(source, name, shape)
        way = _way(recipe, name, shape[-1]) if len(shape) == 2 else None
        kind = "U32" if way else "I32" if name.endswith("tid2eid") else _kind(tensor.dense())
        shards[name.split(".")[1] if name.startswith("layers.") else ""].append(
            _Output(name, shape, kind, way, one(tensor))
        )
    for layer in range(config.n_layers):
        for part in ("w1", "w3", "w2"):
            out, inner = (config.hidden, config.expert_width) if part == "w2" else (config.expert_width, config.hidden)
            name, shape = f"layers.{layer}.ffn.experts.{part}", (config.n_experts, out, inner)
            way = _way(recipe, name, inner)
            stacked = need_experts(source, layer, part, shape)
            shards[str(layer)].append(_Output(name, shape, "U32" if way else "F32", way, _experts(stacked)))
    return list(shards.values())


def _experts(stacked: Tensor) -> Callable[[], Iterator[F32]]:
    """The experts' matrices one by one, so that a layer's experts are never in memory together."""
    return lambda: (stacked.matrix(expert) for expert in range(stacked.shape[0]))


def _kind(values: F32) -> str:
    """BF16 if that loses nothing, else F32."""
    return "F32" if (values.view(np.uint32) & 0xFFFF).any() else "BF16"


def _write(
    config: ModelConfig,
    source: TensorSource,
    folder: Path,
    recipe: Recipe,
    progress: Callable[[int, int, str], None],
) -> tuple[list[ClassReport], dict[str, Any]]:
    shards = _plan(config, source, recipe)
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
                count = counts[_class(entry.name)]
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


_ITEM_BYTES = {"U32": 4, "F32": 4, "I32": 4, "F16": 2, "BF16": 2}


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
        (name, kind, tuple(shape), _ITEM_BYTES[kind] * int(np.prod(shape, dtype=np.int64)))
        for name, kind, shape in parts
    ]


def _bytes(entry: _Output) -> int:
    return sum(size for _, _, _, size in _entries(entry))


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
        if entry.way is None:
            if entry.kind == "BF16":
                pieces = [(values.view(np.uint32) >> 16).astype("<u2").tobytes()]
            else:
                pieces = [values.astype("<i4" if entry.kind == "I32" else "<f4").tobytes()]
        else:
            codes = quantise(values, *entry.way)
            pieces = [codes.codes.tobytes(), *(part.astype("<f2").tobytes() for part in (codes.scales, codes.biases))]
        for number, piece in enumerate(pieces):
            out.seek(at[number])
            out.write(piece)
            at[number] += len(piece)


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
