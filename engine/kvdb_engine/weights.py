"""Weights as the model asks for them: official tensor names, whatever the file they come from.

A `TensorSource` knows one model's files. It answers by official DeepSeek names without the trailing ".weight"
(`layers.3.attn.wq_a`), and gives routed experts of a layer as one stacked tensor (`layers.3.ffn.experts.w1`). Loaders:
weights_safetensors, weights_gguf.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from kvdb_engine.errors import ModelError
from kvdb_engine.packing import F32


@dataclass(frozen=True, slots=True)
class AffineCodes:
    """Quantised values as MLX multiplies with them: value = code * scale + bias, one scale and bias for each group.

    codes: (..., in * bits / 32) uint32, the first value in the lowest bits. scales, biases: (..., in / group_size)
    float32.
    """

    codes: npt.NDArray[np.uint32]
    scales: F32
    biases: F32
    group_size: int
    bits: int

    def dense(self) -> F32:
        """All values as float32."""
        shape = (*self.codes.shape[:-1], -1)
        # As little-endian bits: a code may straddle two words (3, 5 and 6 bits).
        bits = np.unpackbits(self.codes.astype("<u4").view(np.uint8), axis=-1, bitorder="little")
        weights = (1 << np.arange(self.bits)).astype(np.float32)
        values = (bits.reshape(*shape[:-1], -1, self.bits) @ weights).reshape(*self.scales.shape, self.group_size)
        values *= self.scales[..., None]
        values += self.biases[..., None]
        return np.ascontiguousarray(values.reshape(shape), np.float32)

    def reshape(self, *leading: int) -> AffineCodes:
        """The same values with other leading axes."""
        codes = self.codes.reshape(*leading, self.codes.shape[-1])
        scales = self.scales.reshape(*leading, self.scales.shape[-1])
        return AffineCodes(codes, scales, self.biases.reshape(scales.shape), self.group_size, self.bits)


class Tensor(Protocol):
    """One tensor in a file."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape: (out, in) for a matrix, (experts, out, in) for stacked experts."""

    def dense(self) -> F32:
        """All values as float32."""

    def affine(self) -> AffineCodes | None:
        """The values as they are stored, if that is a form MLX can multiply with; None otherwise. Nothing is lost."""


class TensorSource(Protocol):
    """The tensors of one model."""

    where: str  # the file or folder, for messages

    def find(self, name: str) -> Tensor | None:
        """The tensor of that official name, or None."""

    def find_experts(self, layer: int, part: str) -> Tensor | None:
        """Routed experts of a layer, stacked. part: w1 (gate), w3 (up) or w2 (down)."""


@dataclass(frozen=True, slots=True)
class HostTensor:
    """A tensor whose values are in memory."""

    values: npt.NDArray[np.generic]

    @property
    def shape(self) -> tuple[int, ...]:
        """See Tensor."""
        return self.values.shape

    def dense(self) -> F32:
        """See Tensor."""
        return np.ascontiguousarray(self.values, dtype=np.float32)

    def affine(self) -> AffineCodes | None:
        """See Tensor."""
        return None


@dataclass(frozen=True, slots=True)
class AffineTensor:
    """A quantised tensor."""

    codes: AffineCodes

    @property
    def shape(self) -> tuple[int, ...]:
        """See Tensor."""
        return (*self.codes.scales.shape[:-1], self.codes.scales.shape[-1] * self.codes.group_size)

    def dense(self) -> F32:
        """See Tensor."""
        return self.codes.dense()

    def affine(self) -> AffineCodes | None:
        """See Tensor."""
        return self.codes


def stack(tensors: list[Tensor]) -> Tensor:
    """Tensors of one shape as one with a new first axis; stays quantised if all are, in one way."""
    codes = [tensor.affine() for tensor in tensors]
    ways = {(code.group_size, code.bits) if code else None for code in codes}
    first = codes[0]
    if first is None or len(ways) > 1:
        return HostTensor(np.stack([tensor.dense() for tensor in tensors]))
    found = [code for code in codes if code is not None]
    return AffineTensor(
        AffineCodes(
            np.stack([code.codes for code in found]),
            np.stack([code.scales for code in found]),
            np.stack([code.biases for code in found]),
            first.group_size,
            first.bits,
        )
    )


def regroup(tensor: Tensor, *leading: int) -> Tensor:
    """The same values with other leading axes; stays quantised."""
    codes = tensor.affine()
    if codes is not None:
        return AffineTensor(codes.reshape(*leading))
    return HostTensor(tensor.dense().reshape(*leading, tensor.shape[-1]))


def need(source: TensorSource, name: str, shape: tuple[int, ...]) -> Tensor:
    """The named tensor; raises ModelError if it is missing or has another shape."""
    return _checked(source, name, source.find(name), shape)


def need_experts(source: TensorSource, layer: int, part: str, shape: tuple[int, ...]) -> Tensor:
    """The stacked experts of a layer; raises ModelError if they are missing or have another shape."""
    return _checked(source, f"layers.{layer}.ffn.experts.*.{part}", source.find_experts(layer, part), shape)


def _checked(source: TensorSource, name: str, tensor: Tensor | None, shape: tuple[int, ...]) -> Tensor:
    if tensor is None:
        raise ModelError(f"{source.where}: tensor {name} is missing; is the download complete?")
    if tensor.shape != shape:
        raise ModelError(f"{source.where}: tensor {name} has shape {tensor.shape}, the config asks for {shape}")
    return tensor
