"""kvdb: a persistent database service for the live state of language models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvdb.client import AsyncClient, Client

__version__ = "0.1.0"
__all__ = ["AsyncClient", "Client", "__version__"]


def __getattr__(name: str) -> Any:
    """Import the clients on first use: the daemon does not need redis-py, nor the client what the daemon needs."""
    if name in ("AsyncClient", "Client"):
        from kvdb import client

        return getattr(client, name)
    raise AttributeError(f"module 'kvdb' has no attribute '{name}'")
