"""Replies are those of a real redis-server (compat.py says how they are compared).

KVDB_COMPAT_COMMANDS sets the number of commands (default 12,000, half of them in each protocol), KVDB_COMPAT_SEED the
seed. `tests/show/compat.py` is the long run with a count of each command.
"""

from __future__ import annotations

import os

import pytest

from .compat import run
from .conftest import Daemon

N_COMMANDS = int(os.environ.get("KVDB_COMPAT_COMMANDS", "12000"))
SEED = int(os.environ.get("KVDB_COMPAT_SEED", "20260301"))


@pytest.mark.parametrize("resp", [2, 3])
def test_replies_are_those_of_redis(daemon: Daemon, redis_daemon: Daemon, resp: int) -> None:
    result = run((daemon.wire, redis_daemon.wire), resp, N_COMMANDS // 2, SEED)
    assert not result.differences, f"seed {SEED}, {len(result.differences)}:\n" + "\n".join(result.differences)
