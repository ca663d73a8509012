"""A store whose file calls can fail."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from kvdb.store.store import Store
from tests.kvdb.store.faults import FailingFiles
from tests.kvdb.store.states import MODEL


@pytest.fixture
def files() -> FailingFiles:
    return FailingFiles()


@pytest.fixture
async def store(tmp_path: Path, files: FailingFiles) -> AsyncIterator[Store]:
    store = Store.open(tmp_path / "store", loop=asyncio.get_running_loop(), files=files)
    await store.register_model(MODEL)
    await store._committer.idle()
    yield store
    files.heal()
    await store.close()
