from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

from rich.console import Console

from kvdb_engine.catalog import open_model
from kvdb_tools.demo.report import Act, Check, Report, duration, size, table
from kvdb_tools.demo.text import cut_text, demo_text


def test_the_text_is_long_and_plain() -> None:
    text = demo_text()
    assert text.startswith("CAPITOLO PRIMO")
    assert 40_000 < len(text.encode()) < 60_000
    assert "\r" not in text


def test_a_text_is_cut_at_a_paragraph_and_only_when_it_must() -> None:
    text = "one two three\n\n" * 100
    assert cut_text(text, 500, 500) == text
    shorter = cut_text(text, 500, 250)
    assert text.startswith(shorter)
    assert shorter.endswith("three\n")
    assert 0.4 < len(shorter) / len(text) <= 0.5
    assert len(cut_text("x" * 1000, 1000, 100)) == 95


def test_the_table_shows_what_was_measured() -> None:
    report = Report(n_tokens=9000, prefill_s=2.0)
    report.acts = [Act("FORK", 0.0004, 0, 3 << 20, 0, prefills=3), Act("start", 0.31)]
    out = io.StringIO()
    Console(file=out, width=120).print(table(report))
    shown = out.getvalue()
    for expected in ("9,000 tokens", "FORK", "0.4 ms", "0 B", "3.0 MiB", "6.00 s", "0.31 s"):
        assert expected in shown


def test_a_failed_check_or_none_at_all_is_no_success() -> None:
    assert not Report().is_good
    assert Report(checks=[Check("a", True)]).is_good
    assert not Report(checks=[Check("a", True), Check("b", False)]).is_good
    assert json.loads(json.dumps(Report(checks=[Check("a", True)]).as_dict()))["ok"] is True


def test_numbers_are_rounded_for_people() -> None:
    assert [duration(s) for s in (None, 0.00012, 0.0123, 0.0999, 1.0, 250.0)] == [
        "", "0.12 ms", "12 ms", "0.10 s", "1.00 s", "250 s",
    ]  # fmt: skip
    assert [size(n) for n in (None, 0, 2048, 3 << 20)] == ["", "0 B", "2 KiB", "3.0 MiB"]


DEMO = [sys.executable, "-c", "from kvdb_tools.demo import main; main()", "--json"]


def test_the_text_is_long_enough_for_the_model() -> None:
    text = demo_text()
    tokenizer = open_model("dsv4-nano").tokenizer
    n_tokens = len(tokenizer.encode(text))
    assert n_tokens >= 8000
    assert len(tokenizer.encode(cut_text(text, n_tokens, 10_000))) >= 8000


def test_the_demo_holds() -> None:
    done = subprocess.run(DEMO, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["ok"]
    assert report["tokens"] >= 8000
    names = {check["name"] for check in report["checks"]}
    assert "the tokens are those of the undisturbed run" in names
    assert all(check["holds"] for check in report["checks"])
    # What a reader is shown must be so: a restored state computes nothing, a second SNAPSHOT shares the pages.
    acts = {act["name"]: act for act in report["acts"]}
    assert acts["RESTORE the last snapshot"]["recomputed"] == 0
    assert acts["5 x SNAPSHOT"]["bytes_shared"] > acts["5 x SNAPSHOT"]["bytes_written"]


def test_a_demo_that_cannot_go_on_says_why_and_fails(tmp_path: Path) -> None:
    done = subprocess.run([*DEMO, "--model", str(tmp_path / "none")], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "none" in done.stderr
    (tmp_path / "file").touch()
    assert subprocess.run([*DEMO, "--keep", str(tmp_path)], capture_output=True, check=False).returncode == 2
