"""/metrics and /healthz."""

from __future__ import annotations

import re
import time
import urllib.error
import urllib.request

import pytest

from .conftest import StartDaemon, free_port

pytest.importorskip("uvicorn")


def fetch(port: int, path: str, **headers: str) -> tuple[int, str]:
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_metrics(start: StartDaemon) -> None:
    port = free_port()
    wire = start(http_port=port).wire()
    wire("SET", "k", "v")
    wire("GET", "nosuch")
    wire("NOSUCH")
    status, text = fetch(port, "/metrics")
    assert status == 200
    lines = text.splitlines()
    shape = re.compile(r'[a-z_]+(\{[a-z]+="[^"]*"(,[a-z]+="[^"]*")*\})? -?[0-9.e+-]+|# (HELP|TYPE) [a-z_]+ .+')
    assert [line for line in lines if not shape.fullmatch(line)] == []
    assert {
        'kvdb_keys{db="0"} 1',
        'kvdb_errors_total{word="ERR"} 1',
        'kvdb_command_calls_total{command="set"} 1',
    } <= set(lines)
    assert "kvdb_keyspace_misses_total 1" in lines and "kvdb_writes_refused 0" in lines
    fetch(port, "/v1/nothing")
    fetch(port, "/v1/models/nothing")
    lines = fetch(port, "/metrics")[1].splitlines()
    assert {
        'kvdb_http_requests_total{path="/metrics",status="200"} 1',
        'kvdb_http_requests_total{path="/v1/models/{name}",status="503"} 1',
        'kvdb_http_requests_total{path="other",status="404"} 1',
    } <= set(lines)
    assert b"total_http_requests:4" in wire("INFO", "stats")[1]
    named = [line.split()[2] for line in lines if line.startswith("# TYPE")]
    assert len(named) == len(set(named)), "each metric is described once, and its samples stand together"


def test_health(start: StartDaemon) -> None:
    port = free_port()
    wire = start(http_port=port, requirepass="pw").wire()
    assert fetch(port, "/healthz") == (200, "ok\n"), "needs no key"
    assert fetch(port, "/metrics")[0] == 401
    assert fetch(port, "/metrics", Authorization="Bearer pw")[0] == 200
    wire("AUTH", "pw")
    wire("CONFIG", "SET", "maxstore", "1")
    until = time.monotonic() + 10
    while fetch(port, "/healthz")[0] == 200 and time.monotonic() < until:
        time.sleep(0.05)
    status, text = fetch(port, "/healthz")
    assert status == 503 and text.startswith("NOSPACE")
