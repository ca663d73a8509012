"""Train dsv4-nano's tokenizer: byte-level BPE, single digits, control tokens at ids 0 to 6.

Digits stay single so that arithmetic prompts look the same at every length. Needs no GPU; run once, then keep the
file: token ids are part of every stored state.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import episodes
from chatml import SPECIAL, render
from corpus import load_carried, python_sources
from geometry import Geometry
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers


def build(texts: list[str], vocab: int) -> Tokenizer:
    """Train on texts and return a tokenizer with exactly ``vocab`` entries."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab,
            special_tokens=[AddedToken(s, special=True, normalized=False) for s in SPECIAL],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    if tokenizer.get_vocab_size() != vocab:
        raise ValueError(f"the tokenizer has {tokenizer.get_vocab_size()} entries, not {vocab}")
    return tokenizer


def main() -> None:
    """Train on a balanced sample of every source and save tokenizer.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--python-bytes", type=int, default=5_000_000)
    args = parser.parse_args()
    r = random.Random(1)
    documents = load_carried(args.corpus)
    sample: list[str] = []
    for source, texts in documents.items():
        # 2 MB of each source, or all of it: the sources that are upsampled in training count for more here too.
        r.shuffle(texts)
        size = 0
        for text in texts:
            sample.append(text[:2_000_000])
            size += len(sample[-1])
            if size > 2_000_000:
                break
        print(f"{source:16} {size / 1e6:6.2f} MB")
    sample += python_sources(limit=args.python_bytes)
    sample += [render(episodes.episode(10**9 + i)).text for i in range(1500)]
    build(sample, Geometry().vocab).save(str(args.out))


if __name__ == "__main__":
    main()
