"""Tool calls of the shipped model, made by kvdb's own engine: success on held-out prompts with its interval.

    python engine/training/tool_calls.py [--n 200] [--temperature 1] [--schemas]

Needs only what ships: the model, `lexicon.txt.xz` and the generator of conversations. Prompts come from seeds that
training never used, the same number of each family of single calls; a call counts only if every character is right.
"""

from __future__ import annotations

import argparse
import lzma
import sys
from pathlib import Path

import episodes
import numpy as np
from chatml import CALLS_END, EOS, render
from corpus import HELD_OUT_SEED

from kvdb_engine.catalog import open_model
from kvdb_engine.engine import Engine
from kvdb_engine.sampling import Sampling, sample

LONGEST = 120  # tokens of an answer
LEXICON = Path(__file__).parent / "lexicon.txt.xz"
EXPECTED = (0.80, 0.97)


def wilson(hits: int, n: int) -> tuple[float, float]:
    """Return the 95 % Wilson interval of a proportion."""
    z = 1.96
    p = hits / n
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    return middle - half, middle + half


def prompts(n: int, *, with_schemas: bool) -> list[tuple[str, str, str]]:
    """Return (family, prompt, right answer) of n held-out single tool calls, the same number of each family."""
    lexicon = lzma.decompress(LEXICON.read_bytes()).decode().split()
    found = []
    for number in range(n):
        family = list(episodes.SINGLE)[number % len(episodes.SINGLE)]
        seed = HELD_OUT_SEED + number
        rendered = render(episodes.single(seed, family, with_schemas=with_schemas, lexicon=lexicon))
        _, start, end = rendered.spans[0]
        found.append((family, rendered.text[:start], rendered.text[start:end]))
    return found


def answer(engine: Engine, prompt: str, sampling: Sampling) -> str:
    """Write until the end of a tool block, the end of the turn, or the longest answer."""
    tokenizer = engine.info.tokenizer
    state = engine.new_state()
    for _ in engine.prefill(state, np.array(tokenizer.encode(prompt, special=True), np.uint32)):
        pass
    ids: list[int] = []
    while len(ids) < LONGEST:
        token = sample(state.logits, state.n_tokens, sampling)
        ids.append(token)
        text = tokenizer.decode(ids)
        if token == tokenizer.eos_id or text.endswith(CALLS_END):
            break
        engine.step(state, token)
    return text.removesuffix(EOS)


def main(arguments: list[str] | None = None) -> int:
    """Print the rate of each family and of all; 1 if the interval of all lies outside what is stated."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=200)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=11)
    parser.add_argument("--schemas", action="store_true", help="with the tool section in the prompt")
    args = parser.parse_args(arguments)
    engine = Engine(open_model("dsv4-nano"))
    hits: dict[str, list[bool]] = {}
    for number, (family, prompt, right) in enumerate(prompts(args.n, with_schemas=args.schemas)):
        sampling = Sampling(temperature=args.temperature, min_p=0.0, seed=args.seed + number)
        hits.setdefault(family, []).append(answer(engine, prompt, sampling) == right)
        if sys.stderr.isatty():
            print(f"\r{number + 1} of {args.n}", end="", file=sys.stderr)
    everything = [hit for found in hits.values() for hit in found]
    print(f"temperature {args.temperature:g}, {'with' if args.schemas else 'without'} the tool section")
    for family, found in [*hits.items(), ("all", everything)]:
        low, high = wilson(sum(found), len(found))
        print(
            f"{family:8} {sum(found):4} of {len(found):4}  {sum(found) / len(found):.3f}  95 %: {low:.3f} to {high:.3f}"
        )
    holds = low <= EXPECTED[1] and high >= EXPECTED[0]
    print(f"expected {EXPECTED[0]:.2f} to {EXPECTED[1]:.2f}: {'holds' if holds else 'DOES NOT HOLD'}")
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
