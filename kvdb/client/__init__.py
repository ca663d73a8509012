"""The Python client: redis-py's clients with kvdb's commands. Needs neither the engine nor what the daemon needs."""

from kvdb.client.aio import AsyncClient, AsyncSession, AsyncStream
from kvdb.client.errors import (
    BusyError,
    BusyKeyError,
    CancelledError,
    CorruptError,
    EngineDownError,
    MisconfError,
    NoEngineError,
    NoSpaceError,
    StateError,
    TooLongError,
    WrongModelError,
)
from kvdb.client.sync import Client, Session, Stream

__all__ = [
    "AsyncClient",
    "AsyncSession",
    "AsyncStream",
    "BusyError",
    "BusyKeyError",
    "CancelledError",
    "Client",
    "CorruptError",
    "EngineDownError",
    "MisconfError",
    "NoEngineError",
    "NoSpaceError",
    "Session",
    "StateError",
    "Stream",
    "TooLongError",
    "WrongModelError",
]
