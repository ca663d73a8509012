"""Random weights: a model of any geometry whose values mean nothing, for measuring speed, memory and state size.

Every tensor follows from its name, so two loads give equal models. Matrices are quantised as kvdb's recipe does it:
routed experts 2 bit (gate and up in groups of 128, down in groups of 64), everything else 8 bit in groups of 64, but
compressors and indexer bf16, router and mHC float32. Where MLX computes, codes are made on the device and never pass
through the host: the 284 billion parameters of DeepSeek V4 Flash take seconds and 83 GiB.

Values have mean 0 and variance 1/in, so that activations keep their size through the layers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from blake3 import blake3

from kvdb_engine.catalog import ModelInfo
from kvdb_engine.config import ModelConfig
from kvdb_engine.packing import F32
from kvdb_engine.synthetic_model import SyntheticTokenizer
from kvdb_engine.tokenizer import Tokenizer
from kvdb_engine.weights import AffineCodes, Tensor

# A code's bits are a multiplicative hash of its word's number and the tensor's seed: the same in numpy and MLX.
_MULTIPLIERS = (0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D)


def _hashed(numbers: Any, seed: int) -> Any:
    """Mix uint32 numbers (numpy or MLX)."""
    mixed = numbers * _like(numbers, _MULTIPLIERS[0]) ^ _like(numbers, seed)
    mixed = (mixed ^ (mixed >> _like(numbers, 15))) * _like(numbers, _MULTIPLIERS[1])
    mixed = (mixed ^ (mixed >> _like(numbers, 13))) * _like(numbers, _MULTIPLIERS[2])
    return mixed ^ (mixed >> _like(numbers, 16))


def _like(numbers: Any, value: int) -> Any:
    if isinstance(numbers, np.ndarray):
        return np.uint32(value)
    import mlx.core as mx

    return mx.array(value, dtype=mx.uint32)


def _scale_and_bias(bits: int, inner: int) -> tuple[float, float]:
    """Of all groups, as bf16 values: codes 0 .. 2^bits - 1 then have mean 0 and variance 1/inner."""
    top = (1 << bits) - 1
    wide = np.float32(1 / np.sqrt(inner * (top * (top + 2)) / 12))
    scale = float((wide.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32))
    # The middle of the codes, times the scale: half a power of two less one, so a bf16 product only for 2 bits.
    bias = np.float32(-scale * top / 2)
    return scale, float((bias.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32))


@dataclass(frozen=True, slots=True)
class RandomCodes:
    """A quantised matrix, or a stack of them. Implements weights.Tensor and ops_mlx_cuda.DeviceTensor."""

    shape: tuple[int, ...]
    seed: int
    bits: int
    group_size: int

    def dense(self) -> F32:
        """See weights.Tensor."""
        return self.affine().dense()

    def matrix(self, index: int) -> F32:
        """See weights.Tensor."""
        values: F32 = self.dense()[index]
        return values

    def affine(self) -> AffineCodes:
        """See weights.Tensor."""
        words = (*self.shape[:-1], self.shape[-1] * self.bits // 32)
        codes = _hashed(np.arange(np.prod(words), dtype=np.uint32), self.seed).reshape(words)
        scale, bias = _scale_and_bias(self.bits, self.shape[-1])
        groups = (*self.shape[:-1], self.shape[-1] // self.group_size)
        return AffineCodes(
            codes, np.full(groups, scale, np.float32), np.full(groups, bias, np.float32), self.group_size, self.bits
        )

    def regroup(self, *leading: int) -> RandomCodes:
        """See weights.regroup."""
        return replace(self, shape=(*leading, self.shape[-1]))

    def on_device(self) -> Any:
        """See DeviceTensor."""
        import mlx.core as mx

        from kvdb_engine.ops_mlx_cuda import Quantised

        words = (*self.shape[:-1], self.shape[-1] * self.bits // 32)
        codes = _hashed(mx.arange(int(np.prod(words)), dtype=mx.uint32), self.seed).reshape(words)
        scale, bias = _scale_and_bias(self.bits, self.shape[-1])
        groups = (*self.shape[:-1], self.shape[-1] // self.group_size)
        # On a processor 16-bit scales would be slow.
        kind = mx.float32 if mx.default_device() == mx.cpu else mx.bfloat16
        made = Quantised(
            codes, mx.full(groups, scale, kind), mx.full(groups, bias, kind), self.group_size, self.bits, kind
        )
        mx.eval(made.codes, made.scales, made.biases)
        return made


@dataclass(frozen=True, slots=True)
class RandomValues:
    """A matrix of plain values, bf16 or float32; or a vector around `mean`. Implements weights.Tensor."""

    shape: tuple[int, ...]
    seed: int
    spread: float
    mean: float = 0.0
    is_bf16: bool = False

    def dense(self) -> F32:
        """See weights.Tensor."""
        count = int(np.prod(self.shape))
        raw = _hashed(np.arange(count, dtype=np.uint32), self.seed) >> np.uint32(16)
        values = (raw.astype(np.float32) / 32768 - 1) * np.float32(self.spread * 3**0.5) + np.float32(self.mean)
        if self.is_bf16:
            values = (values.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
        return np.ascontiguousarray(values.reshape(self.shape), np.float32)

    def matrix(self, index: int) -> F32:
        """See weights.Tensor."""
        values: F32 = self.dense()[index]
        return values

    def affine(self) -> None:
        """See weights.Tensor."""

    def on_device(self) -> Any:
        """See DeviceTensor."""
        import mlx.core as mx

        raw = _hashed(mx.arange(int(np.prod(self.shape)), dtype=mx.uint32), self.seed) >> _like(None, 16)
        values = (raw.astype(mx.float32) / 32768 - 1) * (self.spread * 3**0.5) + self.mean
        if self.is_bf16:
            values = (values.view(mx.uint32) & mx.array(0xFFFF0000, dtype=mx.uint32)).view(mx.float32)
            if mx.default_device() != mx.cpu:
                values = values.astype(mx.bfloat16)
        values = values.reshape(self.shape)
        mx.eval(values)
        return values


class RandomSource:
    """Implements weights.TensorSource for a geometry."""

    def __init__(self, config: ModelConfig) -> None:
        self.where = "random weights"
        self._config = config

    def release(self) -> None:
        """See weights.TensorSource; there are no files."""

    def find(self, name: str) -> Tensor | None:
        """See weights.TensorSource."""
        shape = self._shape(name)
        if shape is None:
            return None
        seed = _seed(name)
        last = name.rsplit(".", 1)[-1]
        if last == "tid2eid":
            return _Table(shape, seed, self._config.n_experts)
        if last.endswith("_scale"):
            return RandomValues(shape, seed, 0.0, 1.0)
        if len(shape) == 1 or last == "ape":
            is_norm = last.endswith("norm")
            return RandomValues(shape, seed, 0.1, 1.0 if is_norm else 0.0)
        spread = shape[-1] ** -0.5
        if "compressor" in name or "indexer" in name:
            return RandomValues(shape, seed, spread, is_bf16=True)
        if last == "gate" or last.endswith("_fn"):
            return RandomValues(shape, seed, spread)
        return RandomCodes(shape, seed, 8, 64)

    def find_experts(self, layer: int, part: str) -> Tensor | None:
        """See weights.TensorSource."""
        c = self._config
        inner, out = (c.expert_width, c.hidden) if part == "w2" else (c.hidden, c.expert_width)
        seed = _seed(f"layers.{layer}.ffn.experts.{part}")
        return RandomCodes((c.n_experts, out, inner), seed, 2, 64 if part == "w2" else 128)

    def _shape(self, name: str) -> tuple[int, ...] | None:
        """Of a tensor by its official name; None if this geometry has no such tensor."""
        c = self._config
        head, _, rest = name.partition(".")
        n = c.hc_streams
        outputs = 2 * n + n * n
        if head != "layers":
            top: dict[str, tuple[int, ...]] = {
                "embed": (c.vocab, c.hidden),
                "head": (c.vocab, c.hidden),
                "norm": (c.hidden,),
                "hc_head_fn": (n, n * c.hidden),
                "hc_head_scale": (1,),
                "hc_head_base": (n,),
            }
            return top.get(name)
        number, _, part = rest.partition(".")
        ratio = c.ratios[int(number)]
        shared, group_in = c.expert_width * c.n_shared_experts, c.n_heads * c.head_dim // c.o_groups
        shapes: dict[str, tuple[int, ...]] = {
            "attn_norm": (c.hidden,),
            "ffn_norm": (c.hidden,),
            "attn.wq_a": (c.q_rank, c.hidden),
            "attn.q_norm": (c.q_rank,),
            "attn.wq_b": (c.n_heads * c.head_dim, c.q_rank),
            "attn.wkv": (c.head_dim, c.hidden),
            "attn.kv_norm": (c.head_dim,),
            "attn.attn_sink": (c.n_heads,),
            "attn.wo_a": (c.o_groups * c.o_rank, group_in),
            "attn.wo_b": (c.hidden, c.o_groups * c.o_rank),
            "ffn.gate": (c.n_experts, c.hidden),
            "ffn.shared_experts.w1": (shared, c.hidden),
            "ffn.shared_experts.w3": (shared, c.hidden),
            "ffn.shared_experts.w2": (c.hidden, shared),
        }
        for site in ("hc_attn", "hc_ffn"):
            shapes |= {f"{site}_fn": (outputs, n * c.hidden), f"{site}_base": (outputs,), f"{site}_scale": (3,)}
        if int(number) < c.n_hash_layers:
            shapes["ffn.gate.tid2eid"] = (c.vocab, c.experts_per_token)
        else:
            shapes["ffn.gate.bias"] = (c.n_experts,)
        widths = {"attn.compressor": c.head_dim} if ratio else {}
        if ratio == 4:
            widths["attn.indexer.compressor"] = c.index_dim
            shapes["attn.indexer.wq_b"] = (c.index_heads * c.index_dim, c.q_rank)
            shapes["attn.indexer.weights_proj"] = (c.index_heads, c.hidden)
        for prefix, width in widths.items():
            columns = width * (2 if ratio == 4 else 1)
            shapes |= {f"{prefix}.wkv": (columns, c.hidden), f"{prefix}.wgate": (columns, c.hidden)}
            shapes |= {f"{prefix}.ape": (ratio, columns), f"{prefix}.norm": (width,)}
        return shapes.get(part)


@dataclass(frozen=True, slots=True)
class _Table:
    """The experts of each token id in a hash layer: consecutive ones from a random place, so never one twice."""

    shape: tuple[int, ...]
    seed: int
    n_experts: int

    def dense(self) -> F32:
        first = _hashed(np.arange(self.shape[0], dtype=np.uint32), self.seed)[:, None] % np.uint32(self.n_experts)
        ids = (first + np.arange(self.shape[1], dtype=np.uint32)) % np.uint32(self.n_experts)
        values: F32 = ids.astype(np.float32)
        return values

    def matrix(self, index: int) -> F32:
        """See weights.Tensor."""
        values: F32 = self.dense()[index]
        return values

    def affine(self) -> None:
        """See weights.Tensor."""


@dataclass(frozen=True)
class RandomInfo(ModelInfo):
    """A geometry with random weights. Its states belong to no other model."""

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Arithmetic between ids and bytes."""
        return SyntheticTokenizer(self.config.vocab)

    @cached_property
    def quant(self) -> str:
        """The recipe's name."""
        return "random 2-bit experts + 8-bit"

    def open_weights(self) -> RandomSource:
        """See ModelInfo."""
        return RandomSource(self.config)


def random_model(config: ModelConfig, name: str = "random") -> RandomInfo:
    """A model of this geometry. Inner widths must be multiples of 128."""
    layout = config.layout()
    family = blake3(b"kvdb random weights\0" + repr(config).encode()).digest()
    fingerprint = blake3(b"kvdb model\0" + family).digest()
    return RandomInfo(name, Path(name), config, layout, fingerprint, family, {})


def _seed(name: str) -> int:
    return int.from_bytes(blake3(name.encode()).digest()[:4], "little")
