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


class Tensor(Protocol):
    """One tensor in a file."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape: (out, in) for a matrix, (experts, out, in) for stacked experts."""

    def dense(self) -> F32:
        """All values as float32."""


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
