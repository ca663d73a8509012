"""The daemon's side of an engine worker: start it, talk to it, notice when it dies, put it to rest.

One client per model. A worker is started by the first call and has a *generation*: live states belong to one
generation, and when the worker ends, for whatever reason, every state of that generation is gone. The sessions compare
generations instead of being told.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from kvdb.errors import BusyError, CancelledError, CorruptError, EngineDownError, KvdbError, NoEngineError, NoSpaceError
from kvdb_protocol.errors import FormatError
from kvdb_protocol.frames import FrameReader, Message, encode_frame

log = logging.getLogger("kvdb.engine")

START_TIMEOUT_S = 600  # a full-size model is 80 GB to read
STOP_TIMEOUT_S = 10
CANCELLABLE = ("extend", "generate")

T = TypeVar("T")
EventHandler = Callable[[Message], None]

_ERRORS: dict[str, type[KvdbError]] = {
    error.word: error for error in (CancelledError, CorruptError, EngineDownError, NoEngineError, NoSpaceError)
}


async def finish(work: Awaitable[T], on_cancel: Callable[[], object] = lambda: None) -> T:
    """Wait until `work` is over even if the caller is cancelled meanwhile, however often; then be cancelled.

    So whoever holds a lock keeps it until what was begun under it has ended.
    """
    future = asyncio.ensure_future(work)
    cancelled: asyncio.CancelledError | None = None
    while not future.done():
        try:
            await asyncio.wait([future])
        except asyncio.CancelledError as error:
            cancelled = error
            on_cancel()
    if cancelled is None:
        return future.result()
    if not future.cancelled():
        future.exception()  # seen: nobody waits for it any more
    raise cancelled


class _Request:
    """A request under way: where its events go."""

    __slots__ = ("done", "error", "future", "on_event", "op", "sid", "started", "total")

    def __init__(
        self, op: str, sid: bytes | None, future: asyncio.Future[Message], on_event: EventHandler | None
    ) -> None:
        self.op = op
        self.sid = sid
        self.future = future
        self.on_event = on_event
        self.started = time.monotonic()
        self.done = self.total = 0
        self.error: Exception | None = None  # what the handler of events raised


class EngineClient:
    """Calls into the worker of one model."""

    def __init__(self, spec: str, name: str) -> None:
        self.spec = spec
        self.name = name
        self.generation = 0
        self.process: asyncio.subprocess.Process | None = None
        self.stats: dict[str, Any] = {}
        self.resident_bytes = 0
        self.starts = 0
        self.queue_limit = 1000
        self.is_closing = False  # the daemon is about to end: no new worker, prefill or generation
        self.last_used = time.monotonic()
        self.started_at = 0.0
        self._heard = 0.0
        self._writer: asyncio.StreamWriter | None = None
        self._requests: dict[int, _Request] = {}
        self._next = 0
        self._starting: asyncio.Task[None] | None = None
        self._pump: asyncio.Task[None] | None = None

    @property
    def running(self) -> bool:
        """Whether a worker is up and ready."""
        return self._writer is not None

    @property
    def pending(self) -> int:
        """Requests under way."""
        return len(self._requests)

    async def start(self) -> None:
        """Start the worker if it is not up. Raises NoEngineError with the worker's own reason.

        A caller that is cancelled does not stop the start: a large model would never be up if each impatient client
        ended its loading.
        """
        if self.running:
            return
        if self.is_closing:
            raise EngineDownError("the daemon is shutting down")
        if self._starting is None:
            self._starting = asyncio.create_task(self._start())
            self._starting.add_done_callback(self._started)
        starting = self._starting
        await asyncio.wait([starting])
        if starting.cancelled():
            raise EngineDownError("the engine worker was unloaded while it started")
        starting.result()

    def _started(self, done: asyncio.Task[None]) -> None:
        self._starting = None
        if not done.cancelled() and (error := done.exception()) is not None:
            log.warning("%s", error)

    async def _start(self) -> None:
        # Not before the last one has ended: it may still be writing where the next one is told to write.
        await self._end_process()
        began = time.monotonic()
        ours, theirs = socket.socketpair()
        try:
            # -P: a file in the user's folder can neither break nor hijack the worker.
            self.process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-P", "-m", "kvdb_engine", self.spec, str(theirs.fileno())),
                pass_fds=(theirs.fileno(),),
                stdin=asyncio.subprocess.DEVNULL,
            )
        except OSError as error:
            ours.close()
            raise NoEngineError(f"the engine worker could not be started: {error}") from error
        finally:
            theirs.close()
        reader, writer = await asyncio.open_unix_connection(sock=ours)
        frames = FrameReader()
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                hello = await self._hello(reader, frames)
            if hello["ev"] == "fatal":
                raise NoEngineError(f"model {self.name} cannot be run: {hello['message']}")
        except BaseException as error:
            writer.close()
            self.kill()  # it has nothing to lose, and would notice the closed socket only after it has loaded
            await self._end_process()
            if isinstance(error, TimeoutError | EngineDownError):
                raise NoEngineError(f"the engine worker of model {self.name} did not start: {error}") from error
            raise
        self.stats = hello["stats"]
        self.generation += 1
        self.starts += 1
        self.started_at = time.monotonic()
        self._writer = writer
        self._pump = asyncio.create_task(self._read(reader, frames, writer))
        log.info("engine worker of %s is up after %.1f s", self.name, time.monotonic() - began)

    async def _hello(self, reader: asyncio.StreamReader, frames: FrameReader) -> Message:
        while True:
            data = await reader.read(1 << 20)
            if not data:
                raise EngineDownError("it ended before it was ready; its standard error says why")
            for message in frames.feed(data):
                return message

    async def _read(self, reader: asyncio.StreamReader, frames: FrameReader, writer: asyncio.StreamWriter) -> None:
        """Deliver events until the worker closes its end."""
        reason = "the engine worker ended"
        try:
            while data := await reader.read(1 << 20):
                for message in frames.feed(data):
                    self._deliver(message)
        except Exception as error:  # a frame that makes no sense: better no worker than one that is not understood
            reason = f"the engine worker's stream broke: {error!r}"
            self.kill()
        if self._writer is writer:
            self._down(reason)
            log.warning("%s (exit code %s)", reason, await self._end_process())

    def _deliver(self, message: Message) -> None:
        self._heard = time.monotonic()
        request = self._requests.get(message["id"])
        if request is None:
            return
        if message["ev"] == "done":
            self.resident_bytes, self.stats = message["bytes"], message["stats"]
            del self._requests[message["id"]]
            if request.future.done():
                return
            if request.error is None:
                request.future.set_result(message)
            else:
                request.future.set_exception(request.error)
        elif message["ev"] == "error":
            del self._requests[message["id"]]
            error = request.error or _ERRORS.get(message["word"], KvdbError)(message["message"])
            if not request.future.done():
                request.future.set_exception(error)
        else:
            if message["ev"] == "progress":
                request.done, request.total = message["done"], message["total"]
            else:
                request.done += 1
            if request.on_event is None:
                return
            try:
                request.on_event(message)
            except Exception as error:
                # Its caller's fault alone: the worker and everyone else go on. The caller hears of it when the request
                # has ended, as of any other end.
                request.error, request.on_event = error, None
                if request.op in CANCELLABLE:
                    self._cancel(message["id"])

    def _down(self, reason: str) -> None:
        """The worker is gone: its states with it. Fail what waits; callers may retry."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        self.generation += 1
        self.resident_bytes = 0
        waiting, self._requests = self._requests, {}
        for request in waiting.values():
            if not request.future.done():
                request.future.set_exception(EngineDownError(f"{reason}; retry: the session resumes from its snapshot"))

    async def _end_process(self) -> int | None:
        """Wait until the process is gone; its socket is closed, so it ends by itself or is killed."""
        process = self.process
        if process is None:
            return None
        try:
            async with asyncio.timeout(STOP_TIMEOUT_S):
                code = await process.wait()
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            code = await process.wait()
        if self.process is process:
            self.process = None
        return code

    def admit(self) -> None:
        """Whether a prefill or generation may begin now. Raises BusyError, or CancelledError at shutdown."""
        if self.is_closing:
            raise CancelledError("the daemon is shutting down; the session stays at its last complete token")
        # Only what takes turns: one FORK can ask for a thousand copies, and each takes no time.
        n_waiting = sum(request.op in CANCELLABLE for request in self._requests.values())
        if n_waiting >= self.queue_limit:
            raise BusyError(f"{n_waiting} requests wait for the engine already (engine-queue-limit): try later")

    async def call(self, op: str, on_event: EventHandler | None = None, **fields: Any) -> Message:
        """Send one request and wait for its `done`. Events before it go to `on_event`.

        If the caller is cancelled, prefills and generations are cancelled at their next border and other work is
        waited for; this returns only after the worker has said what became of it, so the session's tokens are known.
        Raises what the worker reports, or EngineDownError when it ends.
        """
        await self.start()
        return await self.ask(op, on_event, **fields)

    def ask(self, op: str, on_event: EventHandler | None = None, **fields: Any) -> Coroutine[Any, Any, Message]:
        """The same of a worker that is up: the request is sent when this returns, ahead of all that are made later."""
        if self._writer is None:
            raise EngineDownError("the engine worker ended; retry: the session resumes from its snapshot")
        if op in CANCELLABLE:
            self.admit()
        self._next += 1
        number = self._next
        try:
            frame = encode_frame({"op": op, "id": number, **fields})
        except FormatError as error:
            raise KvdbError(str(error)) from None
        future: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
        self._requests[number] = _Request(op, fields.get("sid"), future, on_event)
        self.last_used = time.monotonic()
        try:
            self._writer.write(frame)
        except Exception as error:  # the transport has noticed that the worker is gone, and `_read` has not yet
            del self._requests[number]
            raise EngineDownError("the engine worker ended; retry: the session resumes from its snapshot") from error
        return self._answer(number, op, future)

    async def _answer(self, number: int, op: str, future: asyncio.Future[Message]) -> Message:
        try:
            return await finish(future, on_cancel=lambda: self._cancel(number) if op in CANCELLABLE else None)
        finally:
            self.last_used = time.monotonic()

    async def forget(self, sid: bytes) -> None:
        """Let the worker drop a session's state, whether it has one or not."""
        if self.running:
            with contextlib.suppress(EngineDownError):
                await self.call("close", sid=sid)

    def _cancel(self, number: int) -> None:
        if self._writer is not None and number in self._requests:
            self._writer.write(encode_frame({"op": "cancel", "id": 0, "target": number}))

    def cancel(self, sid: bytes | None = None) -> int:
        """Ask the worker to stop the prefills and generations of a session, or all; returns how many there were.

        Their callers get CancelledError; the session stays valid at its last complete token.
        """
        found = [
            number
            for number, request in self._requests.items()
            if request.op in CANCELLABLE and (sid is None or request.sid == sid)
        ]
        for number in found:
            self._cancel(number)
        return len(found)

    def silent_for(self) -> float:
        """Seconds in which requests waited and the worker said nothing at all; 0 without requests."""
        if not self._requests:
            return 0.0
        oldest = min(request.started for request in self._requests.values())
        return time.monotonic() - max(self._heard, oldest)

    def requests(self) -> list[tuple[bytes | None, str, int, int, float]]:
        """(session uid, op, tokens done, tokens in all or 0, seconds) of each request under way, oldest first."""
        now = time.monotonic()
        return [(r.sid, r.op, r.done, r.total, now - r.started) for r in self._requests.values()]

    def kill(self) -> None:
        """End a hanging worker; its requests fail with EngineDownError."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                self.process.send_signal(signal.SIGKILL)

    async def stop(self) -> None:
        """Close the socket, which ends the worker, and wait for it. A start under way is given up."""
        if self._starting is not None:
            self._starting.cancel()
            await asyncio.wait([self._starting])
        if self._writer is not None:
            self._down("the engine worker was unloaded")
        await self._end_process()

    def rss_bytes(self) -> int:
        """Resident memory of the worker process, 0 if there is none or the platform does not tell."""
        if self.process is None:
            return 0
        try:
            with open(f"/proc/{self.process.pid}/statm") as file:  # noqa: PTH123
                return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")
        except (OSError, ValueError):
            return 0
