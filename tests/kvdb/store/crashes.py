"""What a daemon that is killed leaves, and what a start makes of it."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

from kvdb.store.store import Store
from tests.kvdb.store.faults import FailingFiles

BIG = bytes(range(256)) * 1200


def after_a_crash(store: Store, name: str = "copy") -> Path:
    """The directory as a daemon that was killed now leaves it."""
    folder = store.folder.with_name(name)
    shutil.copytree(store.folder, folder)
    return folder


async def reopened(folder: Path) -> Store:
    return Store.open(folder, loop=asyncio.get_running_loop())


async def value_of(store: Store, key: bytes) -> bytes | None:
    entry = store.keyspace.get(0, key)
    if entry is None:
        return None
    return entry.value if isinstance(entry.value, bytes) else store.strings.read(entry.value)  # type: ignore[arg-type]


async def values_after_a_crash(store: Store, *keys: bytes, name: str = "copy") -> list[bytes | None]:
    again = await reopened(after_a_crash(store, name))
    values = [await value_of(again, key) for key in keys]
    await again.close()
    return values


def commits(files: FailingFiles) -> int:
    return files.calls.count("commit")
