"""Client programs and libraries that nobody here wrote, against a running daemon.

Absent ones are skipped; with KVDB_NPM_CLIENTS=required (CI, after `npm ci`) an absent npm package is a failure.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        number: int = sock.getsockname()[1]
    folder = tmp_path_factory.mktemp("clients")
    command = [sys.executable, "-m", "kvdb", "--dir", str(folder), "--port", str(number), "--model", ""]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    for _ in range(500):
        try:
            socket.create_connection(("127.0.0.1", number), timeout=1).close()
            break
        except OSError:
            time.sleep(0.02)
    yield number
    process.terminate()
    process.wait(20)


def run(*command: str) -> str:
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, cwd=HERE)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


def test_redis_py(port: int) -> None:
    assert "all right" in run(sys.executable, "smoke_redis_py.py", str(port))


def test_redis_cli(port: int) -> None:
    if shutil.which("redis-cli") is None or shutil.which("redis-benchmark") is None:
        pytest.skip("redis-tools are not installed")
    assert "all right" in run("sh", "smoke_redis_cli.sh", str(port))


NODE = [
    ("ioredis", "smoke_ioredis.mjs"),
    ("redis", "smoke_node_redis.mjs"),
    ("@valkey/valkey-glide", "smoke_valkey_glide.mjs"),
]


@pytest.mark.parametrize(("package", "program"), NODE)
def test_node(port: int, package: str, program: str) -> None:
    """Needs `npm ci` in tests/clients."""
    if shutil.which("node") is None or not (HERE / "node_modules" / package).is_dir():
        assert os.environ.get("KVDB_NPM_CLIENTS") != "required", f"{package} is not installed"
        pytest.skip(f"node or the npm package {package} is not installed")
    assert "all right" in run("node", program, str(port))
