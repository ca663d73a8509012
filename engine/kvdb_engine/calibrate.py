"""Quantise routed experts by what they do to calibration text, rather than by their weights alone.

The text runs through the model once, as one chunk. When a layer's experts are reached, each is quantised with the Gram
matrices of the inputs that the text gives it (quantise.py), and the layer's output is computed with the quantised
experts: so every layer is fitted to the inputs it will really have, the mistakes of the layers before it included.

One expert is in memory at a time, and all other weights, in float32. Runs on the processor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kvdb_engine.config import ModelConfig
from kvdb_engine.errors import ModelError
from kvdb_engine.model import Model, empty_layers, load_weights
from kvdb_engine.ops import Array, ExpertWeights
from kvdb_engine.ops_numpy import NumpyOps
from kvdb_engine.packing import F32
from kvdb_engine.quantise import F64, quantise
from kvdb_engine.recipe import PARTS
from kvdb_engine.weights import AffineCodes, TensorSource

# Tokens of calibration text: all are one chunk in memory, and more help little.
MAX_TOKENS = 16_384

# (layer, part) -> (bits, group size); None where the recipe leaves the part alone.
Ways = Callable[[int, str], "tuple[int, int] | None"]


def calibrate(
    config: ModelConfig,
    source: TensorSource,
    ids: Sequence[int],
    ways: Ways,
    scratch: Path,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> dict[tuple[int, str], AffineCodes]:
    """Quantise the routed experts of every layer on these tokens.

    scratch: a folder for the codes, which the result maps: it must outlive the result. progress(experts done, experts).
    Raises ModelError. Returns stacked codes (n_experts, ...) by (layer, part), part being w1 (gate), w3 (up) or w2
    (down).
    """
    ops = _Quantising(config, ways, scratch, progress)
    model = Model(ops, config, load_weights(ops, config, source))
    wanted = np.asarray(ids[: min(MAX_TOKENS, config.context)], np.uint32)
    if wanted.max(initial=0) >= config.vocab:
        raise ModelError(f"{source.where}: its tokenizer has ids beyond the vocabulary of {config.vocab}")
    model.forward(empty_layers(ops, config), wanted, 0, want_logits=False)
    return ops.found


class _Quantising(NumpyOps):
    """numpy, but experts are read when a layer reaches them, quantised, and only then computed with."""

    def __init__(self, config: ModelConfig, ways: Ways, scratch: Path, progress: Callable[[int, int], None]) -> None:
        super().__init__()
        self.found: dict[tuple[int, str], AffineCodes] = {}
        self._ways, self._scratch, self._progress = ways, scratch, progress
        self._layer, self._layers = 0, config.n_layers

    def expert_weights(self, gate: Any, up: Any, down: Any) -> ExpertWeights:
        """The tensors as they are: see the class."""
        return ExpertWeights(gate, up, down)

    def experts(self, weights: ExpertWeights, x: Array, ids: Array, share: Array, limit: float) -> Array:
        """See Ops.experts; called once for each layer, in order."""
        out = np.zeros_like(x)
        codes: dict[str, list[AffineCodes | None]] = {part: [] for part in PARTS}
        n_experts = weights.gate.shape[0]
        for expert in range(n_experts):
            token, slot = np.nonzero(ids == expert)
            mine, weight = x[token], share[token, slot][:, None]
            # An input counts as much as what comes of it does in the sum over experts.
            gram = _gram(mine * weight)
            gate = self._fitted("w1", weights.gate.matrix(expert), gram, codes)
            up = self._fitted("w3", weights.up.matrix(expert), gram, codes)
            middle = self.swiglu(mine @ gate.T, mine @ up.T, limit) * weight
            down = self._fitted("w2", weights.down.matrix(expert), _gram(middle), codes)
            out[token] += middle @ down.T
            self._progress(self._layer * n_experts + expert + 1, self._layers * n_experts)
        for part, found in codes.items():
            whole = [one for one in found if one is not None]
            if whole:
                self.found[self._layer, part] = self._stored(part, whole)
        self._layer += 1
        return out

    def _fitted(self, part: str, values: F32, gram: F64 | None, codes: dict[str, list[AffineCodes | None]]) -> F32:
        """The matrix as it will be; its codes are appended to those of its part."""
        way = self._ways(self._layer, part)
        done = None if way is None else quantise(values, *way, gram)
        codes[part].append(done)
        return values if done is None else done.dense()

    def _stored(self, part: str, codes: Sequence[AffineCodes]) -> AffineCodes:
        """All experts' codes as one, in files: a large model's would not fit in memory."""

        def stored(name: str, arrays: Sequence[npt.NDArray[Any]]) -> npt.NDArray[Any]:
            path = self._scratch / f"{self._layer}.{part}.{name}.npy"
            np.save(path, np.stack(arrays))
            mapped: npt.NDArray[Any] = np.load(path, mmap_mode="r")
            return mapped

        return AffineCodes(
            stored("codes", [one.codes for one in codes]),
            stored("scales", [one.scales for one in codes]),
            stored("biases", [one.biases for one in codes]),
            codes[0].group_size,
            codes[0].bits,
        )


def _gram(inputs: F32) -> F64 | None:
    """X^T X; None for an expert that no token went to."""
    if not len(inputs):
        return None
    gram: F64 = (inputs.T @ inputs).astype(np.float64)
    return gram
