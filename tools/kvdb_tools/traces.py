"""Reads traces of real requests: which blocks of tokens each prompt consisted of, and when it came.

Two public formats are known (tests/vectors/traces/README.md): coding-agent sessions of the kv-cache-tester collection,
one JSON file each, and Mooncake's JSON lines. Both name equal blocks by equal ids, and a block's id stands for the
whole prefix up to its end. The tokens themselves were never published: `token_ids` makes up tokens for each block, so
that equal blocks have equal tokens.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

MOONCAKE_BLOCK_TOKENS = 512

U32 = npt.NDArray[np.uint32]


class TraceError(ValueError):
    """A file is not a trace of a known format; the message names it."""


@dataclass(frozen=True, slots=True)
class Request:
    """One request. blocks: ids of the prompt's blocks, the last of which may be partly filled.

    time_s: seconds since the trace began. n_in, n_out: tokens of prompt and answer.
    """

    time_s: float
    n_in: int
    n_out: int
    blocks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Trace:
    """Requests in order of time; block ids are this trace's own."""

    name: str
    block_tokens: int
    requests: tuple[Request, ...]


def read_agent_trace(path: Path) -> Trace:
    """One coding-agent session, nested sub-agents in order of time. Raises TraceError."""
    try:
        tree = json.loads(_read(path))
        requests = sorted(_agent_requests(tree["requests"]), key=lambda request: request.time_s)
        return Trace(str(tree["id"]), int(tree["block_size"]), tuple(requests))
    except (KeyError, TypeError, ValueError) as error:
        raise TraceError(f"{path}: not an agent trace: {type(error).__name__}: {error}") from error


def read_mooncake(path: Path) -> Trace:
    """A Mooncake trace. Raises TraceError."""
    try:
        rows = [json.loads(line) for line in _read(path).splitlines() if line.strip()]
        requests = [
            Request(
                row["timestamp"] / 1e3,
                int(row["input_length"]),
                int(row["output_length"]),
                tuple(map(int, row["hash_ids"])),
            )
            for row in rows
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise TraceError(f"{path}: not a Mooncake trace: {type(error).__name__}: {error}") from error
    if not requests:
        raise TraceError(f"{path}: the trace is empty")
    return Trace(path.name.partition(".")[0], MOONCAKE_BLOCK_TOKENS, tuple(requests))


def read_agent_traces(directory: Path) -> list[Trace]:
    """All agent traces of a directory in order of name. Raises TraceError if there is none."""
    paths = sorted([*directory.glob("*.json.gz"), *directory.glob("*.json")])
    if not paths:
        raise TraceError(f"{directory}: no *.json or *.json.gz files")
    return [read_agent_trace(path) for path in paths]


def _read(path: Path) -> bytes:
    try:
        data = path.read_bytes()
        return gzip.decompress(data) if path.suffix == ".gz" else data
    except (OSError, EOFError) as error:
        raise TraceError(f"{path}: unreadable: {error}") from error


def _agent_requests(rows: Sequence[Mapping[str, Any]]) -> Iterator[Request]:
    for row in rows:
        if "hash_ids" in row:
            yield Request(float(row["t"]), int(row["in"]), int(row["out"]), tuple(map(int, row["hash_ids"])))
        for nested in row.values():
            if isinstance(nested, list) and nested and isinstance(nested[0], dict):
                yield from _agent_requests(nested)


def token_ids(trace: Trace, number: int, vocab: int) -> tuple[U32, U32]:
    """Prompt and answer of request `number` as made-up tokens below `vocab`.

    An answer becomes part of the next prompt: where a later request continues this prompt, the tokens past this
    prompt's last full block are those of the later request's blocks.
    """
    request = trace.requests[number]
    size = trace.block_tokens
    n_full = min(request.n_in // size, len(request.blocks))
    own = request.blocks[:n_full]
    total = request.n_in + request.n_out
    blocks = own
    for later in trace.requests[number + 1 :]:
        if len(later.blocks) > n_full and later.blocks[:n_full] == own:
            blocks = later.blocks[: min(-(-total // size), later.n_in // size)]
            break
    ids = _block_tokens(np.array(blocks, np.uint64), size, vocab)
    if len(ids) < total:
        # Nobody continues from here: the rest is this request's alone.
        alone = np.array(
            [(1 << 40) + number * 4096 + block for block in range(-(-(total - len(ids)) // size))], np.uint64
        )
        ids = np.concatenate([ids, _block_tokens(alone, size, vocab)])
    return ids[: request.n_in], ids[request.n_in : total]


def _block_tokens(blocks: npt.NDArray[np.uint64], size: int, vocab: int) -> U32:
    """(len(blocks) * size,) token ids, a function of block id and place in the block."""
    places = np.add.outer(blocks * np.uint64(size), np.arange(size, dtype=np.uint64))
    mixed: npt.NDArray[np.uint64] = places * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
    tokens: U32 = ((mixed >> np.uint64(33)) % np.uint64(vocab)).astype(np.uint32).reshape(-1)
    return tokens
