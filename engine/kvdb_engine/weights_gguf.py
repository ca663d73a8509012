"""GGUF files in ds4's layout: tensor names, and dequantisation through the `gguf` package.

GGUF lists dimensions innermost first; shapes here are the usual (out, in). One file holds metadata, tokenizer and
weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kvdb_engine.errors import ModelError
from kvdb_engine.packing import F32
from kvdb_engine.weights import AffineCodes, Halves, Tensor, release

_GLOBAL = {
    "embed": "token_embd",
    "head": "output",
    "norm": "output_norm",
    "hc_head_fn": "output_hc_fn",
    "hc_head_base": "output_hc_base",
    "hc_head_scale": "output_hc_scale",
}
_LAYER = {
    "hc_attn_fn": "hc_attn_fn",
    "hc_attn_base": "hc_attn_base",
    "hc_attn_scale": "hc_attn_scale",
    "hc_ffn_fn": "hc_ffn_fn",
    "hc_ffn_base": "hc_ffn_base",
    "hc_ffn_scale": "hc_ffn_scale",
    "attn_norm": "attn_norm",
    "ffn_norm": "ffn_norm",
    "attn.wq_a": "attn_q_a",
    "attn.q_norm": "attn_q_a_norm",
    "attn.wq_b": "attn_q_b",
    "attn.wkv": "attn_kv",
    "attn.kv_norm": "attn_kv_a_norm",
    "attn.attn_sink": "attn_sinks",
    "attn.wo_a": "attn_output_a",
    "attn.wo_b": "attn_output_b",
    "attn.compressor.wkv": "attn_compressor_kv",
    "attn.compressor.wgate": "attn_compressor_gate",
    "attn.compressor.ape": "attn_compressor_ape",
    "attn.compressor.norm": "attn_compressor_norm",
    "attn.indexer.wq_b": "indexer.attn_q_b",
    "attn.indexer.weights_proj": "indexer.proj",
    "attn.indexer.compressor.wkv": "indexer_compressor_kv",
    "attn.indexer.compressor.wgate": "indexer_compressor_gate",
    "attn.indexer.compressor.ape": "indexer_compressor_ape",
    "attn.indexer.compressor.norm": "indexer_compressor_norm",
    "ffn.gate": "ffn_gate_inp",
    "ffn.gate.tid2eid": "ffn_gate_tid2eid",
    "ffn.shared_experts.w1": "ffn_gate_shexp",
    "ffn.shared_experts.w3": "ffn_up_shexp",
    "ffn.shared_experts.w2": "ffn_down_shexp",
}
_EXPERTS = {"w1": "ffn_gate_exps", "w3": "ffn_up_exps", "w2": "ffn_down_exps"}


def gguf_name(name: str) -> str:
    """The GGUF name of an official tensor name (without .weight)."""
    if not name.startswith("layers."):
        return f"{_GLOBAL[name]}.weight"
    _, layer, rest = name.split(".", 2)
    if rest == "ffn.gate.bias":
        return f"blk.{layer}.exp_probs_b.bias"
    return f"blk.{layer}.{_LAYER[rest]}.weight"


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One tensor of a mapped file; the values are decoded when asked for."""

    raw: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """See weights.Tensor."""
        return tuple(int(n) for n in reversed(self.raw.shape))

    @property
    def kind(self) -> str:
        """The GGUF type's name, e.g. Q8_0."""
        name: str = self.raw.tensor_type.name
        return name

    def dense(self) -> F32:
        """See weights.Tensor."""
        from gguf.quants import dequantize

        if self.kind == "I32":
            return np.asarray(self.raw.data).reshape(self.shape).astype(np.float32)
        return np.ascontiguousarray(dequantize(self.raw.data, self.raw.tensor_type), np.float32).reshape(self.shape)

    def matrix(self, index: int) -> F32:
        """See weights.Tensor."""
        from gguf.quants import dequantize

        values = dequantize(self.raw.data[index], self.raw.tensor_type)
        return np.ascontiguousarray(values, np.float32).reshape(self.shape[1:])

    def affine(self) -> AffineCodes | None:
        """See weights.Tensor. Q8_0 and Q4_K are affine in groups of 32; the other kinds are not."""
        unpack = {"Q8_0": _affine_q8_0, "Q4_K": _affine_q4_k}.get(self.kind)
        if unpack is None:
            return None
        *leading, inner = self.shape
        return unpack(np.asarray(self.raw.data).reshape(-1), inner).reshape(*leading)

    def compact(self) -> Halves | None:
        """See weights.compact."""
        if self.kind not in ("F16", "BF16"):
            return None
        return Halves(np.ascontiguousarray(self.raw.data).view(np.uint16).reshape(self.shape), self.kind)


def _affine_q8_0(raw: npt.NDArray[np.uint8], inner: int) -> AffineCodes:
    """Blocks of 34 bytes: f16 scale d, 32 x i8 q. value = d q = d (q + 128) - 128 d."""
    blocks = raw.reshape(-1, 34)
    scales = blocks[:, :2].copy().view("<f2").astype(np.float32).reshape(-1, inner // 32)
    codes = (blocks[:, 2:] ^ 0x80).copy().view("<u4").reshape(-1, inner // 4)
    return AffineCodes(codes, scales, scales * np.float32(-128), 32, 8)


def _affine_q4_k(raw: npt.NDArray[np.uint8], inner: int) -> AffineCodes:
    """Blocks of 144 bytes: f16 d and dmin, 12 bytes of eight 6-bit scales and minima, 128 bytes of 4-bit codes.

    value = (d scale) q - dmin minimum, in groups of 32; two groups share 32 bytes, the first in the low nibbles.
    """
    blocks = raw.reshape(-1, 144)
    d, least = (blocks[:, at : at + 2].copy().view("<f2").astype(np.float32) for at in (0, 2))
    low, middle, high = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scale = np.concatenate([low & 63, (high & 15) | ((low >> 6) << 4)], axis=1).astype(np.float32)
    minimum = np.concatenate([middle & 63, (high >> 4) | ((middle >> 6) << 4)], axis=1).astype(np.float32)
    pairs = blocks[:, 16:].reshape(-1, 4, 32)
    values = np.stack([pairs & 15, pairs >> 4], axis=2).reshape(-1, 256)
    codes = (values[:, 0::2] | (values[:, 1::2] << 4)).view("<u4").reshape(-1, inner // 8)
    groups = inner // 32
    return AffineCodes(codes, (d * scale).reshape(-1, groups), (-least * minimum).reshape(-1, groups), 32, 4)


class GgufSource:
    """A GGUF file, mapped into memory. Implements weights.TensorSource."""

    def __init__(self, path: Path) -> None:
        try:
            from gguf import GGUFReader
        except ImportError as error:
            raise ModelError(f"{path}: reading GGUF needs the gguf package: pip install 'kvdb[engine]'") from error
        self.where = str(path)
        try:
            self._reader = GGUFReader(path)
        except (OSError, ValueError, KeyError, IndexError) as error:
            raise ModelError(f"{path}: not a readable GGUF file: {error}") from error
        self._tensors = {tensor.name: tensor for tensor in self._reader.tensors}

    @cached_property
    def metadata(self) -> Mapping[str, Any]:
        """Every metadata key with its value as Python numbers, strings or lists."""
        return {key: field.contents() for key, field in self._reader.fields.items()}

    def kinds(self) -> dict[str, str]:
        """GGUF type of each tensor, by GGUF name."""
        return {name: tensor.tensor_type.name for name, tensor in self._tensors.items()}

    def release(self) -> None:
        """See weights.TensorSource."""
        release(self._reader.data._mmap)  # type: ignore[attr-defined]

    def find(self, name: str) -> Tensor | None:
        """See weights.TensorSource."""
        raw = self._tensors.get(gguf_name(name))
        return None if raw is None else GgufTensor(raw)

    def find_experts(self, layer: int, part: str) -> Tensor | None:
        """See weights.TensorSource."""
        raw = self._tensors.get(f"blk.{layer}.{_EXPERTS[part]}.weight")
        return None if raw is None else GgufTensor(raw)
