"""Implementations of the fault seam: one fails chosen calls, one records everything and replays power losses."""

from __future__ import annotations

import errno
import os
import random
import threading
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kvdb.store.files import OsFiles, Readable, Writable

SECTOR = 512


class FailingFiles(OsFiles):
    """Fails calls by name: the n-th from now, or all, with an errno. Counts every call."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self._rules: list[list[object]] = []  # [names, calls left before it fires, how often it fires, errno]
        self._lock = threading.Lock()

    def fail(self, *names: str, after: int = 0, times: int = 1 << 30, code: int = errno.EIO) -> None:
        """Let calls with these names (all, if none) fail `times` times, after `after` that succeed."""
        self._rules.append([names, after, times, code])

    def heal(self) -> None:
        self._rules.clear()

    def _called(self, name: str) -> None:
        with self._lock:
            self.calls.append(name)
            for rule in self._rules:
                names, after, times, code = rule
                if names and name not in names:  # type: ignore[operator]
                    continue
                if after:  # type: ignore[truthy-bool]
                    rule[1] = after - 1  # type: ignore[operator]
                elif times:
                    rule[2] = times - 1  # type: ignore[operator]
                    raise OSError(code, os.strerror(code))  # type: ignore[arg-type]

    def create(self, path: Path) -> int:
        self._called("create")
        return super().create(path)

    def open(self, path: Path, *, write: bool) -> int:
        self._called("open")
        return super().open(path, write=write)

    def read_into(self, fd: int, buffer: Writable, offset: int) -> int:
        self._called("read")
        return super().read_into(fd, buffer, offset)

    def read(self, fd: int, n_bytes: int, offset: int) -> bytes:
        self._called("read")
        return super().read(fd, n_bytes, offset)

    def read_cached(self, fd: int, buffer: Writable, offset: int) -> bool:
        self._called("read")
        return super().read_cached(fd, buffer, offset)

    def write(self, fd: int, data: Readable, offset: int) -> None:
        try:
            self._called("write")
        except OSError:
            super().write(fd, memoryview(data)[: len(data) // 2], offset)  # a full disk takes what fits
            raise
        super().write(fd, data, offset)

    def write_pieces(self, fd: int, pieces: Sequence[Readable], offset: int) -> None:
        self.write(fd, b"".join(pieces), offset)

    def datasync(self, fd: int) -> None:
        self._called("datasync")
        super().datasync(fd)

    def sync_dir(self, path: Path) -> None:
        self._called("sync_dir")
        super().sync_dir(path)

    def truncate(self, fd: int, n_bytes: int) -> None:
        self._called("truncate")
        super().truncate(fd, n_bytes)

    def allocate(self, fd: int, n_bytes: int) -> None:
        self._called("allocate")
        super().allocate(fd, n_bytes)

    def punch(self, fd: int, offset: int, n_bytes: int) -> bool:
        self._called("punch")
        return super().punch(fd, offset, n_bytes)

    def unlink(self, path: Path) -> None:
        self._called("unlink")
        super().unlink(path)

    def commit(self, commit: Callable[[], None]) -> None:
        self._called("commit")
        super().commit(commit)


@dataclass
class File:
    """A file as a disk may hold it: what was synced, and what was done since."""

    synced: bytearray = field(default_factory=bytearray)
    pending: list[tuple[str, int, bytes]] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)  # of the events that are pending
    is_name_synced: bool = False


def apply(content: bytearray, change: tuple[str, int, bytes]) -> None:
    kind, offset, data = change
    if kind == "truncate":
        del content[offset:]
        content.extend(bytes(offset - len(content)))
        return
    content.extend(bytes(max(0, offset + len(data) - len(content))))
    content[offset : offset + len(data)] = data


@dataclass
class Event:
    """One entry of the log: a call with its data, or a note of the test. offset, of a datasync: events before it."""

    name: str
    path: Path | None = None
    offset: int = 0
    data: bytes = b""
    note: object = None


class LoggingFiles(OsFiles):
    """Does everything for real and keeps a log from which the disk after a power loss at any moment can be made.

    The index is taken whole at each commit: LMDB promises the state of some commit that is not older than the last one
    that returned, so a power loss sees the copy of the last finished commit, or of the one that was under way.
    """

    def __init__(self, index: Path) -> None:
        self.log: list[Event] = []
        self._index = index / "data.mdb"
        self._paths: dict[int, Path] = {}
        self._lock = threading.Lock()

    def note(self, note: object) -> None:
        """Something the test says happened now."""
        self._add(Event("note", note=note))

    def _add(self, event: Event) -> None:
        with self._lock:
            self.log.append(event)

    def take_index(self) -> None:
        self._add(Event("commit", data=self._index.read_bytes()))

    def create(self, path: Path) -> int:
        fd = super().create(path)
        self._paths[fd] = path
        self._add(Event("create", path))
        return fd

    def open(self, path: Path, *, write: bool) -> int:
        fd = super().open(path, write=write)
        self._paths[fd] = path
        return fd

    def write(self, fd: int, data: Readable, offset: int) -> None:
        super().write(fd, data, offset)
        self._add(Event("write", self._paths[fd], offset, bytes(data)))

    def write_pieces(self, fd: int, pieces: Sequence[Readable], offset: int) -> None:
        for piece in pieces:
            self.write(fd, piece, offset)
            offset += len(piece)

    def truncate(self, fd: int, n_bytes: int) -> None:
        super().truncate(fd, n_bytes)
        self._add(Event("truncate", self._paths[fd], n_bytes))

    def punch(self, fd: int, offset: int, n_bytes: int) -> bool:
        self._add(Event("write", self._paths[fd], offset, bytes(n_bytes)))
        return super().punch(fd, offset, n_bytes)

    def datasync(self, fd: int) -> None:
        # What others write while a sync is under way it need not have seen.
        with self._lock:
            n_before = len(self.log)
        super().datasync(fd)
        if self._paths[fd] == self._index:
            self.take_index()  # as a start does, of what a killed daemon may have left in memory
        else:
            self._add(Event("datasync", self._paths[fd], n_before))

    def sync_dir(self, path: Path) -> None:
        super().sync_dir(path)
        self._add(Event("sync_dir", path))

    def unlink(self, path: Path) -> None:
        super().unlink(path)
        self._add(Event("unlink", path))

    def commit(self, commit: Callable[[], None]) -> None:
        super().commit(commit)
        self.take_index()


class KilledFiles(LoggingFiles):
    """Stops after some calls that change something, as a daemon that is killed; the last one may be done in part.

    What it leaves is in the page cache: the next life finds it, a power loss may not.
    """

    def __init__(self, index: Path, rng: random.Random) -> None:
        super().__init__(index)
        self.calls_left: int | None = None
        self._rng = rng
        self._kill_lock = threading.Lock()

    def _is_last(self) -> bool:
        """Whether this call is the one in which it is killed. Raises OSError in later ones."""
        with self._kill_lock:
            if self.calls_left is None:
                return False
            self.calls_left -= 1
            if self.calls_left < 0:
                raise OSError(errno.EIO, "killed")
            return self.calls_left == 0

    def _do(self, call: Callable[[], None]) -> None:
        is_last = self._is_last()
        if not is_last or self._rng.random() < 0.5:
            call()
        if is_last:
            raise OSError(errno.EIO, "killed")

    def create(self, path: Path) -> int:
        if self._is_last():
            raise OSError(errno.EIO, "killed")
        return super().create(path)

    def write(self, fd: int, data: Readable, offset: int) -> None:
        is_last = self._is_last()
        view = memoryview(data).cast("B")
        done = self._rng.randrange(len(view) + 1) if is_last else len(view)
        super().write(fd, view[:done], offset)
        if is_last:
            raise OSError(errno.EIO, "killed")

    def truncate(self, fd: int, n_bytes: int) -> None:
        self._do(lambda: super(KilledFiles, self).truncate(fd, n_bytes))

    def datasync(self, fd: int) -> None:
        self._do(lambda: super(KilledFiles, self).datasync(fd))

    def sync_dir(self, path: Path) -> None:
        self._do(lambda: super(KilledFiles, self).sync_dir(path))

    def unlink(self, path: Path) -> None:
        self._do(lambda: super(KilledFiles, self).unlink(path))

    def punch(self, fd: int, offset: int, n_bytes: int) -> bool:
        self._do(lambda: None)
        return super().punch(fd, offset, n_bytes)

    def commit(self, commit: Callable[[], None]) -> None:
        if self._is_last():
            if self._rng.random() < 0.5:
                commit()  # in memory only: the disk may have none of it
            raise OSError(errno.EIO, "killed")
        super().commit(commit)


def power_loss(log: list[Event], length: int, rng: random.Random, folder: Path) -> None:
    """Make `folder` what a disk may hold when power is lost after the first `length` events.

    Each write since a file's last sync is kept, dropped or torn at a sector, one by one: that covers reordering. Names
    whose directory was not synced may be there or not.
    """
    files: dict[Path, File] = {}
    gone: dict[Path, File] = {}
    index = b""
    for number, event in enumerate(log[:length]):
        path = event.path
        match event.name:
            case "create":
                assert path is not None
                files[path] = File()
            case "write" | "truncate" if path in files:
                files[path].pending.append((event.name, event.offset, event.data))
                files[path].numbers.append(number)
            case "datasync" if path in files:
                n_synced = bisect_left(files[path].numbers, event.offset)
                for change in files[path].pending[:n_synced]:
                    apply(files[path].synced, change)
                del files[path].pending[:n_synced], files[path].numbers[:n_synced]
            case "unlink" if path in files:
                assert path is not None
                gone[path] = files.pop(path)
            case "sync_dir":
                for name, file in files.items():
                    file.is_name_synced |= name.parent == path
                gone = {name: file for name, file in gone.items() if name.parent != path}
            case "commit":
                index = event.data
    (folder / "index").mkdir(parents=True)
    (folder / "segments").mkdir()
    if index:
        (folder / "index" / "data.mdb").write_bytes(index)
    survivors = dict(files)
    survivors.update({path: file for path, file in gone.items() if path not in files and rng.random() < 0.5})
    for path, file in survivors.items():
        if not file.is_name_synced and rng.random() < 0.5:
            continue
        content = bytearray(file.synced)
        for change in file.pending:
            choice = rng.random()
            if choice < 0.4:
                continue
            if choice < 0.7 and change[0] == "write" and len(change[2]) > SECTOR:
                cut = SECTOR * rng.randrange(len(change[2]) // SECTOR)
                first = rng.random() < 0.5
                change = ("write", change[1], change[2][:cut]) if first else (
                    "write", change[1] + cut, change[2][cut:]
                )  # fmt: skip
            apply(content, change)
        (folder / ("segments" if path.suffix == ".seg" else "") / path.name).write_bytes(content)
