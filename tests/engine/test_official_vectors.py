"""Vectors of ds4's format: made from a model here they pass on it, and wrong ones fail."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from kvdb_engine.chat import render_chat, segment_ids
from kvdb_engine.engine import Engine
from kvdb_engine.errors import ModelError
from kvdb_engine.official_vectors import Case, Step, read_vectors, run_case
from kvdb_engine.sampling import top

PROMPTS = {"sum": "What is 12 + 30?", "code": "Write a loop.\n"}


def write(folder: Path, engine: Engine, *, shift: float = 0.0) -> None:
    """Vectors of this engine's own greedy continuation; shift: added to every log-probability."""
    (folder / "prompts").mkdir(parents=True)
    lines = ["# vectors", ""]
    tokenizer = engine.info.tokenizer
    for name, prompt in PROMPTS.items():
        (folder / "prompts" / f"{name}.txt").write_text(prompt)
        lines.append(f"case {name} 4096 4 tests/test-vectors/prompts/{name}.txt")
        state = engine.new_state()
        ids = segment_ids(tokenizer, render_chat([{"role": "user", "content": prompt}]))
        for _ in engine.prefill(state, np.asarray(ids, np.uint32)):
            pass
        for step in range(4):
            best = top(state.logits, 3)
            lines.append(f"step {step} {tokenizer.token_bytes(best[0][0]).hex()} {len(best)}")
            lines += [f"top {tokenizer.token_bytes(token).hex()} {logprob + shift}" for token, _, logprob in best]
            engine.step(state, best[0][0])
        lines.append("end")
    (folder / "official.vec").write_text("\n".join(lines))


def test_own_vectors_pass(nano: Engine, tmp_path: Path) -> None:
    write(tmp_path, nano)
    cases = read_vectors(tmp_path)
    assert [(case.name, case.context, len(case.steps)) for case in cases] == [("sum", 4096, 4), ("code", 4096, 4)]
    results = [result for case in cases for result in run_case(nano, case)]
    assert len(results) == 8 and all(result.is_passed for result in results)
    assert max(result.largest_gap for result in results) < 1e-4


def test_wrong_ones_fail(nano: Engine, tmp_path: Path) -> None:
    write(tmp_path, nano, shift=4.5)
    results = [result for case in read_vectors(tmp_path) for result in run_case(nano, case)]
    assert not any(result.is_passed for result in results)
    piece = nano.info.tokenizer.token_bytes(nano.info.tokenizer.encode("z")[0])
    (result,) = run_case(nano, Case("x", 1, "hello", [Step(piece, ((piece, -0.1),))]))
    assert not result.is_passed and result.chosen != piece


def test_files_of_the_official_api_are_read() -> None:
    folder = Path(__file__).parent.parent / "vectors" / "ds4" / "official-vectors"
    cases = {case.name: case for case in read_vectors(folder)}
    assert len(cases) == 5 and all(case.steps for case in cases.values())
    assert b"".join(step.token for step in cases["short_italian_fact"].steps) == b"Ada Lovelace"


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("what", "line 1: unexpected line"),
        ("case a 1 1 none.txt", "line 1: prompt file none.txt is missing"),
        ("\nstep 0 zz 1", "line 2: non-hexadecimal"),
        ("step 0 41 1\ntop 41 0", "line 2: "),
    ],
)
def test_bad_files_are_named(tmp_path: Path, text: str, match: str) -> None:
    (tmp_path / "official.vec").write_text(text)
    with pytest.raises(ModelError, match=match):
        read_vectors(tmp_path)


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"official\.vec: unreadable"):
        read_vectors(tmp_path / "none")
