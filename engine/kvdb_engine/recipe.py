"""The asymmetric recipe: how many bits each class of tensors gets, and what a model of a geometry then takes.

| tensors | stored as | bits per weight |
|---|---|---|
| routed experts, gate and up | 2 bits, groups of 128 | 2.25 |
| routed experts, down | 2 bits, groups of 128; groups of 64 in the first quarter of the layers | 2.25, 2.5 |
| attention projections, shared expert, embedding, head | 8 bits, groups of 64 | 8.5 |
| router, mHC, compressors, indexer, norms, sinks, tables | bf16 where that is exact, else f32 | 16 or 32 |

DeepSeek V4 Flash comes to 81.0 GiB; ds4's file of "81 GB" is 80.8 GiB (docs/engine.md works both out). ds4 gives gate
and up 2.06 bits and down 2.63, forms that MLX does not multiply with: its smallest has 2.25. So the little more that
down gets goes where it helps most: mistakes of the first layers go through all others.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import numpy as np

from kvdb_engine.config import ModelConfig
from kvdb_engine.quantise import GROUP_SIZES

PARTS = ("w1", "w3", "w2")  # of a routed expert: gate, up, down
ITEM_BYTES = {"U32": 4, "F32": 4, "I32": 4, "F16": 2, "BF16": 2}


@dataclass(frozen=True, slots=True)
class Recipe:
    """(bits, group size) of each class of tensors. early_down: down in the first quarter of the layers."""

    gate_up: tuple[int, int] = (2, 128)
    down: tuple[int, int] = (2, 128)
    early_down: tuple[int, int] = (2, 64)
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


def tensor_class(name: str) -> str:
    """The class of a tensor, named for reports."""
    last = name.rsplit(".", 1)[-1]
    if ".ffn.experts." in name:
        return "routed down" if last == "w2" else "routed gate and up"
    if last in _REST and "compressor" not in name and "indexer" not in name:
        return "embedding and head" if last in ("embed", "head") else "attention and shared expert"
    return "unquantised"


def way_of(recipe: Recipe, name: str, inner: int, n_layers: int) -> tuple[int, int] | None:
    """(bits, group size) of a tensor; the group shrinks until it divides the inputs. None: not quantised."""
    kind = tensor_class(name)
    if kind == "unquantised":
        return None
    if kind == "routed down":
        wanted = recipe.early_down if int(name.split(".")[1]) < n_layers // 4 else recipe.down
    else:
        wanted = recipe.gate_up if kind == "routed gate and up" else recipe.rest
    fitting = [size for size in GROUP_SIZES if size <= wanted[1] and inner % size == 0]
    return (wanted[0], max(fitting)) if fitting else None


def expert_name(layer: int, part: str) -> str:
    """The official name of a layer's stacked experts."""
    return f"layers.{layer}.ffn.experts.{part}"


def expert_shape(config: ModelConfig, part: str) -> tuple[int, int, int]:
    """(n_experts, out, in)."""
    out, inner = (config.hidden, config.expert_width) if part == "w2" else (config.expert_width, config.hidden)
    return (config.n_experts, out, inner)


def expert_way(config: ModelConfig, recipe: Recipe, layer: int, part: str) -> tuple[int, int] | None:
    """`way_of` a layer's stacked experts."""
    return way_of(recipe, expert_name(layer, part), expert_shape(config, part)[-1], config.n_layers)


def stored_bytes(shape: tuple[int, ...], kind: str, way: tuple[int, int] | None) -> int:
    """Bytes of a tensor: plain values of that kind, or codes with an f16 scale and bias for each group."""
    count = int(np.prod(shape, dtype=np.int64))
    if way is None:
        return ITEM_BYTES[kind] * count
    bits, group_size = way
    return count * bits // 8 + 2 * ITEM_BYTES["F16"] * (count // group_size)


def recipe_size(config: ModelConfig, recipe: Recipe | None = None) -> list[ClassReport]:
    """What a model of this geometry takes, from the shapes alone (matrices left alone in bf16, vectors in f32)."""
    recipe = recipe or Recipe()
    counts: dict[str, list[int]] = defaultdict(lambda: [0, 0])

    def add(name: str, shape: tuple[int, ...], way: tuple[int, int] | None) -> None:
        counts[tensor_class(name)][0] += int(np.prod(shape, dtype=np.int64))
        counts[tensor_class(name)][1] += stored_bytes(shape, _plain_kind(name, shape), way)

    for name, shape in tensor_shapes(config).items():
        add(name, shape, way_of(recipe, name, shape[-1], config.n_layers) if len(shape) == 2 else None)
    for layer in range(config.n_layers):
        for part in PARTS:
            add(expert_name(layer, part), expert_shape(config, part), expert_way(config, recipe, layer, part))
    return [ClassReport(name, *count) for name, count in sorted(counts.items())]


def plain_size(config: ModelConfig) -> int:
    """Bytes of the same model with all matrices in bf16 and vectors in f32."""
    shapes = list(tensor_shapes(config).items())
    shapes += [
        (expert_name(layer, part), expert_shape(config, part)) for layer in range(config.n_layers) for part in PARTS
    ]
    return sum(stored_bytes(shape, _plain_kind(name, shape), None) for name, shape in shapes)


def _plain_kind(name: str, shape: tuple[int, ...]) -> str:
    return "I32" if name.endswith("tid2eid") else "BF16" if len(shape) >= 2 else "F32"
