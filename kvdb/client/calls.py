"""The kvdb commands as values: a function a command that returns its words and how to read its reply.

Nothing here sends anything, so the synchronous and the asyncio client share all of it: each of their methods is one of
these functions bound to a way to send (sync.py, aio.py).

`Call.repeatable` is False where sending a command twice is not the same as sending it once: redis-py sends again after
a lost connection, and a GENERATE that ran twice would be a wrong answer.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, Literal, TypeVar

from kvdb.client.replies import (
    Ancestor,
    Candidate,
    Draw,
    EngineModel,
    EngineStatus,
    Filled,
    Generated,
    PrefixMatch,
    Restored,
    Rewound,
    SnapDiff,
    SnapInfo,
    Snapped,
    plain,
    plain_map,
    read,
)

T = TypeVar("T")
Name = str | bytes
Word = str | bytes | int | float
# Text, token ids, or messages in OpenAI form: a list of them, or a mapping with "messages" and, say, "tools".
Prompt = str | bytes | Sequence[int] | Sequence[Mapping[str, Any]] | Mapping[str, Any]
Reuse = Literal["YES", "NO", "ONLY"]


@dataclass(frozen=True, slots=True)
class Call(Generic[T]):
    """A command: its words, and the function that reads its reply."""

    words: tuple[Word, ...]
    read: Callable[[Any], T]
    repeatable: bool = True


def _reader(kind: type[T]) -> Callable[[Any], T]:
    return partial(read, kind)


def _optional(kind: type[T]) -> Callable[[Any], T | None]:
    return lambda reply: None if reply is None else read(kind, reply)


def _listed(kind: type[T]) -> Callable[[Any], list[T]]:
    return lambda reply: [read(kind, one) for one in reply]


def _nothing(reply: Any) -> None:
    return None


def _ids(reply: Any) -> list[int]:
    return [int(one) for one in reply]


def prompt_words(prompt: Prompt) -> tuple[Word, ...]:
    """TEXT, TOKENS or CHAT, by the type of the prompt. Raises TypeError for anything else."""
    if isinstance(prompt, str | bytes):
        return ("TEXT", prompt)
    if isinstance(prompt, Mapping):
        return ("CHAT", json.dumps(prompt, ensure_ascii=False))
    items = list(prompt)
    if items and all(isinstance(item, Mapping) for item in items):
        return ("CHAT", json.dumps(items, ensure_ascii=False))
    try:
        ids = [int(item) for item in items]  # type: ignore[call-overload]
    except (TypeError, ValueError):
        raise TypeError("a prompt is text, token ids, or messages in OpenAI form") from None
    return ("TOKENS", len(ids), *ids)


def _sampling_words(
    temperature: float | None, top_k: int | None, top_p: float | None, min_p: float | None, seed: int | None
) -> list[Word]:
    words: list[Word] = []
    options = (("TEMPERATURE", temperature), ("TOPK", top_k), ("TOPP", top_p), ("MINP", min_p), ("SEED", seed))
    for word, value in options:
        if value is not None:
            words += [word, value]
    return words


# -- states ------------------------------------------------------------------------------------------------------------


def prefill(session: Name, prompt: Prompt, *, model: str | None = None, reuse: Reuse | None = None) -> Call[Filled]:
    """Make the session's timeline exactly this prompt; the longest live or stored prefix of it is reused."""
    words: list[Word] = ["PREFILL", session, *prompt_words(prompt)]
    if model is not None:
        words += ["MODEL", model]
    if reuse is not None:
        words += ["REUSE", reuse]
    return Call(tuple(words), _reader(Filled))


def extend(session: Name, prompt: Prompt) -> Call[Filled]:
    """Append a prompt to the session's timeline."""
    return Call(("EXTEND", session, *prompt_words(prompt)), _reader(Filled), repeatable=False)


def generate(
    session: Name,
    max_tokens: int | None = None,
    *,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    seed: int | None = None,
    stop: Sequence[Name] = (),
) -> Call[Generated]:
    """Decode tokens and append them to the timeline. Options left out take the server's defaults."""
    words: list[Word] = ["GENERATE", session]
    if max_tokens is not None:
        words += ["MAXTOKENS", max_tokens]
    words += _sampling_words(temperature, top_k, top_p, min_p, seed)
    if stop:
        words += ["STOP", len(stop), *stop]
    return Call(tuple(words), _reader(Generated), repeatable=False)


def streamed(call: Call[Generated]) -> Call[Generated]:
    """The same GENERATE, sending each token as it comes."""
    return Call((*call.words, "STREAM"), call.read, repeatable=False)


def sample(
    key: Name,
    count: int = 1,
    *,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    seed: int | None = None,
) -> Call[list[Draw]]:
    """Draw next tokens from the stored logits of a snapshot or session: no forward pass."""
    words = _sampling_words(temperature, top_k, top_p, min_p, seed)
    return Call(("SAMPLE", key, "COUNT", count, *words), _listed(Draw))


def logits(key: Name, top: int = 20) -> Call[list[Candidate]]:
    """The `top` best next tokens of a snapshot or session, best first."""
    return Call(("LOGITS", key, "TOP", top), _listed(Candidate))


def logits_raw(key: Name) -> Call[bytes]:
    """All logits of the next token: little-endian f32, one for each token of the vocabulary."""
    return Call(("LOGITS", key, "RAW"), bytes)


def _snapshot_words(
    session: Name,
    key: Name,
    meta: Mapping[str, Word] | None,
    ex: int | None,
    px: int | None,
    nx: bool,
    xx: bool,
    pin: bool,
) -> list[Word]:
    words: list[Word] = ["SNAPSHOT", session, key]
    if meta:
        words += ["META", len(meta)]
        for name, value in meta.items():
            words += [name, value]
    if ex is not None:
        words += ["EX", ex]
    if px is not None:
        words += ["PX", px]
    words += [word for word, wanted in (("NX", nx), ("XX", xx), ("PIN", pin)) if wanted]
    return words


def snapshot(
    session: Name,
    key: Name,
    *,
    meta: Mapping[str, Word] | None = None,
    ex: int | None = None,
    px: int | None = None,
    nx: bool = False,
    xx: bool = False,
    pin: bool = False,
) -> Call[Snapped | None]:
    """Store the session's state under a key; durable when this returns. None when `nx` or `xx` said no.

    ex, px: seconds or milliseconds to live. pin: never evicted.
    """
    words = _snapshot_words(session, key, meta, ex, px, nx, xx, pin)
    return Call(tuple(words), _optional(Snapped), repeatable=not nx)


def snapshot_later(
    session: Name,
    key: Name,
    *,
    meta: Mapping[str, Word] | None = None,
    ex: int | None = None,
    px: int | None = None,
    nx: bool = False,
    xx: bool = False,
    pin: bool = False,
) -> Call[None]:
    """Start a snapshot and return; `wait_snapshot` tells when it is durable."""
    words = _snapshot_words(session, key, meta, ex, px, nx, xx, pin)
    return Call((*words, "ASYNC"), _nothing, repeatable=False)


def wait_snapshot(key: Name) -> Call[Snapped | None]:
    """Wait for the `snapshot_later` under this key; None when none was started or its condition said no."""
    return Call(("WAITSNAP", key), _optional(Snapped), repeatable=False)


def restore(key: Name, session: Name, *, replace: bool = False) -> Call[Restored]:
    """Give a session the state of a snapshot. Raises BusyKeyError when it exists, unless `replace`."""
    words: tuple[Word, ...] = ("RESTORE", key, session)
    return Call((*words, "REPLACE") if replace else words, _reader(Restored), repeatable=replace)


def fork(source: Name, *dests: Name) -> Call[int]:
    """Name the state of a snapshot or session again, as new sessions; no page is copied. How many were made."""
    return Call(("FORK", source, *dests), int, repeatable=False)


def rewind_to(session: Name, key: Name) -> Call[Rewound]:
    """Back to a snapshot that the session's timeline begins with."""
    return Call(("REWIND", session, "TO", key), _reader(Rewound))


def rewind_tokens(session: Name, tokens: int) -> Call[Rewound]:
    """Back to the first `tokens` tokens."""
    return Call(("REWIND", session, "TOKENS", tokens), _reader(Rewound))


def rewind_steps(session: Name, steps: int = 1) -> Call[Rewound]:
    """Back by snapshots: one step takes a session that has grown since its last snapshot to that snapshot."""
    return Call(("REWIND", session, "STEPS", steps), _reader(Rewound), repeatable=False)


def prefix(prompt: Prompt, *, model: str | None = None) -> Call[PrefixMatch | None]:
    """The longest stored prefix of a prompt, or None."""
    words = ("PREFIX", *prompt_words(prompt))
    return Call((*words, "MODEL", model) if model is not None else words, _optional(PrefixMatch))


def lineage(key: Name) -> Call[list[Ancestor]]:
    """A snapshot, or a session's base, and its stored ancestors, newest first."""
    return Call(("LINEAGE", key), _listed(Ancestor))


def snapinfo(key: Name) -> Call[SnapInfo]:
    """All that is known of a snapshot without reading its records."""
    return Call(("SNAPINFO", key), _reader(SnapInfo))


def snapdiff(a: Name, b: Name) -> Call[SnapDiff]:
    """Where two snapshots part, and what they share."""
    return Call(("SNAPDIFF", a, b), _reader(SnapDiff))


def pin(key: Name) -> Call[bool]:
    """Protect a snapshot from eviction; whether it was not pinned before."""
    return Call(("PIN", key), bool)


def unpin(key: Name) -> Call[bool]:
    """End `pin`; whether it was pinned before."""
    return Call(("UNPIN", key), bool)


def tokenize(model: str, text: Name) -> Call[list[int]]:
    """Token ids of a text, without the begin-of-sentence token."""
    return Call(("TOKENIZE", model, text), _ids)


def detokenize(model: str, ids: Sequence[int]) -> Call[bytes]:
    """The bytes of tokens."""
    return Call(("DETOKENIZE", model, *ids), bytes)


# -- engines and the store ---------------------------------------------------------------------------------------------


def _model_words(*words: str, model: str | None) -> tuple[Word, ...]:
    return words if model is None else (*words, model)


def engine_load(model: str | None = None) -> Call[None]:
    """Start a model's engine now instead of at first use."""
    return Call(_model_words("ENGINE", "LOAD", model=model), _nothing)


def engine_unload(model: str | None = None) -> Call[None]:
    """Store a model's live sessions and end its engine."""
    return Call(_model_words("ENGINE", "UNLOAD", model=model), _nothing)


def engine_status(model: str | None = None) -> Call[EngineStatus]:
    """What a model's engine holds and does; starts nothing."""
    return Call(_model_words("ENGINE", "STATUS", model=model), _reader(EngineStatus))


def engine_models() -> Call[list[EngineModel]]:
    """The models served there."""
    return Call(("ENGINE", "MODELS"), _listed(EngineModel))


def engine_cancel(session: Name) -> Call[int]:
    """Stop the work of a session at its next chunk; how many commands were stopped."""
    return Call(("ENGINE", "CANCEL", session), int)


def store_stats() -> Call[dict[str, Any]]:
    """Bytes, pages, segments, and what is shared."""
    return Call(("STORE", "STATS"), plain_map)


def store_verify(*, deep: bool = False) -> Call[dict[str, Any]]:
    """Check every record's checksum; deep: every identity too."""
    return Call(("STORE", "VERIFY", "DEEP") if deep else ("STORE", "VERIFY"), plain_map)


def store_gc() -> Call[dict[str, Any]]:
    """Free the bytes that nothing reaches."""
    return Call(("STORE", "GC"), plain_map)


def store_compact() -> Call[dict[str, Any]]:
    """Move live records out of sparse segments."""
    return Call(("STORE", "COMPACT"), plain_map)


def store_backup(name: Name) -> Call[Any]:
    """Write a consistent copy of the whole store below the server's transfer-dir."""
    return Call(("STORE", "BACKUP", name), plain)


def store_export(key: Name, file: Name, *, format: Literal["KV", "ARCHIVE"] = "ARCHIVE") -> Call[Any]:
    """Write a snapshot as a file in the server's transfer-dir: a kvdb archive or a ds4 .kv file."""
    return Call(("STORE", "EXPORT", key, "FILE", file, "FORMAT", format), plain)


def store_export_data(key: Name, *, format: Literal["KV", "ARCHIVE"] = "ARCHIVE") -> Call[bytes]:
    """A snapshot as the bytes of a kvdb archive or a ds4 .kv file."""
    return Call(("STORE", "EXPORT", key, "DATA", "FORMAT", format), bytes)


def store_import(key: Name, file: Name) -> Call[Any]:
    """Read a file of the server's transfer-dir into a snapshot."""
    return Call(("STORE", "IMPORT", key, "FILE", file), plain, repeatable=False)


def store_import_data(key: Name, data: bytes) -> Call[Any]:
    """Read the bytes of a kvdb archive or a ds4 .kv file into a snapshot."""
    return Call(("STORE", "IMPORT", key, "DATA", data), plain, repeatable=False)
