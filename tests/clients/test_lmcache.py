"""LMCache keeps its chunks in kvdb. KVDB_LMCACHE_PYTHON names an interpreter that has lmcache; without it: skipped.

Such an interpreter, on a machine without a GPU (lmcache's wheel asks for CUDA packages that these parts never import):

    python -m venv lm && lm/bin/pip install torch            # a CPU build
    lm/bin/pip install --no-deps lmcache
    lm/bin/pip install aiofile aiofiles aiohttp blake3 cachetools cryptography fastapi httptools httpx msgspec numba \\
        nvtx prometheus_client 'opentelemetry-api<=1.40.0' opentelemetry-sdk \\
        'opentelemetry-exporter-prometheus<=0.61b0' \\
        psutil py-cpuinfo pyyaml pyzmq redis requests safetensors sortedcontainers transformers uvicorn \\
        valkey-glide-sync
    KVDB_LMCACHE_PYTHON=lm/bin/python pytest tests/clients/test_lmcache.py -s
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from kvdb_tools.daemon import Daemon

HERE = Path(__file__).parent


def test_lmcache(tmp_path: Path) -> None:
    python = os.environ.get("KVDB_LMCACHE_PYTHON")
    if not python:
        pytest.skip("KVDB_LMCACHE_PYTHON is not set")
    command = [str(Path(python).absolute()), str(HERE / "smoke_lmcache.py")]
    with Daemon(tmp_path / "data", {"model": ""}) as daemon:
        ran = subprocess.run([*command, str(daemon.port)], capture_output=True, text=True, timeout=280, check=False)
    print(ran.stdout)
    assert ran.returncode == 0 and "lmcache: all right" in ran.stdout, ran.stdout + ran.stderr
