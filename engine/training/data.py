"""Token streams: tokenises documents and episodes once, holds them on the training device, and draws batches."""

from __future__ import annotations

import random
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import episodes
import numpy as np
import torch
from chatml import BOS, EOS, render
from corpus import Corpus
from tokenizers import Tokenizer
from torch import Tensor

# Share of a batch's sequences by source. The two pieces of prose are small and are seen several times.
SHARES = {
    "episodes": 0.34,
    "python": 0.32,
    "kjv": 0.05,
    "promessi-sposi": 0.04,
    "devil": 0.01,
    "jargon": 0.03,
    "python-doc": 0.08,
    "sqlite-doc": 0.06,
    "postgresql-doc": 0.07,
}


@dataclass(slots=True)
class Stream:
    """One source's tokens. ``starts`` are where sequences may begin; None means anywhere."""

    tokens: Tensor
    starts: Tensor | None = None


def _episode_tokens(job: tuple[int, int, str, list[str], list[str]]) -> list[np.ndarray]:
    first, last, tokenizer_path, lexicon, excerpts = job
    tokenizer = Tokenizer.from_file(tokenizer_path)
    texts = [render(episodes.episode(seed, lexicon, excerpts)).text for seed in range(first, last)]
    return [np.asarray(e.ids, dtype=np.int16) for e in tokenizer.encode_batch(texts)]


def load_streams(
    corpus: Corpus, tokenizer_path: Path, n_episodes: int, workers: int, device: torch.device
) -> dict[str, Stream]:
    """Tokenise everything and move it to the device."""
    streams: dict[str, Stream] = {}
    step = 250
    jobs = [
        (a, min(a + step, n_episodes), str(tokenizer_path), corpus.lexicon, random.Random(a).sample(corpus.excerpts, 8))
        for a in range(0, n_episodes, step)
    ]
    # Episodes first: the tokenizer's own threads do not survive a fork, so nothing may be tokenised before it.
    with ProcessPoolExecutor(workers) as pool:
        parts = [ids for batch in pool.map(_episode_tokens, jobs) for ids in batch]
    starts = np.cumsum([0, *(len(p) for p in parts[:-1])])
    streams["episodes"] = Stream(
        torch.from_numpy(np.concatenate(parts)).to(device), torch.from_numpy(starts).to(device)
    )
    tokenizer = Tokenizer.from_file(str(tokenizer_path))
    for source, texts in corpus.training.items():
        encoded = tokenizer.encode_batch([BOS + text + EOS for text in texts])
        tokens = np.concatenate([np.asarray(e.ids, dtype=np.int16) for e in encoded])
        streams[source] = Stream(torch.from_numpy(tokens).to(device))
    return streams


class Batches:
    """Draws batches: each sequence from one source, conversations always from their beginning."""

    def __init__(self, streams: dict[str, Stream], seed: int) -> None:
        self.names = list(streams)
        self.streams = streams
        self.random = random.Random(seed)
        self.shares = [SHARES[name] for name in self.names]
        self.offset = {}
        at = 0
        for name, stream in streams.items():
            self.offset[name] = at
            at += len(stream.tokens)
        self.tokens = torch.cat([s.tokens for s in streams.values()])
        self.starts = {n: s.starts.cpu() for n, s in streams.items() if s.starts is not None}

    def draw(self, batch: int, length: int) -> tuple[Tensor, list[int]]:
        """Return token ids (batch, length + 1) int64 and the source number of each sequence."""
        # Stratified: the shares hold in every batch as nearly as they can, which keeps the loss curve smooth.
        at = (torch.arange(batch) + self.random.random()) / batch
        borders = torch.tensor(self.shares).cumsum(0) / sum(self.shares)
        sources = torch.searchsorted(borders, at, right=True).clamp_max(len(self.names) - 1).tolist()
        rows = []
        for number in sources:
            name = self.names[number]
            room = len(self.streams[name].tokens) - length - 1
            if name in self.starts:
                start = int(self.starts[name][self.random.randrange(len(self.starts[name]))])
                start = min(start, max(0, room))
            else:
                start = self.random.randrange(max(1, room))
            rows.append(self.offset[name] + start)
        device = self.tokens.device
        index = torch.tensor(rows, device=device)[:, None] + torch.arange(length + 1, device=device)
        tokens = self.tokens[index].long()
        tokens[:, 0] = 0  # every stored or prompted text begins with BOS, so every sequence does too
        return tokens, sources
