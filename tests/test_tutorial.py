"""Every command of docs/tutorial.md is run in order against one daemon, and must end well."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from kvdb_tools.daemon import Daemon

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```(session|python)\n(.*?)^```", re.MULTILINE | re.DOTALL)
BOOK_CHARACTERS = 8000


def blocks() -> list[tuple[str, str]]:
    """(kind, text) of each block that is run."""
    return BLOCK.findall((ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8"))


def run_line(line: str, daemon: Daemon) -> str:
    """Run one shell line with the tutorial's port and directory replaced by the test's; returns its output."""
    if line == "kill -9 DAEMON":
        daemon.kill()
        return "killed"
    if line == "make serve":
        return f"{daemon.start()} s"
    line, _, source = line.partition(" < ")
    words = [word.replace("kvdb-data", str(daemon.directory)) for word in shlex.split(line)]
    program = Path(sysconfig.get_path("scripts")) / words[0]
    options = ["-p", str(daemon.port)] if words[0] == "kvdb-cli" else []
    # The beginning of the book is enough to see that the line works.
    stdin = (ROOT / source).read_text()[:BOOK_CHARACTERS].encode() if source else b""
    done = subprocess.run([program, *options, *words[1:]], input=stdin, capture_output=True, check=False)
    assert done.returncode == 0, f"{line}\n{done.stdout.decode()}{done.stderr.decode()}"
    return done.stdout.decode(errors="replace")


def test_the_tutorial_works(tmp_path: Path) -> None:
    found = blocks()
    assert len(found) > 10
    with Daemon(tmp_path / "data") as daemon:
        for kind, text in found:
            if kind == "python":
                code = text.replace("6374", str(daemon.port))
                done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
                assert done.returncode == 0, code + done.stderr
                assert done.stdout.strip()
                continue
            for line in text.splitlines():
                out = run_line(line, daemon)
                assert out.strip() or "SHUTDOWN" in line, line


@pytest.mark.parametrize("word", ["PREFILL", "SNAPSHOT", "GENERATE", "REWIND", "FORK", "SAMPLE", "RESTORE", "STREAM"])
def test_the_tutorial_shows(word: str) -> None:
    assert any(word in text for _, text in blocks())
