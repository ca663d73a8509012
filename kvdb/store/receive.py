"""Large strings on their way from a client into a segment, never whole in memory.

Each one has a writer of its own while it comes in, hence a segment that nobody else appends to: what is broken off is
written over by the next, and a crash leaves only bytes past the committed length, which do not exist. The record's
header is written last. A complete string is not committed: its HeldString becomes the value of an entry, and the round
that takes the entry syncs the segment; without one its range is given back.
"""

from __future__ import annotations

import asyncio
import errno
import logging
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future
from functools import partial
from itertools import count

from kvdb.store.entries import HeldString
from kvdb.store.errors import as_kvdb_error
from kvdb.store.files import Files
from kvdb.store.records import Reservation
from kvdb.store.segments import Segments
from kvdb.store.strings import Sums
from kvdb.store.threads import Threads
from kvdb.store.work import Extent
from kvdb_protocol.record import ALIGN, HEADER_BYTES, padding, record_bytes

log = logging.getLogger("kvdb.store")

# Synced so often while it comes in: then the round that commits a string does not make others wait for its bytes.
SYNC_BYTES = 16 << 20
# The system is told to write so much at a time.
WRITEBACK_BYTES = 512 << 10
# Segments that are kept open for the next strings; one that more clients sent at a time is closed for good.
IDLE_WRITERS = 4
WRITER = "string-"


class Receiver:
    """Makes Incoming strings. Event-loop thread."""

    def __init__(
        self,
        pool: Threads,
        segments: Segments,
        files: Files,
        reserve: Callable[[str, int], Awaitable[Reservation]],
    ) -> None:
        """pool: its threads write and sync, which readers shall not have to wait for.

        reserve: makes room under `maxstore`, then takes the append position of a writer (Store.reserve).
        """
        self.pool = pool
        self.segments = segments
        self.files = files
        self._reserve = reserve
        self._numbers = count(1)
        self._idle: list[str] = []

    async def begin(self, n_bytes: int) -> Incoming:
        """Reserve a place for a string of this length. Raises KvdbError if there is no room for it."""
        writer = self._idle.pop() if self._idle else f"{WRITER}{next(self._numbers)}"
        try:
            return Incoming(self, writer, await self._reserve(writer, record_bytes(n_bytes)))
        except BaseException:
            self.free(writer)
            raise

    def free(self, writer: str) -> None:
        """The string of this writer has come in, or was broken off."""
        if len(self._idle) < IDLE_WRITERS:
            self._idle.append(writer)
        else:
            self.segments.release(writer)


class Incoming:
    """One string. Its calls are made one after the other; each works in a thread."""

    def __init__(self, receiver: Receiver, writer: str, reservation: Reservation) -> None:
        self._receiver = receiver
        self._writer = writer
        self._reservation = reservation
        self._files = receiver.files
        self._fd = -1
        self._sums = Sums()
        self._begun = reservation.offset + ALIGN  # up to here writing to the disk has begun; the header is written last
        self._synced = 0

    async def write(self, pieces: Sequence[bytes]) -> None:
        """The next bytes. Raises KvdbError."""
        await self._in_thread(partial(self._write, pieces))

    async def finish(self, pieces: Sequence[bytes], string: HeldString, *, is_urgent: bool = False) -> None:
        """The last bytes: `string` stands for all of them now. Raises KvdbError.

        is_urgent: somebody will wait for its commit, so the same thread goes on with the sync while its entry is made.
        """
        if is_urgent:
            string.sync = Future()
        await self._in_thread(
            partial(self._finish, pieces, string), partial(self._sync_ahead, string) if is_urgent else None
        )
        self._receiver.free(self._writer)

    async def abandon(self) -> None:
        """Give up: the bytes are given back. Also after an error."""
        try:
            await self._in_thread(self._abandon)
        finally:
            self._receiver.free(self._writer)

    async def _in_thread(self, function: Callable[[], None], then: Callable[[], None] | None = None) -> None:
        try:
            # Shielded: the thread goes on when the task is cancelled, so the next call must not begin before.
            await asyncio.shield(self._receiver.pool.run(function, then))
        except OSError as error:
            raise as_kvdb_error(error, "receiving a string") from error

    # In a thread from here on.

    def _write(self, pieces: Sequence[bytes], behind: bytes = b"") -> None:
        files, sums = self._files, self._sums
        if self._fd < 0:
            self._fd = files.open(self._reservation.path, write=True)
        begin = self._reservation.offset + HEADER_BYTES + sums.n_bytes
        files.write_pieces(self._fd, [*pieces, behind], begin)
        # The disk works while the bytes are hashed. Whole blocks only: one on its way cannot be written to.
        end = (begin + sum(map(len, pieces))) // ALIGN * ALIGN
        if end - self._begun >= WRITEBACK_BYTES:
            files.start_writeback(self._fd, self._begun, end - self._begun)
            self._begun = end
        for piece in pieces:
            sums.add(piece)
        if sums.n_bytes - self._synced >= SYNC_BYTES:
            self._sync()

    def _sync(self) -> None:
        self._receiver.segments.datasync(self._reservation.segment_id)
        self._synced = self._sums.n_bytes

    def _finish(self, pieces: Sequence[bytes], string: HeldString) -> None:
        self._write(pieces, padding(string.n_bytes))
        segments, reservation = self._receiver.segments, self._reservation
        head, ref = self._sums.end(reservation.segment_id, reservation.offset)
        self._files.write(self._fd, head, ref.offset)
        self._close()
        extent = Extent(ref.segment, ref.offset, record_bytes(ref.n_bytes))
        segments.submitted(ref.segment)
        let_go = partial(segments.dropped, extent, segments.pins.hold(extent))
        segments.advance(self._writer, reservation, extent.offset + extent.n_bytes)
        string.complete(ref, reservation.created_ms, False, let_go)

    def _sync_ahead(self, string: HeldString) -> None:
        """Holding the string keeps its segment open until the sync has returned."""
        assert string.sync is not None and string.ref is not None
        problem = None
        try:
            self._receiver.segments.datasync(string.ref.segment)
        except Exception as error:
            problem = (getattr(error, "errno", None) or errno.EIO, str(error))
        string.sync.set_result(problem)

    def _abandon(self) -> None:
        if self._fd < 0:
            return
        try:
            self._files.truncate(self._fd, self._reservation.offset)
        except OSError as error:
            log.warning("bytes of a string that was broken off stay until the next one: %s", error)
        self._close()

    def _close(self) -> None:
        fd, self._fd = self._fd, -1
        self._files.close(fd)
