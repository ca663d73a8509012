"""The README's session works line by line: with redis-cli, and with redis-py in both protocols, plain and asyncio."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
import redis.asyncio

from kvdb_tools.daemon import Daemon

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
# Each way runs in a database of its own: the session's names are free there.
DATABASES = {"redis-cli": 1, "kvdb-cli": 2, "resp2": 3, "resp3": 4, "asyncio2": 5, "asyncio3": 6}


def session() -> list[list[str]]:
    """The commands of the README's session, without the program and its port."""
    block = re.search(r"^```redis-cli\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    assert block
    lines = [shlex.split(line) for line in block[1].splitlines()]
    assert all(line[:3] == ["redis-cli", "-p", "6374"] for line in lines)
    return [line[3:] for line in lines]


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with Daemon(tmp_path_factory.mktemp("readme") / "data") as running:
        yield running


def check_replies(replies: list[Any]) -> None:
    """What every client must have seen, whatever form maps take."""
    by_name = dict(zip([command[0] for command in session()], replies, strict=True))
    assert as_map(by_name["PREFILL"])[b"tokens"] > 10
    assert as_map(by_name["GENERATE"])[b"text"]
    assert len(by_name["SAMPLE"]) == 3
    assert by_name["FORK"] == 2
    assert as_map(by_name["RESTORE"])[b"recomputed"] == 0
    assert [as_map(item)[b"key"] for item in by_name["LINEAGE"]] == [b"step:2", b"step:1"]


def as_map(reply: Any) -> dict[Any, Any]:
    return reply if isinstance(reply, dict) else dict(zip(reply[::2], reply[1::2], strict=True))


def test_there_are_ten_lines() -> None:
    assert len(session()) == 10


@pytest.mark.parametrize("program", ["redis-cli", "kvdb-cli"])
def test_command_lines(daemon: Daemon, program: str) -> None:
    path = shutil.which(program) or shutil.which(program, path=sysconfig.get_path("scripts"))
    if path is None:
        pytest.skip(f"{program} is not installed")
    for words in session():
        command = [path, "-p", str(daemon.port), "-n", str(DATABASES[program]), *words]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert done.stdout.strip(), words
        assert not re.match(r"\(error\)|[A-Z]+ ", done.stdout) or words[0] == "GENERATE", done.stdout


@pytest.mark.parametrize("protocol", [2, 3])
def test_redis_py(daemon: Daemon, protocol: int) -> None:
    with redis.Redis(port=daemon.port, protocol=protocol, db=DATABASES[f"resp{protocol}"]) as client:
        check_replies([client.execute_command(*words) for words in session()])


@pytest.mark.parametrize("protocol", [2, 3])
async def test_redis_py_asyncio(daemon: Daemon, protocol: int) -> None:
    async with redis.asyncio.Redis(port=daemon.port, protocol=protocol, db=DATABASES[f"asyncio{protocol}"]) as client:
        check_replies([await client.execute_command(*words) for words in session()])
