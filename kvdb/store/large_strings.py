"""Large strings for those who read them: held while they are on their way to a client, read in checked pieces."""

from __future__ import annotations

from functools import partial

from kvdb.store.committer import Committer
from kvdb.store.entries import HeldString, LargeValue, StringRef, place_of
from kvdb.store.files import Files
from kvdb.store.segments import Segments
from kvdb.store.strings import StringReader, read_string
from kvdb.store.threads import Threads
from kvdb.store.work import Extent
from kvdb_protocol.record import record_bytes


class LargeStrings:
    """The large strings of a store. Event-loop thread; what would wait for a disk is done in the pool."""

    def __init__(
        self,
        pool: Threads,
        files: Files,
        segments: Segments,
        committer: Committer,
    ) -> None:
        self._pool = pool
        self._files = files
        self._segments = segments
        self._committer = committer

    def hold(self, ref: StringRef) -> HeldString:
        """Keep a committed string's record from being freed while the object lives."""
        extent = Extent(ref.segment, ref.offset, record_bytes(ref.n_bytes))
        pin = self._segments.pins.hold(extent)
        string = HeldString(ref.n_bytes)
        string.complete(ref, 0, True, lambda _: pin.release())
        return string

    def read(self, value: LargeValue, start: int = 0, stop: int | None = None) -> bytes:
        """Its bytes from `start` to before `stop`, at once. Raises CorruptError."""
        return read_string(self._segments, self._files, value, start, stop)

    async def open(self, value: LargeValue) -> StringReader:
        """Begin to read a string that is held. Raises CorruptError."""
        reader = StringReader(self._segments.folder, self._files, place_of(value))
        try:
            if not reader.open_cached():
                await self._pool.run(reader.open)
        except BaseException:
            reader.close()
            raise
        return reader

    async def read_into(self, reader: StringReader, start: int, buffer: memoryview) -> int:
        """Fill the buffer with checked pieces of it from `start`; bytes read. Raises CorruptError."""
        return await self._pool.run(partial(reader.read_into, start, buffer))

    def give_back_late(self) -> None:
        """Free what had to wait for a reader that is done now."""
        self._committer.tidy_soon()
