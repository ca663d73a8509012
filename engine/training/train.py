"""Train dsv4-nano within a time budget on one CUDA GPU (or, for a try, a few steps on a CPU).

Four phases by share of the time: short sequences; longer ones while the indexer learns from the attention it should
predict; then the indexer's selection and the engine's rounding of stored rows switched on; last, 16k-token sequences.
The whole step (forward, backward, optimiser) is one CUDA graph per phase. The model is exported after each phase.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from corpus import load_corpus
from data import Batches, load_streams
from evaluate import bits_per_byte, samples, score, suite, summary
from export import save
from geometry import Geometry
from model import Mode, Nano, compile_pointwise
from optim import Optimizer
from tokenizers import Tokenizer
from torch import Tensor

BEGUN = time.monotonic()


def say(*parts: object) -> None:
    """Print with the seconds since the start."""
    print(f"[{time.monotonic() - BEGUN:6.1f}]", *parts, flush=True)


@dataclass(frozen=True, slots=True)
class Phase:
    """A stretch of training: until which share of the time, sequence length, sequences per step, and what is on."""

    until: float
    length: int
    batch: int
    mode: Mode


def phases(dtype: torch.dtype, tokens: int) -> list[Phase]:
    """Return the four phases; every step has the same number of tokens, so compiled functions keep their shapes."""
    return [
        Phase(0.42, 1024, tokens // 1024, Mode(dtype, sparse=False)),
        Phase(0.74, 2048, tokens // 2048, Mode(dtype, sparse=False, index_loss_stride=8)),
        Phase(0.89, 2048, tokens // 2048, Mode(dtype, sparse=True, rounding=True, index_loss_stride=8)),
        Phase(1.0, 16384, tokens // 16384, Mode(dtype, sparse=True, rounding=True, index_loss_stride=8)),
    ]


class Step:
    """One optimiser step on a fixed input buffer, replayed as a CUDA graph where there is one."""

    def __init__(self, model: Nano, optimizer: Optimizer, phase: Phase, device: torch.device) -> None:
        self.model, self.optimizer, self.phase = model, optimizer, phase
        self.tokens = torch.zeros((phase.batch, phase.length + 1), dtype=torch.long, device=device)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.gates = [layer.ffn.gate for layer in model.layers if not layer.ffn.gate.hashed]

    def compute(self) -> tuple[Tensor, Tensor, Tensor]:
        """Run forward, backward and update; return per-sequence loss, indexer loss and gradient norm."""
        logits, index_loss = self.model(self.tokens[:, :-1], self.phase.mode)
        target = self.tokens[:, 1:]
        loss = F.cross_entropy(logits.float().flatten(0, 1), target.flatten(), reduction="none").view_as(target).mean(1)
        (loss.mean() + index_loss).backward()
        norm = self.optimizer.step()
        with torch.no_grad():
            for gate in self.gates:  # push routing towards even use without touching the loss
                gate.bias.add_(1e-3 * torch.sign(1 / gate.g.experts - gate.load))
        return loss.detach(), index_loss.detach(), norm.detach()

    def clear(self) -> None:
        """Drop gradients."""
        for p in self.model.parameters():
            p.grad = None

    def capture(self) -> None:
        """Record the step; gradients then live in the graph's own memory and are overwritten by each replay."""
        self.clear()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.outputs = self.compute()

    def __call__(self) -> tuple[Tensor, Tensor, Tensor]:
        """Do one step."""
        if self.graph:
            self.graph.replay()
            return self.outputs
        self.clear()
        return self.compute()


def rate(share: float, step: int) -> float:
    """Return the learning rate as a share of its peak: short warm-up, flat, then linear to nearly nothing."""
    return min(1.0, (step + 1) / 60) * max(0.02, min(1.0, (1 - share) / 0.6))


def main() -> None:
    """Train, export, and print a short evaluation."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("out", type=Path, help="folder for the model, log.jsonl and report.json")
    parser.add_argument("--until", type=float, default=540, help="seconds after the start at which training ends")
    parser.add_argument("--tokens", type=int, default=32768, help="tokens per step, a multiple of 16384")
    parser.add_argument("--optimizer", choices=("muon", "adamw"), default="muon")
    parser.add_argument("--python-bytes", type=int, default=80_000_000)
    parser.add_argument("--episodes", type=int, default=32_000)
    parser.add_argument("--workers", type=int, default=14)
    parser.add_argument("--steps", type=int, help="stop each phase after so many steps (for a try)")
    parser.add_argument("--no-compile", action="store_true")
    args = parser.parse_args()
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(0)
    args.out.mkdir(parents=True, exist_ok=True)

    corpus = load_corpus(args.corpus, args.python_bytes)
    sizes = {s: round(sum(len(t.encode()) for t in texts) / 1e6, 1) for s, texts in corpus.training.items()}
    say("corpus MB", sizes)
    streams = load_streams(corpus, args.tokenizer, args.episodes, args.workers, device)
    say("tokens M", {s: round(len(v.tokens) / 1e6, 2) for s, v in streams.items()})
    batches = Batches(streams, seed=1)
    tokenizer = Tokenizer.from_file(str(args.tokenizer))
    model = Nano(Geometry()).to(device)
    optimizer = Optimizer(model, kind=args.optimizer)
    say(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, torch {torch.__version__}")
    if cuda and not args.no_compile:
        compile_pointwise()

    log = (args.out / "log.jsonl").open("w")
    begun, step, n_tokens = time.monotonic(), 0, 0
    budget = args.until - (begun - BEGUN)
    share = 0.0
    for number, phase in enumerate(phases(torch.bfloat16 if cuda else torch.float32, args.tokens)):
        do = Step(model, optimizer, phase, device)
        entered, first = time.monotonic(), step
        while True:
            share = (time.monotonic() - begun) / budget
            if share >= phase.until or (args.steps and step - first >= args.steps):
                break
            optimizer.set_rate(rate(share, step))
            tokens, sources = batches.draw(phase.batch, phase.length)
            do.tokens.copy_(tokens)
            if cuda and step - first == 3:  # the first steps compiled everything; capturing runs nothing
                do.capture()
                say(f"phase {number} captured, {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")
                entered, first_timed = time.monotonic(), step
            loss, index_loss, norm = do()
            step += 1
            n_tokens += tokens.numel() - phase.batch
            if step % 10 == 0 or args.steps:
                rows = loss.tolist()
                by_source: dict[str, list[float]] = {}
                for source, value in zip(sources, rows, strict=True):
                    by_source.setdefault(batches.names[source], []).append(value)
                record = {
                    "step": step,
                    "seconds": round(time.monotonic() - begun, 2),
                    "tokens": n_tokens,
                    "phase": number,
                    "loss": sum(rows) / len(rows),
                    "index_loss": index_loss.item(),
                    "norm": norm.item(),
                    "by_source": {s: sum(v) / len(v) for s, v in by_source.items()},
                }
                log.write(json.dumps(record) + "\n")
                if step % 100 == 0 or step in (10, 30) or args.steps:
                    log.flush()
                    mean = sum(rows) / len(rows)
                    say(f"step {step} loss {mean:.3f} index {index_loss.item():.3f} norm {norm.item():.2f}")
        if cuda:
            torch.cuda.synchronize()
            if step - first > 4:
                seconds = (time.monotonic() - entered) / (step - first_timed)
                say(f"phase {number}: {seconds * 1e3:.1f} ms a step, {args.tokens / seconds / 1e3:.0f}k tokens/s")
        do.graph = None
        del do
        size = save(model, args.out / "model", args.tokenizer)
        say(f"phase {number} done: step {step}, {n_tokens / 1e6:.1f} M tokens, exported {size / 1e6:.2f} MB")
    log.close()

    compile_pointwise(False)
    model.eval()
    mode = Mode(torch.bfloat16 if cuda else torch.float32, rounding=True)
    bits = {s: round(bits_per_byte(model, tokenizer, t, mode, limit=16), 3) for s, t in corpus.held_out.items()}
    say("bits per byte, rounding on", bits)
    say("single calls", summary(score(model, suite(tokenizer, corpus.lexicon, with_schemas=False), mode)))
    if not args.steps:
        for text in samples(model, tokenizer, mode):
            print("-----", text, sep="\n", flush=True)
    say("end")


if __name__ == "__main__":
    main()
