"""Weights as the model asks for them: official tensor names, whatever the file they come from.

A `TensorSource` knows one model's files. It answers by official DeepSeek names without the trailing ".weight"
(`layers.3.attn.wq_a`), and gives routed experts of a layer as one stacked tensor (`layers.3.ffn.experts.w1`). Loaders:
weights_safetensors, weights_gguf.
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from kvdb_engine.errors import ModelError
from kvdb_engine.packing import E2M1, E4M3, F32


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


@dataclass(frozen=True, slots=True)
class BlockFloats:
    """Small floats with a power of two for every 32: MLX's mxfp4 (e2m1, 4 bits) and mxfp8 (e4m3, 8 bits).

    codes: (..., in * bits / 32) uint32, the first value in the lowest bits. scales: (..., in / 32) uint8, E8M0.
    """

    codes: npt.NDArray[np.uint32]
    scales: npt.NDArray[np.uint8]
    bits: int

    def dense(self) -> F32:
        """All values as float32."""
        raw = np.ascontiguousarray(self.codes).view(np.uint8)
        if self.bits == 4:
            raw = np.stack([raw & 15, raw >> 4], axis=-1)
        values: F32 = (E2M1 if self.bits == 4 else E4M3)[raw].reshape(*self.scales.shape, 32)
        powers = np.exp2(self.scales.astype(np.float32) - 127)[..., None]
        return np.ascontiguousarray((values * powers).reshape(*self.scales.shape[:-1], -1), np.float32)

    def at(self, index: int) -> BlockFloats:
        """One of the first axis."""
        return BlockFloats(self.codes[index], self.scales[index], self.bits)

    def reshape(self, *leading: int) -> BlockFloats:
        """The same values with other leading axes."""
        codes = self.codes.reshape(*leading, self.codes.shape[-1])
        return BlockFloats(codes, self.scales.reshape(*leading, self.scales.shape[-1]), self.bits)


@dataclass(frozen=True, slots=True)
class Halves:
    """Values of 16 bits. values: uint16; kind: BF16 or F16."""

    values: npt.NDArray[np.uint16]
    kind: str

    def dense(self) -> F32:
        """All values as float32."""
        if self.kind == "BF16":
            return (self.values.astype(np.uint32) << np.uint32(16)).view(np.float32)
        return self.values.view(np.float16).astype(np.float32)

    def at(self, index: int) -> Halves:
        """One of the first axis."""
        return Halves(self.values[index], self.kind)

    def reshape(self, *leading: int) -> Halves:
        """The same values with other leading axes."""
        return Halves(self.values.reshape(*leading, self.values.shape[-1]), self.kind)


class Tensor(Protocol):
    """One tensor in a file. It may also have what `compact` asks for."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape: (out, in) for a matrix, (experts, out, in) for stacked experts."""

    def dense(self) -> F32:
        """All values as float32."""

    def matrix(self, index: int) -> F32:
        """One matrix of a stacked tensor as float32; the others are not expanded."""

    def affine(self) -> AffineCodes | None:
        """The values as they are stored, if that is a form MLX can multiply with; None otherwise. Nothing is lost."""


class TensorSource(Protocol):
    """The tensors of one model."""

    where: str  # the file or folder, for messages

    def find(self, name: str) -> Tensor | None:
        """The tensor of that official name, or None."""

    def find_experts(self, layer: int, part: str) -> Tensor | None:
        """Routed experts of a layer, stacked. part: w1 (gate), w3 (up) or w2 (down)."""

    def release(self) -> None:
        """Give back the memory of file pages that were read; they are read again when needed."""


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

    def matrix(self, index: int) -> F32:
        """See Tensor."""
        return np.ascontiguousarray(self.values[index], dtype=np.float32)

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

    def matrix(self, index: int) -> F32:
        """See Tensor."""
        c = self.codes
        return AffineCodes(c.codes[index], c.scales[index], c.biases[index], c.group_size, c.bits).dense()

    def affine(self) -> AffineCodes | None:
        """See Tensor."""
        return self.codes


@dataclass(frozen=True, slots=True)
class StackedTensor:
    """Tensors of one shape as one with a new first axis."""

    tensors: tuple[Tensor, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """See Tensor."""
        return (len(self.tensors), *self.tensors[0].shape)

    def dense(self) -> F32:
        """See Tensor."""
        return np.stack([tensor.dense() for tensor in self.tensors])

    def matrix(self, index: int) -> F32:
        """See Tensor."""
        return self.tensors[index].dense()

    def affine(self) -> AffineCodes | None:
        """See Tensor. Quantised if all are, in one way."""
        found = [codes for tensor in self.tensors if (codes := tensor.affine()) is not None]
        if len(found) < len(self.tensors) or len({(codes.group_size, codes.bits) for codes in found}) > 1:
            return None
        return AffineCodes(
            np.stack([codes.codes for codes in found]),
            np.stack([codes.scales for codes in found]),
            np.stack([codes.biases for codes in found]),
            found[0].group_size,
            found[0].bits,
        )

    def compact(self) -> BlockFloats | Halves | None:
        """See the function. Compact if all are, in one way."""
        found = [compact(tensor) for tensor in self.tensors]
        floats = [one for one in found if isinstance(one, BlockFloats)]
        if len(floats) == len(found) and len({one.bits for one in floats}) == 1:
            codes, scales = np.stack([one.codes for one in floats]), np.stack([one.scales for one in floats])
            return BlockFloats(codes, scales, floats[0].bits)
        halves = [one for one in found if isinstance(one, Halves)]
        if len(halves) == len(found) and len({one.kind for one in halves}) == 1:
            return Halves(np.stack([one.values for one in halves]), halves[0].kind)
        return None


@dataclass(frozen=True, slots=True)
class CompactTensor:
    """Small floats or halves as a tensor."""

    values: BlockFloats | Halves

    @property
    def shape(self) -> tuple[int, ...]:
        """See Tensor."""
        if isinstance(self.values, Halves):
            return self.values.values.shape
        return (*self.values.scales.shape[:-1], self.values.scales.shape[-1] * 32)

    def dense(self) -> F32:
        """See Tensor."""
        return self.values.dense()

    def matrix(self, index: int) -> F32:
        """See Tensor."""
        return self.values.at(index).dense()

    def affine(self) -> AffineCodes | None:
        """See Tensor."""
        return None

    def compact(self) -> BlockFloats | Halves | None:
        """See the function."""
        return self.values


def compact(tensor: Tensor) -> BlockFloats | Halves | None:
    """A tensor's values as small floats or halves, if it is stored so; bit for bit. None otherwise."""
    own = getattr(tensor, "compact", None)
    found: BlockFloats | Halves | None = None if own is None else own()
    return found


def regroup(tensor: Tensor, *leading: int) -> Tensor:
    """The same values with other leading axes; stays quantised, and on the device if it is made there."""
    own = getattr(tensor, "regroup", None)
    if own is not None:
        regrouped: Tensor = own(*leading)
        return regrouped
    codes = tensor.affine()
    if codes is not None:
        return AffineTensor(codes.reshape(*leading))
    floats = compact(tensor)
    if floats is not None:
        return CompactTensor(floats.reshape(*leading))
    return HostTensor(tensor.dense().reshape(*leading, tensor.shape[-1]))


def release(mapped: mmap.mmap) -> None:
    """Drop a mapped file's pages from this process's memory; nothing is lost, the mapping is read-only."""
    if hasattr(mapped, "madvise"):  # not on Windows
        mapped.madvise(mmap.MADV_DONTNEED)


def need(source: TensorSource, name: str, shape: tuple[int, ...]) -> Tensor:
    """The named tensor; raises ModelError if it is missing or has another shape."""
    return _checked(source, name, source.find(name), shape)


def need_experts(source: TensorSource, layer: int, part: str, shape: tuple[int, ...]) -> Tensor:
    """The stacked experts of a layer; raises ModelError if they are missing or have another shape."""
    tensor = source.find_experts(layer, part)
    name = f"layers.{layer}.ffn.experts.*.{part}"
    if tensor is not None and tensor.shape[0] < shape[0] and tensor.shape[1:] == shape[1:]:
        name, tensor = name.replace("*", str(tensor.shape[0])), None
    return _checked(source, name, tensor, shape)


def _checked(source: TensorSource, name: str, tensor: Tensor | None, shape: tuple[int, ...]) -> Tensor:
    if tensor is None:
        raise ModelError(f"{source.where}: tensor {name} is missing; is the download complete?")
    if tensor.shape != shape:
        raise ModelError(f"{source.where}: tensor {name} has shape {tensor.shape}, the config asks for {shape}")
    return tensor
