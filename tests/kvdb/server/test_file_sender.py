"""Strings that the kernel sends from its page cache: exact for slow readers, and every way it can break off."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from pathlib import Path

import pytest

from kvdb.errors import CorruptError
from kvdb.net.file_sender import FileSender
from kvdb.net.service import Server
from kvdb.store.files import OsFiles
from server.conftest import request

DATA = os.urandom(3_000_000)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source"
    path.write_bytes(DATA)
    return path


def pair() -> tuple[socket.socket, socket.socket]:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    theirs.setblocking(False)
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    return ours, theirs


async def test_a_slow_reader_gets_every_byte(source: Path) -> None:
    loop = asyncio.get_running_loop()
    ours, theirs = pair()
    fd = os.open(source, os.O_RDONLY)
    sender = FileSender(loop, OsFiles(), ours.fileno())
    task = asyncio.create_task(sender.send(fd, 1000, 2_000_000))
    got = b""
    while len(got) < 2_000_000:
        got += await loop.sock_recv(theirs, 30_000)
        await asyncio.sleep(0)
    await task
    assert got == DATA[1000:2_001_000]
    sender.close()
    os.close(fd)
    await loop.sock_sendall(ours, b"behind it")
    assert await loop.sock_recv(theirs, 100) == b"behind it", "the connection is as it was"


async def test_a_file_that_ends_too_early(source: Path) -> None:
    ours, theirs = pair()
    fd = os.open(source, os.O_RDONLY)
    sender = FileSender(asyncio.get_running_loop(), OsFiles(), ours.fileno())
    with pytest.raises(CorruptError, match="cut while it was sent"):
        await sender.send(fd, len(DATA) - 100, 200)
    assert theirs.recv(1000) == DATA[-100:]
    sender.close()
    os.close(fd)


async def test_whoever_is_cancelled_or_left_watches_nothing_more(source: Path) -> None:
    loop = asyncio.get_running_loop()
    ours, theirs = pair()
    fd = os.open(source, os.O_RDONLY)
    sender = FileSender(loop, OsFiles(), ours.fileno())
    task = asyncio.create_task(sender.send(fd, 0, len(DATA)))
    await asyncio.sleep(0.05)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not loop.remove_writer(sender._sock)
    theirs.close()
    with pytest.raises(ConnectionError):
        await sender.send(fd, 0, len(DATA))
    sender.close()
    os.close(fd)


async def connect(server: Server) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_unix_connection(server.config.text("unixsocket"))
    writer.write(request("SET", "k", DATA))
    assert await reader.readline() == b"+OK\r\n"
    return reader, writer


async def test_a_disk_that_fails_in_the_middle(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = await connect(server)
    real, calls = OsFiles.send, 0

    def send(self: OsFiles, fd: int, offset: int, n_bytes: int, sock: int) -> int:
        nonlocal calls
        calls += 1
        if calls > 2:
            raise OSError(errno.EIO, "broken")
        return real(self, fd, offset, n_bytes, sock)

    monkeypatch.setattr(OsFiles, "send", send)
    writer.write(request("GET", "k") + request("PING"))
    got = await asyncio.wait_for(reader.read(), 10)
    assert got.startswith(b"$3000000\r\n" + DATA[:1000]) and len(got) < len(DATA), "it ends short, and nothing follows"
    monkeypatch.undo()
    reader, writer = await connect(server)
    writer.write(request("GET", "k"))
    whole = b"$3000000\r\n" + DATA + b"\r\n"
    assert await asyncio.wait_for(reader.readexactly(len(whole)), 10) == whole


async def test_clients_that_leave_in_the_middle(server: Server) -> None:
    for _ in range(3):
        reader, writer = await connect(server)
        writer.write(request("GET", "k") * 5)
        assert await reader.readline() == b"$3000000\r\n"
        writer.transport.abort()
    reader, writer = await connect(server)
    writer.write(request("CLIENT", "LIST"))
    while len(server.clients) > 1:
        await asyncio.sleep(0.01)
    assert await reader.readline()
