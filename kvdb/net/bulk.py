"""Large strings between a connection and the store: received into a segment, sent from one, never whole in memory.

What is in memory for one string is bounded: some megabytes that were received and not written yet, after which the
socket is not read; one buffer of a string that is being sent. Each piece is checked just before it is sent: damage in
the first buffer is answered as an error, damage found later ends the connection, since the length has been promised.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, cast

from kvdb.acl import refused
from kvdb.errors import KvdbError
from kvdb.net.send_buffers import HEAD_BYTES, TAIL_BYTES
from kvdb.store.entries import HeldString, LargeValue, StringRef, place_of
from kvdb.store.errors import as_kvdb_error
from kvdb_protocol.replies import Encoded, Reply, encode, encode_error
from kvdb_protocol.requests import Request

if TYPE_CHECKING:
    from kvdb.net.client import Client

log = logging.getLogger("kvdb")

# Received and not written: above this the socket is not read. One write in flight, the next one gathering.
_WAITING_BYTES = 2 << 20
# A write begins when so much has gathered, or the last byte is here: each one costs two changes of thread.
_GATHER_BYTES = 256 << 10
# The same over all connections: above it nobody gathers more while a write is in flight.
_ALL_WAITING_BYTES = 64 << 20
# Strings below this are read at once and sent as one object.
_WHOLE_BYTES = 1 << 20
_HEAD_BYTES = 128
# Commands that store an argument as it is: its first position, and the step to the next one.
_VALUES_AT = {
    b"SET": (2, 0),
    b"SETNX": (2, 0),
    b"GETSET": (2, 0),
    b"SETEX": (3, 0),
    b"PSETEX": (3, 0),
    b"MSET": (2, 2),
    b"MSETNX": (2, 2),
}


class Refusal:
    """Stands in a request for the name of a command whose large argument could not be stored."""

    __slots__ = ("error",)

    def __init__(self, error: KvdbError) -> None:
        self.error = error


class Pieces:
    """An encoded reply with large strings in it."""

    __slots__ = ("n_bytes", "parts")

    def __init__(self, parts: list[bytes | HeldString]) -> None:
        self.parts = parts
        self.n_bytes = sum(map(len, parts))

    def __len__(self) -> int:
        return self.n_bytes


def encode_parts(client: Client, reply: object) -> list[bytes | HeldString]:
    """Encode a reply, leaving large strings as they are; they are held from now on."""
    if isinstance(reply, Pieces):
        return reply.parts
    if isinstance(reply, StringRef):
        return [client.server.store.strings.hold(reply)]
    if isinstance(reply, HeldString):
        return [reply]
    return [encode(cast(Reply, reply), client.resp)]


def encode_array(client: Client, replies: list[object]) -> Pieces | Encoded:
    """An array of replies, of which some may be large strings."""
    parts: list[bytes | HeldString] = [b"*%d\r\n" % len(replies)]
    for reply in replies:
        parts += encode_parts(client, reply)
    return join(parts)


def join(parts: list[bytes | HeldString]) -> Pieces | Encoded:
    """The reply that these are the parts of."""
    if any(isinstance(part, HeldString) for part in parts):
        return Pieces(parts)
    return Encoded(b"".join(cast(list[bytes], parts)))


def encode_string(client: Client, value: LargeValue) -> bytes | Pieces:
    """A reply that is one large string. Raises CorruptError if it is read at once."""
    if place_of(value).n_bytes >= _WHOLE_BYTES:
        return Pieces(encode_parts(client, value))
    return encode(client.server.store.strings.read(value))


# Sending


async def send(client: Client, reply: Pieces) -> None:
    """Send a reply as fast as the client reads it."""
    parts, reply.parts = reply.parts, []
    parts.reverse()
    part: bytes | HeldString = b""
    try:
        while parts:  # each string is let go as soon as it is sent
            part = parts.pop()
            if isinstance(part, HeldString):
                await _send_string(client, part)
            else:
                client.write(part)
    finally:
        del part
        parts.clear()
        client.server.store.strings.give_back_late()


async def _send_string(client: Client, string: HeldString) -> None:
    buffers, strings = client.server.send_buffers, client.server.store.strings
    n_bytes = place_of(string).n_bytes
    try:
        buffer = buffers.take(may_be_large=not client.is_encrypted)
    except OSError as no_memory:
        problem = as_kvdb_error(no_memory, "a buffer to send from")
        client.server.count_error(problem.word)
        client.write(encode_error(problem.wire))
        return
    sent = 0
    try:
        reader = await strings.open(string)
        try:
            while sent < n_bytes:
                room = buffer[HEAD_BYTES:-TAIL_BYTES]
                n_read = reader.read_cached(sent, room) or await strings.read_into(reader, sent, room)
                start, end = HEAD_BYTES, HEAD_BYTES + n_read
                if not sent:
                    head = b"$%d\r\n" % n_bytes
                    start -= len(head)
                    buffer[start:HEAD_BYTES] = head
                sent += n_read
                if sent == n_bytes:
                    buffer[end : end + TAIL_BYTES] = b"\r\n"
                    end += TAIL_BYTES
                client.write(buffer[start:end])
                if client.has_unsent:
                    await client.drained()
                    if sent < n_bytes and client.has_unsent:  # with TLS it may hold some even then
                        fresh = buffers.take(may_be_large=False)
                        buffers.drop(buffer)
                        buffer = fresh
                await asyncio.sleep(0)  # others get their turn
        finally:
            reader.close()
    except (KvdbError, OSError) as error:
        problem = as_kvdb_error(error, "a buffer to send from")
        client.server.count_error(problem.word)
        if sent:
            log.error(
                "client %d (%s) closed after %d of %d bytes: %s", client.id, client.peer, sent, n_bytes, problem.wire
            )
            client.abort()
        else:
            client.write(encode_error(problem.wire))
    except BaseException:  # a thread may be reading into it, or the transport hold it
        buffers.drop(buffer)
        raise
    buffers.give_back(buffer)


# Receiving


def take(client: Client, request: Request, n_bytes: int) -> Receipt | None:
    """Decide where the large argument goes that follows the arguments in `request`; None: into memory."""
    first, step = _VALUES_AT.get(request[0].upper(), (0, 0)) if request else (0, 0)
    at = len(request)
    if not first or at < first or (at != first and (not step or (at - first) % step)):
        return None
    command = client.server.commands[request[0].upper()].command
    if not client.user.is_unrestricted and refused(client.user, command, request) is not None:
        return None  # nobody may make room, by eviction, for what he may not write: it is refused when it is here
    return Receipt(client, request, n_bytes)


class Receipt:
    """A large argument on its way into a segment (kvdb_protocol.requests.Sink)."""

    all_waiting_bytes = 0

    def __init__(self, client: Client, request: Request, n_bytes: int) -> None:
        """request: its name is replaced by a Refusal if the argument cannot be stored."""
        self._client = client
        self._request = request
        self._string = HeldString(n_bytes)
        self._pieces: list[bytes] = []
        self._n_waiting = 0
        self._has_ended = self._is_given_up = self._is_refused = self._is_paused = False
        self._news = asyncio.Event()
        self._task = client.server.loop.create_task(self._run())
        client.receipts.add(self)

    def feed(self, data: bytes) -> None:
        """The next bytes."""
        if not self._string.head:
            self._string.head = data[:_HEAD_BYTES]
        if self._is_refused:
            return
        self._pieces.append(data)
        self._n_waiting += len(data)
        Receipt.all_waiting_bytes += len(data)
        self._news.set()
        if self._n_waiting > (_WAITING_BYTES if Receipt.all_waiting_bytes < _ALL_WAITING_BYTES else 0):
            self._is_paused = True
            self._client.pause_receiving()

    def end(self) -> bytes:
        """The last byte was given: what stands for the argument in the request. It may be used once all is written."""
        self._has_ended = True
        self._client.unwritten += 1
        self._client.update_stop()
        self._news.set()
        return cast(bytes, self._string)

    def give_up(self) -> None:
        """The connection is gone."""
        self._is_given_up = True
        self._news.set()

    def _take(self) -> list[bytes]:
        pieces, self._pieces = self._pieces, []
        Receipt.all_waiting_bytes -= self._n_waiting
        self._n_waiting = 0
        self._is_paused = False
        self._client.resume_receiving()
        return pieces

    async def _run(self) -> None:
        try:
            await self._receive()
        except Exception as error:
            if not isinstance(error, KvdbError):
                log.error("receiving a string failed", exc_info=error)
            self._is_refused = True
            self._take()
            self._request[0] = cast(bytes, Refusal(as_kvdb_error(error, "receiving a string")))
            while not self._has_ended and not self._is_given_up:
                self._news.clear()
                await self._news.wait()
        finally:
            self._take()
            self._client.receipts.discard(self)
            if self._has_ended:
                self._client.received()

    async def _receive(self) -> None:
        server = self._client.server
        if server.refusal is not None:
            raise server.refusal
        incoming = await server.store.receiver.begin(self._string.n_bytes)
        try:
            while not self._is_given_up:
                if self._has_ended:
                    await incoming.finish(self._take(), self._string, is_urgent=server.durable_writes)
                    return
                if self._is_paused or self._n_waiting >= _GATHER_BYTES:
                    await incoming.write(self._take())
                else:
                    self._news.clear()
                    await self._news.wait()
        except BaseException:
            await incoming.abandon()
            raise
        await incoming.abandon()
