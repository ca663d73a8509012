"""Run a model against continuations that the official API gave: ds4's test-vector format.

    case ID CONTEXT STEPS PROMPTFILE
    step I HEX NTOP            the bytes of the token that was chosen
    top HEX LOGPROB            NTOP lines
    end

Prompts are one user turn, without system text and without thinking; decoding is greedy along the official tokens. A
step passes when the most likely token has the official bytes, and every listed token is among the model's 20 most
likely ones with a log-probability within 4.0.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from kvdb_engine.chat import render_chat, segment_ids
from kvdb_engine.engine import Engine
from kvdb_engine.errors import ModelError
from kvdb_engine.sampling import top

N_TOP = 20
LOGPROB_TOLERANCE = 4.0


@dataclass(frozen=True, slots=True)
class Step:
    """One official token: its bytes, and (bytes, logprob) of the listed candidates."""

    token: bytes
    candidates: tuple[tuple[bytes, float], ...]


@dataclass(slots=True)
class Case:
    """One prompt and its continuation."""

    name: str
    context: int
    prompt: str
    steps: list[Step] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class StepResult:
    """How the model did. largest_gap: of the listed log-probabilities; missing: listed, but not in its top 20."""

    case: str
    step: int
    official: bytes
    chosen: bytes
    largest_gap: float
    missing: int

    @property
    def is_passed(self) -> bool:
        """The rule of the module docstring."""
        return self.official == self.chosen and not self.missing and self.largest_gap <= LOGPROB_TOLERANCE


def read_vectors(folder: Path) -> list[Case]:
    """Read `official.vec` and the prompts it names. Raises ModelError naming file and line."""
    path = folder / "official.vec"
    cases: list[Case] = []
    pending: tuple[bytes, list[tuple[bytes, float]], int] | None = None
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ModelError(f"{path}: unreadable: {error}") from error
    for number, line in enumerate(lines, 1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        try:
            match words:
                case ["case", name, context, _steps, file]:
                    prompt = _prompt(folder, file).read_text(encoding="utf-8")
                    cases.append(Case(name, int(context), prompt))
                case ["step", _index, token, count]:
                    pending = (bytes.fromhex(token), [], int(count))
                case ["top", token, logprob] if pending is not None:
                    pending[1].append((bytes.fromhex(token), float(logprob)))
                case ["end"]:
                    pass
                case _:
                    raise ValueError(f"unexpected line {line!r}")
            if pending is not None and len(pending[1]) == pending[2]:
                cases[-1].steps.append(Step(pending[0], tuple(pending[1])))
                pending = None
        except (ValueError, OSError, IndexError) as error:
            raise ModelError(f"{path}, line {number}: {error}") from error
    return cases


def _prompt(folder: Path, name: str) -> Path:
    """The prompt file, which a vector file names relative to its own folder or to a parent."""
    for candidate in (folder / name, folder / "prompts" / Path(name).name):
        if candidate.is_file():
            return candidate
    raise FileNotFoundError(f"prompt file {name} is missing")


def run_case(engine: Engine, case: Case) -> Iterator[StepResult]:
    """Prefill the prompt, then walk along the official tokens. Raises ModelError for a token the tokenizer lacks."""
    tokenizer = engine.info.tokenizer
    by_bytes: dict[bytes, int] = {}
    for token in range(tokenizer.n_tokens):
        by_bytes.setdefault(tokenizer.token_bytes(token), token)
    state = engine.new_state()
    prompt = segment_ids(tokenizer, render_chat([{"role": "user", "content": case.prompt}]))
    for _ in engine.prefill(state, np.asarray(prompt, np.uint32)):
        pass
    for number, step in enumerate(case.steps):
        best = top(state.logits, N_TOP)
        found = {tokenizer.token_bytes(token): logprob for token, _, logprob in best}
        gaps = [abs(found[token] - logprob) for token, logprob in step.candidates if token in found]
        missing = sum(token not in found for token, _ in step.candidates)
        chosen = tokenizer.token_bytes(best[0][0])
        yield StepResult(case.name, number, step.token, chosen, max(gaps, default=0.0), missing)
        if step.token not in by_bytes:
            raise ModelError(f"case {case.name}, step {number}: the tokenizer has no token {step.token!r}")
        engine.step(state, by_bytes[step.token])
