"""Write the small files that ship with kvdb, from the corpus the model was trained on.

`held_out.jsonl.xz`: text for measuring the model: some that it never saw ("held-out") and, for calibrating
quantisation, some that it did ("calibration"); one {"use", "source", "text"} a line. `lexicon.txt.xz`: the words that
conversations draw from, so that held-out prompts can be made without the corpus.
"""

from __future__ import annotations

import argparse
import json
import lzma
import random
from pathlib import Path

from corpus import load_corpus

PIECES, PIECE_CHARACTERS = 2, 6000


def pieces(texts: list[str], seed: int) -> list[str]:
    """Return a few stretches of text, each from another document where there are several."""
    drawn = random.Random(seed)
    long_enough = [text for text in texts if len(text) >= PIECE_CHARACTERS] or texts
    chosen = drawn.sample(long_enough, PIECES) if len(long_enough) >= PIECES else long_enough * PIECES
    found = []
    for number, text in enumerate(chosen):
        room = max(0, len(text) - PIECE_CHARACTERS)
        start = room * number // PIECES if len(long_enough) < PIECES else 0
        found.append(text[start : start + PIECE_CHARACTERS])
    return found


def main() -> None:
    """Write both files into a folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("corpus", type=Path, help="corpus.jsonl.xz of collect.py")
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    corpus = load_corpus(args.corpus, 0)
    lines = [
        json.dumps({"use": use, "source": source, "text": text}, ensure_ascii=False)
        for use, documents in (("held-out", corpus.held_out), ("calibration", corpus.training))
        for source in sorted(documents)
        for text in pieces(documents[source], seed=1)
    ]
    args.out.mkdir(parents=True, exist_ok=True)
    for name, text in (("held_out.jsonl.xz", "\n".join(lines)), ("lexicon.txt.xz", "\n".join(corpus.lexicon))):
        (args.out / name).write_bytes(lzma.compress(text.encode() + b"\n", preset=9 | lzma.PRESET_EXTREME))


if __name__ == "__main__":
    main()
