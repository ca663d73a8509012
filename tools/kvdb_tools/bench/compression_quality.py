"""What compression costs: a model's next-token distributions over held-out text, beside those of a reference.

The text ships with the tools (data/held_out.jsonl.xz, made by engine/training/samples.py): stretches that dsv4-nano
never saw, two from each source, and others that it did see, for calibrating. Every position of every stretch counts.
"""

from __future__ import annotations

import json
import lzma
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from kvdb_engine.model import Model, empty_layers
from kvdb_engine.packing import F32
from kvdb_engine.tokenizer import Tokenizer

TEXTS = Path(__file__).parent.parent / "data" / "held_out.jsonl.xz"
_CHUNK = 256


@dataclass(slots=True)
class Quality:
    """Sums over positions. kl: nats to the reference; agreeing: positions with its best token; bits: of the text."""

    positions: int = 0
    kl: float = 0.0
    agreeing: int = 0
    bits: float = 0.0
    text_bytes: int = 0

    @property
    def mean_kl(self) -> float:
        """Nats a token."""
        return self.kl / self.positions

    @property
    def agreement(self) -> float:
        """Share of positions."""
        return self.agreeing / self.positions

    @property
    def bits_per_byte(self) -> float:
        """Of UTF-8 text."""
        return self.bits / self.text_bytes


def texts(use: str) -> list[str]:
    """The stretches of text for `held-out` or `calibration`."""
    with lzma.open(TEXTS, "rt", encoding="utf-8") as file:
        records = [json.loads(line) for line in file]
    return [record["text"] for record in records if record["use"] == use]


def sequences(tokenizer: Tokenizer, n_texts: int, length: int) -> list[npt.NDArray[np.uint32]]:
    """Held-out stretches from all over the sources as ids, each behind BOS and at most `length` long."""
    known = texts("held-out")
    chosen = [known[number * len(known) // n_texts] for number in range(n_texts)]
    return [np.array([tokenizer.bos_id, *tokenizer.encode(text)][:length], np.uint32) for text in chosen]


def log_probabilities(model: Model, ids: npt.NDArray[np.uint32]) -> F32:
    """(T, vocab) log-probabilities after each token of one stretch, from an empty state."""
    layers, found = empty_layers(model.ops, model.config), []
    for first in range(0, len(ids), _CHUNK):
        layers, logits = model.forward(layers, ids[first : first + _CHUNK], first, every=True)
        found.append(model.ops.host(logits))
    values = np.concatenate(found)
    values -= values.max(axis=-1, keepdims=True)
    values -= np.log(np.exp(values).sum(axis=-1, keepdims=True))
    return values


def compare(
    reference: Model, models: Mapping[str, Model], tokenizer: Tokenizer, stretches: Sequence[npt.NDArray[np.uint32]]
) -> dict[str, Quality]:
    """Quality of each model, and under "reference" of the reference."""
    found = {name: Quality() for name in ("reference", *models)}
    for ids in stretches:
        wanted = log_probabilities(reference, ids)
        for name, quality in found.items():
            ours = wanted if name == "reference" else log_probabilities(models[name], ids)
            quality.positions += len(ids)
            quality.kl += float((np.exp(wanted) * (wanted - ours)).sum(dtype=np.float64))
            quality.agreeing += int((wanted.argmax(-1) == ours.argmax(-1)).sum())
            quality.bits -= float(ours[np.arange(len(ids) - 1), ids[1:]].sum(dtype=np.float64)) / float(np.log(2))
            quality.text_bytes += len(tokenizer.decode_bytes(ids[1:].tolist()))
    return found
