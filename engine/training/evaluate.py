"""Measure an exported folder: bits per byte on held-out text, and tool calls on held-out prompts.

A tool call counts when it is exactly right. Two figures need no sampling: greedy success (every token of the right
answer is the most likely one) and the exact probability of writing the right answer at temperature 1. The suite of
200 single calls is also sampled, once, with a confidence interval.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path

import episodes
import torch
import torch.nn.functional as F
from chatml import CALLS_END, EOS, Conversation, render
from corpus import HELD_OUT_SEED, Corpus, load_corpus
from export import load
from model import Mode, Nano
from tokenizers import Tokenizer

FAMILIES = ("calc", "story", "write", "read", "recall", "sum", "copy", "chain")


@dataclass(frozen=True, slots=True)
class Case:
    """One step to get right: the family, the prompt's and the right answer's token ids."""

    family: str
    prompt: tuple[int, ...]
    answer: tuple[int, ...]


def cases(conversation: Conversation, tokenizer: Tokenizer, *, only_first: bool = False) -> list[Case]:
    """Return the scored steps of a conversation, each behind its true context."""
    rendered = render(conversation)
    found = [
        Case(
            family,
            tuple(tokenizer.encode(rendered.text[:start]).ids),
            tuple(tokenizer.encode(rendered.text[start:end]).ids),
        )
        for family, start, end in rendered.spans
    ]
    return found[:1] if only_first else found


@torch.no_grad()
def bits_per_byte(
    model: Nano, tokenizer: Tokenizer, texts: list[str], mode: Mode, *, length: int = 2048, limit: int = 60
) -> float:
    """Return bits per byte over up to ``limit`` sequences, each of which starts with BOS and no other context."""
    device = next(model.parameters()).device
    ids = [i for e in tokenizer.encode_batch([text + EOS for text in texts]) for i in e.ids]
    rows = [[0, *ids[a : a + length]] for a in range(0, len(ids) - length, length)][:limit]
    bits, n_bytes = 0.0, 0
    for a in range(0, len(rows), 8):
        x = torch.tensor(rows[a : a + 8], device=device)
        logits, _ = model(x[:, :-1], mode)
        bits += F.cross_entropy(logits.float().flatten(0, 1), x[:, 1:].flatten(), reduction="sum").item() / math.log(2)
        n_bytes += sum(len(tokenizer.decode(row[1:], skip_special_tokens=False).encode()) for row in rows[a : a + 8])
    return bits / max(n_bytes, 1)


@torch.no_grad()
def score(model: Nano, wanted: list[Case], mode: Mode) -> list[tuple[str, bool, float]]:
    """Return (family, greedy success, probability of success at temperature 1) of each case."""
    device = next(model.parameters()).device
    out: list[tuple[str, bool, float]] = []
    order = sorted(wanted, key=lambda c: len(c.prompt) + len(c.answer))
    for a in range(0, len(order), 32):
        part = order[a : a + 32]
        longest = max(len(c.prompt) + len(c.answer) for c in part)
        x = torch.zeros((len(part), -(-longest // 128) * 128), dtype=torch.long)
        for i, c in enumerate(part):
            x[i, : len(c.prompt) + len(c.answer)] = torch.tensor(c.prompt + c.answer)
        hidden, _ = model.hidden(x.to(device), mode)
        for i, c in enumerate(part):
            span = slice(len(c.prompt) - 1, len(c.prompt) + len(c.answer) - 1)
            logp = model.head(hidden[i, span]).float().log_softmax(-1)
            right = torch.tensor(c.answer, device=device)
            greedy = bool((logp.argmax(-1) == right).all())
            out.append((c.family, greedy, math.exp(logp.gather(1, right[:, None]).sum().item())))
    return out


@torch.no_grad()
def sample(
    model: Nano, prompts: list[tuple[int, ...]], mode: Mode, stop: list[tuple[int, ...]], *, temperature: float,
    seed: int, n_new: int,
) -> list[list[int]]:  # fmt: skip
    """Continue every prompt until it ends with one of the stop sequences; whole forward passes, no cache."""
    device = next(model.parameters()).device
    generator = torch.Generator(device=device).manual_seed(seed)
    out: list[list[int]] = [[] for _ in prompts]
    live = list(range(len(prompts)))
    for _ in range(n_new):
        longest = max(len(prompts[i]) + len(out[i]) for i in live)
        x = torch.zeros((len(live), -(-longest // 128) * 128), dtype=torch.long)
        last = []
        for row, i in enumerate(live):
            ids = [*prompts[i], *out[i]]
            x[row, : len(ids)] = torch.tensor(ids)
            last.append(len(ids) - 1)
        hidden, _ = model.hidden(x.to(device), mode)
        logits = model.head(hidden[torch.arange(len(live)), torch.tensor(last)]).float()
        if temperature > 0:
            ids = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)[:, 0].tolist()
        else:
            ids = logits.argmax(-1).tolist()
        for i, token in zip(live, ids, strict=True):
            out[i].append(token)
        live = [i for i in live if not any(tuple(out[i][-len(s) :]) == s for s in stop)]
        if not live:
            break
    return out


def wilson(hits: int, n: int) -> tuple[float, float]:
    """Return the 95 % Wilson interval of a proportion."""
    z = 1.96
    p = hits / n
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return middle - half, middle + half


def suite(tokenizer: Tokenizer, lexicon: list[str], *, with_schemas: bool, n: int = 200) -> list[Case]:
    """Return n held-out single tool-call prompts, the same number of each of the five single-call families."""
    found = []
    for i in range(n):
        family = list(episodes.SINGLE)[i % len(episodes.SINGLE)]
        conversation = episodes.single(HELD_OUT_SEED + i, family, with_schemas=with_schemas, lexicon=lexicon)
        found += cases(conversation, tokenizer, only_first=True)
    return found


def steps(tokenizer: Tokenizer, lexicon: list[str], *, with_schemas: bool, n: int = 60) -> list[Case]:
    """Return every scored step of n held-out episodes of each family, answers included."""
    found = []
    for family in FAMILIES:
        for i in range(n):
            seed = HELD_OUT_SEED + 10_000 + i
            found += cases(episodes.single(seed, family, with_schemas=with_schemas, lexicon=lexicon), tokenizer)
    return found


def whole_chains(
    model: Nano, tokenizer: Tokenizer, mode: Mode, *, n_steps: int, n: int = 40, with_schemas: bool = False
) -> dict[str, float]:
    """Return how often all tool calls of a chain of ``n_steps`` are right, greedily and at temperature 1."""
    greedy, t1 = 0.0, 0.0
    for i in range(n):
        conversation = episodes.chain(HELD_OUT_SEED + 20_000 + i, n_steps, with_schemas=with_schemas)
        scores = score(model, [c for c in cases(conversation, tokenizer) if c.family == "chain"], mode)
        greedy += all(g for _, g, _ in scores) / n
        t1 += math.prod(p for _, _, p in scores) / n
    return {"n": n, "greedy": round(greedy, 4), "t1": round(t1, 4)}


def summary(scores: list[tuple[str, bool, float]]) -> dict[str, dict[str, float]]:
    """Return per family: number of steps, greedy success, success at temperature 1."""
    table: dict[str, dict[str, float]] = {}
    for family in [*dict.fromkeys(f for f, _, _ in scores), "all"]:
        part = [(g, p) for f, g, p in scores if family in (f, "all")]
        table[family] = {
            "n": len(part),
            "greedy": round(sum(g for g, _ in part) / len(part), 4),
            "t1": round(sum(p for _, p in part) / len(part), 4),
        }
    return table


def measure(
    model: Nano, tokenizer: Tokenizer, corpus: Corpus, mode: Mode, *, n_samples: int = 200
) -> dict[str, object]:
    """Return all measurements, rounding on and off."""
    report: dict[str, object] = {}
    for label, rounding in (("on", True), ("off", False)):
        m = replace(mode, rounding=rounding, sparse=True, index_loss_stride=0)
        part: dict[str, object] = {
            "bits_per_byte": {
                s: round(bits_per_byte(model, tokenizer, t, m), 4) for s, t in sorted(corpus.held_out.items())
            }
        }
        for name, schemas in (("plain", False), ("with_schemas", True)):
            part[f"single_{name}"] = summary(score(model, suite(tokenizer, corpus.lexicon, with_schemas=schemas), m))
            part[f"steps_{name}"] = summary(score(model, steps(tokenizer, corpus.lexicon, with_schemas=schemas), m))
        part["whole_chains"] = {k: whole_chains(model, tokenizer, m, n_steps=k) for k in (2, 4, 8, 12)}
        report[f"rounding_{label}"] = part
    m = replace(mode, rounding=True, sparse=True, index_loss_stride=0)
    stop = [(1,), tuple(tokenizer.encode(CALLS_END).ids)]
    for name, schemas in (("plain", False), ("with_schemas", True)):
        wanted = suite(tokenizer, corpus.lexicon, with_schemas=schemas, n=n_samples)
        written = sample(model, [c.prompt for c in wanted], m, stop, temperature=1.0, seed=11, n_new=120)
        hits = sum(
            tokenizer.decode(w, skip_special_tokens=False)
            == tokenizer.decode(list(c.answer), skip_special_tokens=False)
            for w, c in zip(written, wanted, strict=True)
        )
        report[f"sampled_{name}"] = {"n": len(wanted), "hits": hits, "interval": wilson(hits, len(wanted))}
    return report


def samples(model: Nano, tokenizer: Tokenizer, mode: Mode) -> list[str]:
    """Return a few continuations at temperature 0.7, to look at."""
    prompts = [
        "In the beginning God created",
        "Don Abbondio",
        "def binary_search(items, target):\n",
        "SQLite is a",
        "<｜User｜>Hello!<｜Assistant｜></think>",
        "<｜User｜>Start with 17; add 25; multiply by 3; write it to note total; subtract 8.<｜Assistant｜></think>",
    ]
    ids = [(0, *tokenizer.encode(p).ids) for p in prompts]
    written = sample(model, ids, mode, [(1,)], temperature=0.7, seed=3, n_new=120)
    return [p + tokenizer.decode(w, skip_special_tokens=False) for p, w in zip(prompts, written, strict=True)]


def main() -> None:
    """Measure a folder and print the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--python-bytes", type=int, default=80_000_000)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--float32", action="store_true")
    parser.add_argument("--n-samples", type=int, default=200)
    args = parser.parse_args()
    tokenizer = Tokenizer.from_file(str(args.folder / "tokenizer.json"))
    model = load(args.folder).to(args.device).eval()
    mode = Mode(dtype=torch.float32 if args.float32 else torch.bfloat16, rounding=True)
    corpus = load_corpus(args.corpus, args.python_bytes)
    report = measure(model, tokenizer, corpus, mode, n_samples=args.n_samples)
    print(json.dumps(report, indent=1))
    for text in samples(model, tokenizer, mode):
        print("-----", text, sep="\n")
    if args.out:
        args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
