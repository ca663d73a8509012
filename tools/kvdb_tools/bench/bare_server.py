"""The least a Python server can do: uvloop, hiredis and a dict. A yardstick, no database.

It keeps no rules, no time, no counts, nothing on disk. What kvdb does more for each command is the difference to it.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
from types import TracebackType
from typing import cast

import hiredis
import uvloop

from kvdb_tools.bench.redis_server import wait_for_pong
from kvdb_tools.cli.connection import Target
from kvdb_tools.daemon import free_port


class _Protocol(asyncio.Protocol):
    strings: dict[bytes, bytes] = {}  # noqa: RUF012 (shared by all connections)
    hashes: dict[bytes, dict[bytes, bytes]] = {}  # noqa: RUF012

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._reader = hiredis.Reader(notEnoughData=None)

    def data_received(self, data: bytes) -> None:
        self._reader.feed(data)
        out = []
        while (request := self._reader.gets()) is not None:
            match request:
                case [b"PING"]:
                    out.append(b"+PONG\r\n")
                case [b"GET", key]:
                    value = self.strings.get(key)
                    out.append(b"$-1\r\n" if value is None else b"$%d\r\n%b\r\n" % (len(value), value))
                case [b"SET", key, value]:
                    self.strings[key] = value
                    out.append(b"+OK\r\n")
                case [b"HSET", key, field, value]:
                    fields = self.hashes.setdefault(key, {})
                    out.append(b":0\r\n" if field in fields else b":1\r\n")
                    fields[field] = value
                case _:
                    out.append(b"*0\r\n")
        self._transport.write(b"".join(out))


class BareServer:
    """Runs in a `with` statement."""

    def __init__(self) -> None:
        self.target = Target(port=free_port())

    def __enter__(self) -> BareServer:
        command = [sys.executable, "-P", "-m", "kvdb_tools.bench.bare_server", str(self.target.port)]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        try:
            wait_for_pong(self.target, "the bare server")
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._process.kill()
        self._process.wait()


async def _serve(port: int) -> None:
    server = await asyncio.get_running_loop().create_server(_Protocol, "127.0.0.1", port)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(_serve(int(sys.argv[1])))
