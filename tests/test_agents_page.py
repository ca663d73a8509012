"""Every example of docs/agents.md is run word for word against one daemon, and must end well and say something."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from kvdb_tools.daemon import Daemon, free_port

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```(session|python)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def test_the_page_works(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "agents.md").read_text(encoding="utf-8")
    found = BLOCK.findall(page)
    assert len(found) >= 8
    port = free_port()
    with Daemon(tmp_path / "data", {"http-port": str(port)}) as daemon:
        for kind, text in found:
            if kind == "python":
                # The page's ports are the usual ones; the test's daemon has its own.
                code = text.replace("6374", str(daemon.port)).replace("8374", str(port))
                done = run([sys.executable, "-c", code])
            else:
                _, path = text.split()
                url = f"http://127.0.0.1:{port}" if "http" in path else f"kvdb://127.0.0.1:{daemon.port}"
                done = run([sys.executable, str(ROOT / path), url])
            assert done.returncode == 0, text + done.stderr
            assert done.stdout.strip(), text


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


def test_the_http_agent_computes_only_what_is_new(tmp_path: Path) -> None:
    port = free_port()
    with Daemon(tmp_path / "data", {"http-port": str(port)}):
        done = run([sys.executable, str(ROOT / "examples" / "http_agent.py"), f"http://127.0.0.1:{port}"])
    assert done.returncode == 0, done.stderr
    rows = re.findall(r"prompt +(\d+) tokens, computed +(\d+):", done.stdout)
    assert len(rows) == 8
    assert all(int(computed) < 40 for _, computed in rows[1:]), done.stdout
    assert "The answer is 42." in done.stdout
