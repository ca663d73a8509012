"""What the scenarios at full geometry share: the synthetic model, made-up tokens, growing a session, timing.

These scenarios drive a real daemon and its worker with `synthetic:dsv4-flash`: states of DeepSeek V4 Flash's exact
shape and packing without the model (docs/performance.md).
"""

from __future__ import annotations

import mmap
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from kvdb_tools.bench.scenario import Settings
from kvdb_tools.cli.reply import Verbatim
from kvdb_tools.daemon import Caller

MODEL = "synthetic:dsv4-flash"
VOCAB = 129280
STEP_TOKENS = 704  # the median step of the agent traces
SIZES = (25_000, 100_000)
FULL_SIZES = (*SIZES, 1_000_000)

U32 = npt.NDArray[np.uint32]


def model_of(settings: Settings) -> str:
    """A synthetic model the user named, else DeepSeek V4 Flash's geometry."""
    return settings.model if "synthetic:" in settings.model else MODEL


def sizes_of(settings: Settings) -> tuple[int, ...]:
    """Context lengths to measure: 25k and 100k tokens; one million with --full."""
    return SIZES[:1] if settings.quick else FULL_SIZES if settings.full else SIZES


def made_up_ids(n_tokens: int, seed: int = 1, vocab: int = VOCAB) -> U32:
    """Random token ids, the same for the same seed."""
    return np.random.default_rng(seed).integers(0, vocab, n_tokens).astype(np.uint32)


def ids_words(ids: U32) -> list[bytes]:
    """`IDS bytes` as the words of a command."""
    return [b"IDS", ids.astype("<u4").tobytes()]


def token_words(ids: U32) -> list[bytes]:
    """`TOKENS n id...` as the words of a command."""
    return [b"TOKENS", b"%d" % len(ids), *(b"%d" % token for token in ids.tolist())]


def grow(call: Caller, session: str, ids: U32, *, is_new: bool) -> None:
    """Append tokens to a session, beginning it when it is new."""
    if len(ids):
        call("PREFILL" if is_new else "EXTEND", session, *ids_words(ids))


def seconds(work: Callable[[], object]) -> float:
    """How long one call takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def median_s(work: Callable[[], object], times: int) -> float:
    """The median of several calls."""
    return statistics.median(seconds(work) for _ in range(times))


def percentile(values: list[float], share: float) -> float:
    """The value below which a share of the values lies (nearest rank)."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def daemon_ms(call: Caller, command: str) -> float:
    """Mean duration of a command as the daemon itself saw it, since the last CONFIG RESETSTAT."""
    reply = call("INFO", "commandstats")
    data = reply.text if isinstance(reply, Verbatim) else reply
    for line in (data.decode() if isinstance(data, bytes) else str(data)).splitlines():
        if line.startswith(f"cmdstat_{command}:"):
            fields = dict(part.split("=") for part in line.partition(":")[2].split(","))
            return float(fields["usec_per_call"]) / 1e3
    return 0.0


def log_commands(call: Caller, count: int) -> None:
    """Let the daemon log how long each of the next `count` commands takes, whoever waits for them how long."""
    call("CONFIG", "SET", "slowlog-max-len", count, "slowlog-log-slower-than", 0)
    call("SLOWLOG", "RESET")


def logged_ms(call: Caller, command: str) -> list[float]:
    """Milliseconds of each such command as the daemon itself saw them; ends the logging."""
    call("CONFIG", "SET", "slowlog-log-slower-than", -1)
    times = []
    for entry in call.list("SLOWLOG", "GET", -1):
        match entry:
            case [_, _, int(took_us), [bytes(word), *_], *_] if word.decode().lower() == command:
                times.append(took_us / 1e3)
    return times


def drop_cache(directory: Path) -> None:
    """Ask the kernel to forget the pages of every file below a directory; they must be clean, so sync them first."""
    for folder, _, names in os.walk(directory):
        for name in names:
            handle = os.open(Path(folder) / name, os.O_RDONLY)
            try:
                os.fsync(handle)
                os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(handle)


def read_plain(paths: list[Path], n_bytes: int) -> float:
    """Read the first `n_bytes` of some files through one kept buffer, the fastest plain read; returns the seconds."""
    buffer = bytearray(1 << 20)
    began = time.perf_counter()
    left = n_bytes
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while left > 0 and (got := file.readinto(memoryview(buffer)[: min(left, len(buffer))])):
                left -= got
    return time.perf_counter() - began


def read_kept(paths: list[Path], memory: memoryview) -> float:
    """Fill memory that is there already from the first bytes of some files; returns the seconds."""
    began = time.perf_counter()
    at = 0
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while at < len(memory) and (got := file.readinto(memory[at:])):
                at += got
    return time.perf_counter() - began


def read_into_memory(paths: list[Path], n_bytes: int) -> float:
    """Read the first `n_bytes` of some files into fresh memory of that size, and keep it; returns the seconds.

    A mapping of its own: an allocator may hand out memory that was used before.
    """
    began = time.perf_counter()
    memory = memoryview(mmap.mmap(-1, n_bytes))
    at = 0
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while at < n_bytes and (got := file.readinto(memory[at : at + (1 << 20)])):
                at += got
    return time.perf_counter() - began


def segments_of(directory: Path) -> list[Path]:
    """A data directory's segment files in order."""
    return sorted((directory / "segments").glob("*.seg"))


def io_written(pids: list[int]) -> int:
    """Bytes that processes have handed to the block layer since they began (Linux), 0 where that is not known."""
    total = 0
    for pid in pids:
        try:
            text = Path(f"/proc/{pid}/io").read_text(encoding="ascii")
        except OSError:
            continue
        total += next(int(line.split()[1]) for line in text.splitlines() if line.startswith("write_bytes"))
    return total


def peak_rss(pid: int) -> int:
    """The largest resident memory a process ever had, in bytes; 0 where that is not known."""
    try:
        text = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith("VmHWM")), 0)


def children_of(pid: int) -> list[int]:
    """Process ids of a process's children: a daemon's engine workers."""
    try:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()]
    except OSError:
        return []
