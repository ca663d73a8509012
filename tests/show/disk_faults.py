"""A disk that fails under a live daemon: no OK after a failed sync, reads and PING go on, recovery without a restart.

python tests/show/disk_faults.py [--quick]      (needs strace; the full disk needs root, for a small tmpfs)

strace is attached to the running daemon and lets system calls fail; the fault ends when it is detached. While it lasts
a client writes small and large strings, hashes and snapshots, reads, and sends PING. Every answer is noted. Then the
daemon must accept writes again by itself; it is killed with SIGKILL and started again. What was acknowledged must be
there, what was refused must not. In doubt are only the writes of the round that failed: their error says that they are
tried again, so each may be there whole or not at all. Under `everysec` an OK promises the disk only after a second:
there the writes count that came a second and more before the fault, or after it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from kvdb_tools.check import check
from kvdb_tools.cli.connection import Connection
from kvdb_tools.daemon import Caller, CommandError, Daemon

RECOVERY_LIMIT_S = 5.0
PING_LIMIT_S = 1.0
MODEL = "synthetic:dsv4-nano,page_tokens=128"
SYNCS = "fdatasync,fsync,msync,sync_file_range"
PAGES = "pwrite64,pwritev,writev,write"
TMPFS_BYTES = 48 << 20


@dataclass(frozen=True)
class Fault:
    """What fails. calls: of every file, or of the index alone. when: strace's expression, every call by default."""

    name: str
    calls: str = ""
    error: str = "EIO"
    index_only: bool = False
    when: str = "1+"
    fills_disk: bool = False


FAULTS = [
    Fault("EIO of every sync", SYNCS),
    Fault("EIO of every second sync", SYNCS, when="2+2"),
    Fault("EIO of writes to the index (pages and meta page)", PAGES, index_only=True),
    Fault("EIO of every second write to the index", PAGES, index_only=True, when="2+2"),
    Fault("EIO of every third write to the index", PAGES, index_only=True, when="3+3"),
    # Meets meta pages most of the time: LMDB gives the environment up, and the daemon opens it again.
    Fault("EIO of every fifth pwrite to the index", "pwrite64", index_only=True, when="5+5"),
    Fault("ENOSPC of writes to the index", PAGES, error="ENOSPC", index_only=True),
    Fault("EIO of writes anywhere but to the index's end", "pwrite64,pwritev,writev"),
    Fault("a full disk (tmpfs of 48 MB)", fills_disk=True),
]
QUICK = (("always", FAULTS[0]), ("always", FAULTS[2]))


@dataclass
class Notes:
    """What was answered. `held`: key -> value that must be there; `refused`: key -> value before the refused write."""

    held: dict[str, bytes | None] = field(default_factory=dict)
    refused: dict[str, bytes | None] = field(default_factory=dict)
    in_doubt: dict[str, list[bytes]] = field(default_factory=dict)
    unsure: set[str] = field(default_factory=set)
    n_ok_during: int = 0
    texts: set[str] = field(default_factory=set)
    n_refused: int = 0
    words: dict[str, int] = field(default_factory=dict)
    worst_ping_s: float = 0.0
    problems: list[str] = field(default_factory=list)


class Trial:
    """One fault in one mode."""

    def __init__(self, mode: str, fault: Fault, folder: Path) -> None:
        self.mode, self.fault = mode, fault
        self.daemon = Daemon(folder / "data", {"model": MODEL, "appendfsync": mode})
        self.notes = Notes()
        self.recovery_s = 0.0
        self.n_written = 0

    def run(self, seconds: float) -> None:
        notes = self.notes
        with self.daemon as daemon:
            with Connection(daemon.target, timeout=60) as connection:
                call = Caller(connection)
                call("PREFILL", "live", "TOKENS", 3, 1, 2, 3)
                call("SNAPSHOT", "live", "kept")
                for number in range(20):
                    self.write(call, number)
                time.sleep(1.5 if self.mode == "everysec" else 0)
                self.settle()
                with self.failing(daemon):
                    until = time.monotonic() + seconds
                    while time.monotonic() < until:
                        self.write(call, self.n_written)
                        self.look_on(call)
                        time.sleep(0.01)
                    if self.mode == "always" and self.fault.when == "1+":
                        self.insist(call)
                began = time.monotonic()
                while not self.write(call, self.n_written):
                    if time.monotonic() - began > 30:
                        notes.problems.append("writes were not accepted again within 30 s")
                        break
                    time.sleep(0.01)
                self.recovery_s = time.monotonic() - began
                for _ in range(10):
                    if not self.write(call, self.n_written):
                        notes.problems.append("a write was refused after one had been accepted again")
                time.sleep(1.5 if self.mode == "everysec" else 0)
                self.settle()
            daemon.kill()
            daemon.start()
            with Connection(daemon.target, timeout=60) as connection:
                self.compare(Caller(connection), "after SIGKILL and restart")
        findings = check(daemon.directory, deep=True, mend=False).findings
        notes.problems += [f"kvdb-check: {finding.message}" for finding in findings]

    @contextmanager
    def failing(self, daemon: Daemon) -> Iterator[None]:
        if self.fault.fills_disk:
            filler = daemon.directory / "filler"
            free = os.statvfs(daemon.directory)
            with filler.open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, max(free.f_bavail * free.f_frsize - (1 << 20), 1))
            yield
            filler.unlink()
            return
        words = ["strace", "-f", "-qq", "-o", "/dev/null", "-p", str(daemon.pid)]
        if self.fault.index_only:
            words += ["-P", str(daemon.directory / "index" / "data.mdb")]
        fault = f"inject={self.fault.calls}:error={self.fault.error}:when={self.fault.when}"
        strace = subprocess.Popen([*words, "-e", f"trace={self.fault.calls}", "-e", fault])
        status = Path(f"/proc/{daemon.pid}/task")
        while any("TracerPid:\t0\n" in (task / "status").read_text() for task in status.iterdir()):
            assert strace.poll() is None, "strace could not be attached"
            time.sleep(0.01)
        yield
        strace.terminate()
        strace.wait()

    def write(self, call: Caller, number: int) -> bool:
        """One write of a kind that goes by the number; whether it was accepted."""
        self.n_written += 1
        size = 200_000 if self.fault.fills_disk else 70_000
        kind = number % 4
        key = f"k{number}" if number % 3 else "same"
        value = os.urandom(8).hex().encode() * (size // 16 if kind == 1 else 1)
        before = self.notes.held.get(key)
        try:
            match kind:
                case 0 | 1:
                    call("SET", key, value)
                case 2:
                    key, before = f"h{number}", None
                    call("HSET", key, "f", value)
                case _:
                    key, before, value = f"snap{number}", None, b"snapshot"
                    call("SNAPSHOT", "live", key)
        except CommandError as error:
            if kind < 3 and "not run" not in str(error):
                self.notes.in_doubt.setdefault(key, []).append(value)
            word = str(error).split()[0]
            self.notes.words[word] = self.notes.words.get(word, 0) + 1
            self.notes.n_refused += 1
            self.notes.texts.add(str(error))
            self.notes.refused[key] = before
            if key not in self.notes.unsure:
                self.notes.held.setdefault(key, before)
            return False
        self.notes.held[key] = value
        self.notes.refused.pop(key, None)
        self.notes.in_doubt.pop(key, None)
        if not key.startswith("snap") and self.mode == "everysec":
            self.notes.unsure.add(key)
        return True

    def settle(self) -> None:
        """Writes under `everysec` are more than a second old now: they must be on disk."""
        if self.notes.n_refused == 0 or self.recovery_s:
            self.notes.unsure.clear()

    def insist(self, call: Caller) -> None:
        """With every sync failing nothing may be acknowledged at all."""
        for kind in range(4):
            if self.write(call, 4 * 1_000_000 + kind):
                self.notes.n_ok_during += 1

    def look_on(self, call: Caller) -> None:
        """PING and reads while the disk fails."""
        began = time.monotonic()
        if call("PING") != "PONG":
            self.notes.problems.append("PING was not answered with PONG")
        self.notes.worst_ping_s = max(self.notes.worst_ping_s, time.monotonic() - began)
        try:
            call("GET", "k1")
            call("HGETALL", "h2")
            call("SNAPINFO", "kept")
            call("SAMPLE", "kept")
            call("EXISTS", "same")
        except CommandError as error:
            self.notes.problems.append(f"a read was refused: {error}")
        if self.mode == "always":
            self.compare(call, "while the disk failed", list(self.notes.refused)[-3:])

    def compare(self, call: Caller, when: str, keys: list[str] | None = None) -> None:
        for key in list(self.notes.held) if keys is None else keys:
            if key in self.notes.unsure:
                continue
            wanted = self.notes.held.get(key)
            if key.startswith("snap"):
                found: object = b"snapshot" if call("EXISTS", key) else None
            else:
                found = call("HGET", key, "f") if key.startswith("h") else call("GET", key)
            if found != wanted and found not in self.notes.in_doubt.get(key, []):
                self.notes.problems.append(f"{when}: {key} is {str(found)[:20]}, not {str(wanted)[:20]}")


@contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    words = ["mount", "-t", "tmpfs", "-o", f"size={TMPFS_BYTES}", "tmpfs", str(folder)]
    subprocess.run(words, check=True, capture_output=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def verdict(trial: Trial) -> str:
    """The first thing that is wrong, or an empty text."""
    notes = trial.notes
    if notes.problems:
        return f"{len(notes.problems)} problems: {notes.problems[0]}"
    if not notes.n_refused:
        return "the fault was never seen"
    if notes.n_ok_during:
        return f"{notes.n_ok_during} writes were acknowledged with the disk failing"
    if trial.recovery_s > RECOVERY_LIMIT_S:
        return "recovery took too long"
    return "PING was slow" if notes.worst_ping_s > PING_LIMIT_S else ""


@click.command()
@click.option("--quick", is_flag=True, help="Two faults, half a second each.")
@click.option("--verbose", is_flag=True, help="Print the texts of the errors.")
@click.option("--seconds", default=4.0, show_default=True, help="How long each fault lasts.")
def main(quick: bool, verbose: bool, seconds: float) -> None:
    """Print one line a fault; exit 1 when a promise is broken."""
    console = Console(highlight=False)
    if shutil.which("strace") is None:
        console.print("strace is not installed: nothing can be shown")
        raise SystemExit(0 if quick else 2)
    table = Table(title="faults of the disk under a live daemon")
    for name in ("fault", "appendfsync", "writes", "refused", "with", "slowest PING ms", "accepted again after s", ""):
        table.add_column(name)
    trials = [(mode, fault) for fault in FAULTS for mode in ("always", "everysec")]
    n_wrong = 0
    for mode, fault in QUICK if quick else trials:
        with tempfile.TemporaryDirectory() as scratch:
            trial = Trial(mode, fault, Path(scratch))
            if not fault.fills_disk:
                trial.run(0.5 if quick and mode == "always" else 1.5 if quick else seconds)
            elif os.geteuid() == 0:
                with small_disk(Path(scratch)):
                    trial.run(seconds)
            else:
                console.print(f"{fault.name}: skipped, mounting needs root")
                continue
            notes = trial.notes
            wrong = verdict(trial)
            for problem in notes.problems[:10]:
                console.print(f"{fault.name}, {mode}: {problem}", markup=False)
            n_wrong += bool(wrong)
            if verbose:
                console.print(*sorted(notes.texts), sep="\n", markup=False)
            words = ", ".join(f"{word} {count}" for word, count in sorted(notes.words.items()))
            table.add_row(
                *(fault.name, mode, str(trial.n_written), str(notes.n_refused), words),
                *(f"{notes.worst_ping_s * 1e3:.0f}", f"{trial.recovery_s:.2f}", wrong or "holds"),
            )
    console.print(table)
    console.print(f"{table.row_count} faults, {n_wrong} with a broken promise")
    raise SystemExit(1 if n_wrong else 0)


if __name__ == "__main__":
    main()
