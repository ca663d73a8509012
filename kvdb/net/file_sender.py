"""Ranges of files to a socket, from the system's page cache to the client without a copy in this process.

The transport that owns the socket must have nothing left to send meanwhile: what it is given later follows.
"""

from __future__ import annotations

import asyncio
import os

from kvdb.errors import CorruptError
from kvdb.store.files import Files


class FileSender:
    """One at a time for a connection; `close` it. Event-loop thread."""

    def __init__(self, loop: asyncio.AbstractEventLoop, files: Files, sock: int) -> None:
        """sock: the socket's descriptor, not blocking. Its duplicate may be watched beside the transport."""
        self._loop = loop
        self._files = files
        self._sock = os.dup(sock)

    def close(self) -> None:
        """Give the duplicate up; the connection stays."""
        os.close(self._sock)

    async def send(self, fd: int, offset: int, n_bytes: int) -> None:
        """Send a range as fast as the client reads. Raises OSError, and CorruptError at the end of the file."""
        end = offset + n_bytes
        while offset < end:
            try:
                sent = self._files.send(fd, offset, end - offset, self._sock)
            except BlockingIOError:
                await self._writable()
                continue
            if not sent:
                raise CorruptError("the file was cut while it was sent")
            offset += sent

    async def _writable(self) -> None:
        ready: asyncio.Future[None] = self._loop.create_future()
        self._loop.add_writer(self._sock, _wake, ready)
        try:
            await ready
        finally:
            self._loop.remove_writer(self._sock)


def _wake(ready: asyncio.Future[None]) -> None:
    if not ready.done():
        ready.set_result(None)
