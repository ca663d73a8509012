"""A daemon with HTTP and dsv4-nano, and the official SDKs pointed at it."""

from __future__ import annotations

from collections.abc import Iterator

import anthropic
import httpx
import openai
import pytest

import kvdb
from kvdb_tools.daemon import Daemon, free_port

MODEL = "dsv4-nano"
CALCULATOR = {
    "type": "function",
    "function": {
        "name": "calculator",
        "description": "Compute an arithmetic expression.",
        "parameters": {
            "type": "object",
            "properties": {"expression": {"type": "string", "description": "For example 12*3"}},
            "required": ["expression"],
        },
    },
}


class Served:
    """A daemon and how to reach it."""

    def __init__(self, daemon: Daemon, http_port: int) -> None:
        self.daemon = daemon
        self.url = f"http://127.0.0.1:{http_port}"
        self.openai = openai.OpenAI(base_url=f"{self.url}/v1", api_key="any", max_retries=0)
        self.anthropic = anthropic.Anthropic(base_url=self.url, api_key="any", max_retries=0)
        self.http = httpx.Client(base_url=self.url, timeout=60)
        self.redis = kvdb.Client("127.0.0.1", daemon.port)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    port = free_port()
    with Daemon(tmp_path_factory.mktemp("http") / "data", {"http-port": str(port)}) as daemon:
        found = Served(daemon, port)
        yield found
        found.http.close()
        found.redis.close()
