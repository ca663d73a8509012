"""The connection options in which kvdb's clients differ from redis-py's."""

from __future__ import annotations

from typing import Any


def connection_options(options: dict[str, Any]) -> dict[str, Any]:
    """The options with kvdb's defaults: RESP3 (streams and maps need it), no socket timeout (a prefill takes long)."""
    return {"protocol": 3, "socket_timeout": None, **options}


def url_options(url: str, options: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """An address redis-py understands, and the options that go with it: port 6374 unless the address says another."""
    scheme, _, rest = url.partition("://")
    if scheme in ("kvdb", "kvdbs"):
        url = f"{'redis' if scheme == 'kvdb' else 'rediss'}://{rest}"
    return url, options if scheme == "unix" else {"port": 6374, **options}
