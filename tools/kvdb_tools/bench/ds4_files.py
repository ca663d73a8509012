"""The baseline of ds4: one file a snapshot, each with the whole state in f32. Sizes, and files of those sizes."""

from __future__ import annotations

import os
import time
from pathlib import Path

# Geometry of DeepSeek V4 Flash (docs/format.md names the parts).
_LAYERS, _RATIO_4_LAYERS, _RATIO_128_LAYERS = 43, 21, 20
_ROW, _WINDOW, _VOCAB = 2048, 128, 129280
_CHUNK_BYTES = 1 << 22


def ds4_file_bytes(n_tokens: int) -> int:
    """Bytes of ds4's payload for a state of `n_tokens`: header, ids, logits, counts, and all rows in f32.

    The text before the payload, about four bytes a token, is left out in ds4's favour.
    """
    fixed = 52 + 4 * n_tokens + 4 * _VOCAB + 8 * _LAYERS + _LAYERS * _ROW * min(n_tokens, _WINDOW)
    ratio_4 = 2560 * (n_tokens // 4) + 81920
    ratio_128 = 2048 * (n_tokens // 128) + 524288
    return fixed + _RATIO_4_LAYERS * ratio_4 + _RATIO_128_LAYERS * ratio_128


def write_file(path: Path, n_bytes: int, chunk: bytes, *, sync: bool) -> float:
    """Write a file of `n_bytes` (repeating `chunk`) beside its name, then rename it, as ds4 does; returns the seconds.

    sync: also fsync the file and its directory, which ds4 does not.
    """
    view = memoryview(chunk)
    began = time.perf_counter()
    beside = path.with_suffix(".tmp")
    with beside.open("wb", buffering=0) as file:
        left = n_bytes
        while left:
            left -= file.write(view[: min(left, len(view))])
        if sync:
            os.fsync(file.fileno())
    beside.replace(path)
    if sync:
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)
    return time.perf_counter() - began


def noise(n_bytes: int = _CHUNK_BYTES) -> bytes:
    """Bytes that do not compress."""
    return os.urandom(n_bytes)
