"""One connection: what it has said, what it may do, what waits to be sent.

Bytes go to the parser, requests to the command table, the replies of one turn of the loop to the transport in one
write, after all clients' requests of that turn are run (Server.send_soon). A handler that returns a coroutine runs as
this client's task; until it is done the client's further requests wait. They also wait while the client does not read
its replies: at most one reply beyond the write buffer's limit is held in memory for it, and its socket is not read any
further. Invariant: replies are sent in the order of the requests.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import time
from collections.abc import Awaitable, Coroutine
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from kvdb.commands import dispatch
from kvdb.net import bulk
from kvdb.store.entries import HeldString, StringRef
from kvdb_protocol.replies import BULK_HEADERS, SHORT_BYTES, Encoded, Push, Reply, encode, encode_error
from kvdb_protocol.requests import Request, RequestParser

if TYPE_CHECKING:
    from kvdb.commands.registry import Bound
    from kvdb.commands.transactions import Transaction
    from kvdb.net.service import Server

log = logging.getLogger("kvdb")
_clock = time.perf_counter

_MUTED = -1  # the place of a reply that is not sent
_TLS_BUFFER_BYTES = 256 * 1024
_BATCH_BYTES = 128 * 1024  # replies of one batch that are joined before they go to the transport
_BATCH_REQUESTS = 64  # how many a batch handler is shown at once
_WAITING_BYTES = 64 * 1024  # received while an earlier request waits; above this the socket is not read


class Client(asyncio.Protocol):
    """A client and its connection. Handlers get it as their first argument."""

    __slots__ = (
        "_close_wanted", "_closing", "_commands", "_drained", "_has_strings", "_held", "_is_pipelining",
        "_is_receiving_paused", "_is_sending", "_next", "_out", "_pending_writes", "_read_paused", "_running",
        "_stopped", "_waiting", "_waiting_bytes", "_write_paused", "authenticated", "cancelled", "channels",
        "created", "db", "fd", "gated", "id", "input_bytes", "is_monitor", "last_bound", "last_used",
        "lib_name", "lib_ver", "listener", "local", "name", "no_evict", "no_touch", "output_bytes",
        "over_soft_since", "parser", "patterns", "peer", "receipts", "replies", "resp", "server",
        "skip_replies", "task", "transaction", "transport", "unwritten", "user", "watch_broken", "watched",
    )  # fmt: skip

    def __init__(self, server: Server, listener: str = "tcp") -> None:
        self.server = server
        self.listener = listener
        self.id = 0
        self.fd = -1
        self.peer = self.local = ""
        self.created = self.last_used = server.now
        self.parser = RequestParser()
        self.transport: asyncio.Transport  # from connection_made on
        self.task: asyncio.Task[None] | None = None
        self.cancelled = False
        self.last_bound: Bound | None = None
        self.input_bytes = self.output_bytes = 0
        self.channels: dict[bytes, None] = {}
        self.patterns: dict[bytes, None] = {}
        self.watched: dict[tuple[int, bytes], bool] = {}  # whether the key existed
        self.watch_broken = False
        self.over_soft_since = 0.0
        self.set_defaults()
        self._commands = server.commands
        self._waiting: list[Request] = []
        self._waiting_bytes = 0
        self._next = 0
        self._out: list[bytes] = []
        self._pending_writes: list[int] = []  # places in `_out` of replies to writes that are not durable yet
        self._running = False
        self._is_pipelining = False  # its last bytes were several requests
        self._write_paused = False
        self._read_paused = False
        self._held = False  # CLIENT PAUSE holds the next request
        self._closing = False
        self._close_wanted = False
        self._stopped = False
        # Large strings: see bulk.py
        self.receipts: set[bulk.Receipt] = set()
        self.unwritten = 0  # arguments of waiting requests that were received and are not written yet
        self._is_receiving_paused = False
        self._has_strings = False  # among the replies that wait in `_out`
        self._is_sending = False
        self._drained: asyncio.Future[None] | None = None
        self.parser.take_bulk = partial(bulk.take, self)

    def set_defaults(self) -> None:
        """The state of a new connection, and of one after RESET; subscriptions and watched keys are left alone."""
        self.db = 0
        self.resp = 2
        self.name = self.lib_name = self.lib_ver = b""
        self.user = self.server.acl.default
        self.authenticated = self.user.is_enabled and self.user.is_nopass
        self.transaction: Transaction | None = None
        self.is_monitor = self.no_evict = self.no_touch = False
        self.replies = True
        self.skip_replies = 0
        self.update_gate()

    def update_gate(self) -> None:
        """Decide whether requests may take the fast path. Call after a change of anything named here."""
        self.parser.authenticated = self.authenticated
        self.gated = (
            not self.authenticated
            or not self.user.is_unrestricted
            or self.transaction is not None
            or not self.replies
            or self.skip_replies > 0
            or (self.resp == 2 and bool(self.channels or self.patterns))
        )

    # asyncio.Protocol ------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Take the connection, or turn it away."""
        transport = cast(asyncio.Transport, transport)  # uvloop's transports are not subclasses of it
        self.transport = transport
        # What the kernel does not take at once is reason to stop; with TLS uvloop would not go on after a limit of 0.
        transport.set_write_buffer_limits(high=_TLS_BUFFER_BYTES if self.is_encrypted else 0)
        sock = transport.get_extra_info("socket")
        self.fd = sock.fileno() if sock is not None else -1
        self.local = _address(transport.get_extra_info("sockname"))
        self.peer = _address(transport.get_extra_info("peername")) if self.listener != "unix" else f"{self.local}:0"
        refusal = self.server.accept(self, sock)
        if refusal is not None:
            self._closing = self._stopped = True
            transport.write(encode_error(refusal))
            transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        """The client is gone: its work is cancelled and its requests are forgotten."""
        self.cancelled = self._closing = self._stopped = True
        self._waiting = []
        self.parser.take_bulk = None
        for receipt in self.receipts:
            receipt.give_up()
        if self.task is not None:
            self.task.cancel()
        self.server.forget(self)

    def pause_writing(self) -> None:
        """The client does not read its replies."""
        self._write_paused = self._stopped = True

    def resume_writing(self) -> None:
        """The client has read its replies."""
        self._write_paused = False
        if self._drained is not None and not self._drained.done():
            self._drained.set_result(None)
        self.update_stop()
        if not self._running and not self._stopped:
            self._process()

    def data_received(self, data: bytes) -> None:
        """Parse, run, reply."""
        self.input_bytes += len(data)
        server = self.server
        self.last_used = server.now
        # Most often it is one plain request while nothing else is to be done.
        if not (self._is_pipelining or self._stopped or self._held or self._waiting or self.gated or server.gated):
            request = self.parser.feed_one(data)
            if request is not None:
                bound = self._commands.get(request[0])
                if bound is not None and len(request) in bound.lengths:
                    self._running = True
                    self._run(bound, request)
                    self._running = False
                    if self.task is not None:
                        return
                    self.last_bound = bound
                    if self._stopped or self._read_paused or self._pending_writes or self._has_strings:
                        self._settle()
                    else:
                        server.send_soon(self)
                    return
        requests = self.parser.feed(data)
        self._is_pipelining = len(requests) > 1
        if self._stopped or self._held or self._waiting or not requests:
            self._keep_waiting(requests, len(data))
        else:
            self._waiting = requests
            self._process()

    def eof_received(self) -> None:
        """The client says nothing more, and the transport closes now: what is answered goes out first."""
        self.flush()

    def _keep_waiting(self, requests: list[Request], n_bytes: int) -> None:
        """Requests that came while earlier ones wait, or none yet; run them if that is possible now."""
        if self._closing:
            return
        if not requests and self.parser.buffered_bytes > self.server.max_query_bytes:
            log.warning("client %d (%s) closed: its unfinished request is over the limit", self.id, self.peer)
            self.abort()
            return
        self._waiting += requests
        if not self._stopped and not self._held:
            self._process()
            return
        self._waiting_bytes += n_bytes
        if self._waiting_bytes > _WAITING_BYTES and not self._read_paused:
            self._read_paused = True
            self.transport.pause_reading()

    # requests --------------------------------------------------------------------------------------------------

    def _process(self) -> None:
        """Run waiting requests until there are none, one becomes a task, or the client has to read first."""
        server = self.server
        commands = self._commands
        waiting = self._waiting
        out = self._out
        n_waiting = len(waiting)
        at = self._next
        self._running = True
        self._held = False
        out_bytes = 0
        while at < n_waiting and not self._stopped:
            request = waiting[at]
            bound = commands.get(request[0])
            at += 1
            if bound is None or self.gated or server.gated or len(request) not in bound.lengths:
                if server.gated and dispatch.is_held(self, request):
                    at -= 1
                    self._held = True
                    break
                bound, encoded = dispatch.prepare(self, request)
                if bound is None:
                    self.add_reply(encoded)
                    self._mute_last()
                    continue
                out_bytes += self._run(bound, request)
                if self.task is None:
                    self._mute_last()
            elif at < n_waiting and bound.batch_fn is not None and (n_run := self._run_batch(bound, at - 1)):
                at += n_run - 1
                out_bytes += len(out[-1])
            else:
                out_bytes += self._run(bound, request)
            if self.task is None:
                self.last_bound = bound
            if out_bytes > _BATCH_BYTES:
                self.flush()
                out_bytes = 0
        self._next = at
        self._running = False
        if self.task is None:
            self._settle()

    def _run_batch(self, bound: Bound, first: int) -> int:
        """Run as many of the waiting requests from `first` on as the batch handler takes, and gather their replies."""
        began = _clock()
        n_run, replies = bound.batch_fn(self, self._waiting[first : first + _BATCH_REQUESTS])  # type: ignore[misc]
        if n_run:
            self._out.append(replies)
            bound.calls += n_run
            bound.seconds += _clock() - began
        return n_run

    def _run(self, bound: Bound, request: Request) -> int:
        """Run a command and gather its reply, of so many bytes; or it becomes this client's task."""
        began = _clock()
        more_bytes = 0
        try:
            reply: Any = bound.fn(self, request[bound.n_names :])  # type: ignore[misc]
            kind = type(reply)
            if kind is Encoded:
                encoded = reply.data
            elif kind is bytes:
                n_bytes = len(reply)
                if n_bytes < SHORT_BYTES:
                    encoded = b"".join((BULK_HEADERS[n_bytes], reply, b"\r\n"))
                elif n_bytes > _BATCH_BYTES and not (self.gated or bound.is_write):
                    # Sent from where it is: joining it with its frame would be one more copy.
                    self.add_reply(b"$%d\r\n" % n_bytes)
                    self.add_reply(reply)
                    more_bytes = n_bytes
                    encoded = b"\r\n"
                else:
                    encoded = b"$%d\r\n%b\r\n" % (n_bytes, reply)
            elif kind is int:
                encoded = b":%d\r\n" % reply
            elif kind is StringRef or kind is HeldString:
                encoded = bulk.encode_string(self, reply)
                self._has_strings |= type(encoded) is not bytes
            elif kind is bulk.Pieces:
                encoded = reply
                self._has_strings = True
            elif inspect.isawaitable(reply):
                task = self._run_task(self._finish(bound, request, reply, began))
                if inspect.iscoroutine(reply):
                    # A task that is cancelled before it begins would never await it.
                    task.add_done_callback(partial(_close, reply))
                return 0
            else:
                encoded = encode(reply, self.resp)
        except Exception as error:
            encoded = dispatch.error_reply(self, bound, error)
        took = _clock() - began
        bound.calls += 1
        bound.seconds += took
        server = self.server
        if took >= server.slow_seconds:
            server.note_slow(self, request, took)
        if server.durable_writes and bound.is_write:
            self._pending_writes.append(len(self._out))
        self._out.append(encoded)
        return len(encoded) + more_bytes

    def _run_task(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = self.task = self.server.loop.create_task(work)
        self.update_stop()
        return task

    def _task_done(self) -> None:
        self.task = None
        self.update_stop()
        self._process()

    def update_stop(self) -> None:
        """No request may be started while one is a task or waits for its argument to be written, replies wait to be
        read, or the connection closes."""
        self._stopped = (
            self.task is not None or self._write_paused or self.unwritten > 0 or self._closing or self._close_wanted
        )

    def go_on(self) -> None:
        """Try again after CLIENT PAUSE."""
        if self._held and not self._stopped:
            self._process()

    def _settle(self) -> None:
        """Between batches: send what is ready, and read on if nothing waits."""
        if self._next >= len(self._waiting):
            self._waiting = []
            self._next = self._waiting_bytes = 0
        if self._pending_writes or self._has_strings:
            self.flush()
        elif self._out:
            self.server.send_soon(self)
        if self._stopped or self._read_paused or self._waiting or self.parser.error is not None:
            self._settle_rest()

    def _settle_rest(self) -> None:
        if self._close_wanted and self.task is None:
            self.close()
        if self._waiting or self.task is not None or self._write_paused:
            return
        if self.parser.error is not None and not self._closing:
            self.add_reply(encode_error(f"ERR Protocol error: {self.parser.error}"))
            self.close()
        self._waiting_bytes = 0
        if self._read_paused and not self._is_receiving_paused and not self._closing:
            self._read_paused = False
            self.transport.resume_reading()

    def pause_receiving(self) -> None:
        """A large argument comes faster than it is written."""
        self._is_receiving_paused = True
        if not self._read_paused:
            self._read_paused = True
            self.transport.pause_reading()

    def resume_receiving(self) -> None:
        """What was received of a large argument is on its way to the disk."""
        if self._is_receiving_paused:
            self._is_receiving_paused = False
            if self.task is None and not self._running:
                self._settle()

    def received(self) -> None:
        """A large argument is written: its request may run."""
        self.unwritten -= 1
        self.update_stop()
        if not self._stopped and not self._running:
            self._process()

    async def _finish(self, bound: Bound, request: Request, work: Awaitable[Reply], began: float) -> None:
        """Run a handler's coroutine, reply, and go on with the waiting requests."""
        try:
            await self._send_all()
            self.last_bound = bound
            try:
                result = await work
                if bound.is_write and self.server.durable_writes and self.server.keyspace.is_dirty:
                    await self.server.keyspace.make_durable()
                encoded = encode(result, self.resp)
            except Exception as error:
                encoded = dispatch.error_reply(self, bound, error)
            took = time.perf_counter() - began
            bound.calls += 1
            bound.seconds += took
            if took >= self.server.slow_seconds:
                self.server.note_slow(self, request, took)
            self.add_reply(encoded)
            self._mute_last()
            self.flush()
        except asyncio.CancelledError:
            self.task = None
            raise
        self.last_used = self.server.now
        self._task_done()

    async def _hold(self) -> None:
        """Send the replies of a batch once its writes are durable, then go on."""
        try:
            await self._send_all()
        except asyncio.CancelledError:
            self.task = None  # it would keep what was being sent
            raise
        self._task_done()

    async def _send_all(self) -> None:
        """Send what is gathered: when it is durable, and large strings as fast as the client reads them."""
        if self._pending_writes:
            await self._make_durable()
        if not self._has_strings:
            self.flush()
            return
        out: list[bytes | bulk.Pieces] = [*self._out]
        self._out.clear()
        self._has_strings = False
        self._is_sending = True
        try:
            for part in out:
                if isinstance(part, bulk.Pieces):
                    await bulk.send(self, part)
                else:
                    self.write(part)
        finally:
            self._is_sending = False

    def write(self, data: bytes | memoryview) -> None:
        """Hand encoded bytes to the transport, ahead of what is gathered: from within `_send_all`."""
        self.output_bytes += len(data)
        if not self._closing:
            self.transport.write(data)

    @property
    def is_encrypted(self) -> bool:
        """Whether the connection is TLS."""
        return self.transport.get_extra_info("ssl_object") is not None

    @property
    def has_unsent(self) -> bool:
        """Whether the transport still holds something of what it was given."""
        return self.transport.get_write_buffer_size() > 0

    async def drained(self) -> None:
        """Wait until the client has read enough for more to be written."""
        if self._write_paused:
            self._drained = self.server.loop.create_future()
            await self._drained

    async def _make_durable(self) -> None:
        try:
            await self.server.keyspace.make_durable()
        except Exception as error:
            for place in self._pending_writes:
                if place == _MUTED:
                    continue
                reply = self._out[place]
                if not isinstance(reply, bytes) or not reply.startswith(b"-"):
                    self._out[place] = dispatch.error_reply(self, None, error)
        self._pending_writes = []

    def _mute_last(self) -> None:
        """CLIENT REPLY OFF and SKIP: drop the reply just made."""
        if not self._out or (self.replies and not self.skip_replies):
            return
        self._out.pop()
        if self._pending_writes and self._pending_writes[-1] == len(self._out):
            self._pending_writes[-1] = _MUTED
        if self.replies and self.skip_replies == 1:
            self.skip_replies = 0
            self.update_gate()
        elif self.replies:  # the reply to CLIENT REPLY SKIP itself
            self.skip_replies = 1

    # output ----------------------------------------------------------------------------------------------------

    def add_reply(self, data: bytes) -> None:
        """Add encoded bytes behind what is already to be sent; they go out when the batch ends."""
        self._out.append(data)

    def flush(self) -> None:
        """Send what is ready; under `appendfsync always`, when it is durable. A large string under way goes first."""
        if self._pending_writes or self._has_strings or self._is_sending:
            if self.task is None and not self._is_sending:
                self._run_task(self._hold())
            return
        out = self._out
        if len(out) == 1:
            data = out.pop()
            self.output_bytes += len(data)
            if not self._closing:
                self.transport.write(data)
        elif sum(map(len, out)) > _BATCH_BYTES:
            for data in out:
                self.write(data)
            out.clear()
        elif out:
            self.write(b"".join(out))
            out.clear()

    def push(self, kind: str, *items: Reply) -> None:
        """Send an out-of-band message: a push frame in RESP3, a plain array in RESP2."""
        self.push_encoded(encode(Push((kind, *items)), self.resp))

    def push_encoded(self, data: bytes) -> None:
        """Send an encoded out-of-band message: behind the replies gathered so far, at once if none are."""
        if self._closing:
            return
        self.add_reply(data)
        if not (self._running or self._pending_writes or self._has_strings or self._is_sending):
            self.flush()
            self.server.check_output(self)

    @property
    def output_buffer_bytes(self) -> int:
        """Bytes that wait to be sent."""
        return sum(map(len, self._out)) + self.transport.get_write_buffer_size()

    @property
    def is_subscriber(self) -> bool:
        """Whether this connection listens to a channel or pattern."""
        return bool(self.channels or self.patterns)

    @property
    def is_blocked(self) -> bool:
        """Whether a command of this client runs as a task."""
        return self.task is not None

    def close(self) -> None:
        """Close after what is gathered has been sent. Replies to writes that are not durable are never sent."""
        if self._closing:
            return
        if self._pending_writes or self._has_strings:
            self.abort()
            return
        self.flush()
        self._closing = self._stopped = True
        self.transport.close()

    def close_after_reply(self) -> None:
        """Close once what has been run is answered, and durable where it must be; nothing further is run."""
        self._close_wanted = self._stopped = True
        if not self._running and self.task is None:
            self.close()

    def abort(self) -> None:
        """Close now; what waits is dropped."""
        self._closing = self._stopped = True
        self.transport.abort()


def _close(work: Coroutine[Any, Any, Any], _task: object) -> None:
    work.close()


def _address(name: Any) -> str:
    """A socket address as Redis prints it: `127.0.0.1:6374`, `[::1]:6374`, or the path of a unix socket."""
    if isinstance(name, tuple):
        return f"[{name[0]}]:{name[1]}" if ":" in name[0] else f"{name[0]}:{name[1]}"
    return name.decode() if isinstance(name, bytes) else str(name or "")
