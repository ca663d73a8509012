"""n choices of one long prompt over HTTP: one prefill and n branches, beside one choice and n separate requests."""

from __future__ import annotations

import http.client
import json
import time
from typing import Any

from kvdb_engine.catalog import open_model
from kvdb_tools.bench.scenario import Bars, Result, Settings
from kvdb_tools.daemon import Daemon, free_port

N_CHOICES = 8
ANSWER_TOKENS = 16


def post(connection: http.client.HTTPConnection, path: str, body: dict[str, Any]) -> dict[str, Any]:
    """Send a request and read its JSON. Raises RuntimeError with the server's words."""
    connection.request("POST", path, json.dumps(body), {"content-type": "application/json"})
    response = connection.getresponse()
    found: dict[str, Any] = json.loads(response.read())
    if response.status != 200:
        raise RuntimeError(f"{path}: {response.status} {found['error']['message']}")
    return found


def run(settings: Settings) -> Result:
    """Each measurement has a prompt of its own, so that nothing of it is stored."""
    n_tokens = 2048 if settings.quick else 8192
    tokenizer = open_model(settings.model).tokenizer
    port = free_port()
    result = Result(
        f"{N_CHOICES} choices of {ANSWER_TOKENS} tokens, prompt of {n_tokens:,} tokens",
        ("request", "seconds", "prompt tokens computed"),
    )
    daemon = Daemon(settings.scratch / "kvdb", {"model": settings.model, "http-port": str(port)})

    def ask(connection: http.client.HTTPConnection, name: str, n: int) -> tuple[float, int]:
        ids = tokenizer.encode(f"{name}: the tide came in and the tide went out, and the boats lay still. " * n_tokens)
        asked = {"model": settings.model, "prompt": ids[:n_tokens], "n": n, "max_tokens": ANSWER_TOKENS, "seed": 1}
        began = time.perf_counter()
        usage = post(connection, "/v1/completions", asked)["usage"]
        computed = usage["prompt_tokens"] - usage["prompt_tokens_details"]["cached_tokens"]
        return time.perf_counter() - began, computed

    with daemon:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
        post(connection, "/v1/completions", {"model": settings.model, "prompt": "warm up", "max_tokens": 1})
        single = ask(connection, "one", 1)
        several = ask(connection, "eight", N_CHOICES)
        again = ask(connection, "eight", N_CHOICES)
    result.rows.append(["1 choice", *single])
    result.rows.append([f"{N_CHOICES} choices", *several])
    result.rows.append([f"{N_CHOICES} choices, asked again", *again])
    separate = N_CHOICES * single[0]
    result.rows.append([f"{N_CHOICES} requests without kvdb (computed)", separate, N_CHOICES * single[1]])
    factor = several[0] / single[0]
    result.claims.append((f"{N_CHOICES} choices take {factor:.2f} times as long as one", factor < N_CHOICES / 2))
    result.claims.append((f"their prompt was computed once: {several[1]:,} tokens", several[1] == single[1]))
    result.bars = Bars(
        "seconds",
        ["time"],
        {"1 choice": [single[0]], f"{N_CHOICES} choices": [several[0]], f"{N_CHOICES} requests": [separate]},
    )
    return result
