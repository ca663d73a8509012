"""What tests of sessions share."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from kvdb.sessions import Sessions
from tests.kvdb.live import open_sessions


@pytest.fixture
async def sessions(tmp_path: Path) -> AsyncIterator[Sessions]:
    opened = await open_sessions(tmp_path / "data")
    yield opened
    await opened.close()
    await opened.store.close()
