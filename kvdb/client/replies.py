"""Typed replies: one frozen dataclass for each reply map of the server, and the one function that fills them.

The fields have the names of docs/commands.md. `read` takes a RESP3 map or the flat array of RESP2 and ignores fields it
does not know, so an older client works with a newer server.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from typing import Any, TypeVar, get_args, get_type_hints

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Filled:
    """Reply of PREFILL and EXTEND. `reused + computed` covers `tokens`, the length of the timeline."""

    tokens: int
    reused: int
    computed: int
    source: str
    ms: float


@dataclass(frozen=True, slots=True)
class Generated:
    """Reply of GENERATE: `data` are the sampled tokens' bytes, `tokens` the length of the timeline now."""

    data: bytes
    ids: tuple[int, ...]
    tokens: int
    finish: str
    ms: float

    @property
    def text(self) -> str:
        """The sampled text; a character cut by the token limit shows as U+FFFD."""
        return self.data.decode(errors="replace")


@dataclass(frozen=True, slots=True)
class Token:
    """One streamed token. Text is held back until a character is whole, so it may be empty or two characters."""

    id: int
    text: str


@dataclass(frozen=True, slots=True)
class Progress:
    """Tokens computed so far of those a PREFILL or EXTEND computes."""

    done: int
    total: int


@dataclass(frozen=True, slots=True)
class Snapped:
    """Reply of SNAPSHOT: what was written, and what other snapshots had already."""

    id: str
    tokens: int
    pages_new: int
    bytes_new: int
    bytes_shared: int
    ms: float


@dataclass(frozen=True, slots=True)
class Restored:
    """Reply of RESTORE; `recomputed` is 0."""

    tokens: int
    bytes_read: int
    recomputed: int
    ms: float


@dataclass(frozen=True, slots=True)
class Rewound:
    """Reply of REWIND."""

    tokens: int
    recomputed: int
    ms: float


@dataclass(frozen=True, slots=True)
class PrefixMatch:
    """Reply of PREFIX: the snapshot `id` holds the first `tokens` of the `of` tokens asked for."""

    key: str | None
    id: str
    tokens: int
    of: int
    text_bytes: int
    same_quant: bool


@dataclass(frozen=True, slots=True)
class Draw:
    """One next token drawn by SAMPLE; `data` is None when the snapshot's model is not served."""

    id: int
    data: bytes | None
    logprob: float

    @property
    def text(self) -> str:
        """The token's text; bytes that are no whole character show as U+FFFD."""
        return (self.data or b"").decode(errors="replace")


@dataclass(frozen=True, slots=True)
class Candidate:
    """One of the best next tokens, from LOGITS."""

    id: int
    data: bytes | None
    logit: float
    logprob: float

    @property
    def text(self) -> str:
        """The token's text; bytes that are no whole character show as U+FFFD."""
        return (self.data or b"").decode(errors="replace")


@dataclass(frozen=True, slots=True)
class Ancestor:
    """One snapshot of a LINEAGE, newest first. `key` is None when no key of this database names it any more."""

    id: str
    key: str | None
    tokens: int
    reason: str
    created: int


@dataclass(frozen=True, slots=True)
class SnapInfo:
    """Reply of SNAPINFO. `created` in Unix ms; `ttl_ms` is -1 for a key that does not expire."""

    id: str
    key: str
    tokens: int
    reason: str
    created: int
    model: str | None
    fingerprint: str
    parent: str | None
    pages: int
    bytes_own: int
    bytes_shared: int
    pinned: bool
    ttl_ms: int
    meta: dict[str, str]


@dataclass(frozen=True, slots=True)
class SnapDiff:
    """Reply of SNAPDIFF: the timelines agree in their first `common_tokens`."""

    common_tokens: int
    a_tokens: int
    b_tokens: int
    identical: bool
    bytes_shared: int
    bytes_a: int
    bytes_b: int


@dataclass(frozen=True, slots=True)
class Running:
    """One piece of work of an engine: `done` of `total` tokens, 0 where the total is open. session: None if unnamed."""

    session: str | None
    op: str
    done: int
    total: int
    seconds: float


@dataclass(frozen=True, slots=True)
class EngineStatus:
    """Reply of ENGINE STATUS."""

    model: str
    state: str
    pid: int | None
    uptime_s: float
    starts: int
    requests: tuple[Running, ...]
    resident_sessions: int
    resident_bytes: int
    rss_bytes: int
    backend: dict[str, str]


@dataclass(frozen=True, slots=True)
class EngineModel:
    """One model of ENGINE MODELS."""

    name: str
    fingerprint: str
    family: str
    context: int
    vocab: int
    layers: int
    page_tokens: int


# The wire says `text` for bytes that need not be UTF-8; the classes say `data` and offer `text` decoded.
_WIRE_NAMES = {"data": "text"}


def text(value: Any) -> str:
    """A string from a bulk or simple string, whichever way redis-py decoded it."""
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


def as_map(reply: Any) -> dict[str, Any]:
    """A map from a RESP3 map or a RESP2 flat array."""
    if isinstance(reply, dict):
        return {text(name): value for name, value in reply.items()}
    return {text(name): value for name, value in zip(reply[::2], reply[1::2], strict=True)}


def plain_map(reply: Any) -> dict[str, Any]:
    """A map reply with its byte strings as text; maps inside it stay flat in RESP2."""
    return {name: plain(value) for name, value in as_map(reply).items()}


def plain(reply: Any) -> Any:
    """Any reply with its byte strings as text: for the replies that have no class."""
    if isinstance(reply, bytes):
        return text(reply)
    if isinstance(reply, dict):
        return {text(name): plain(value) for name, value in reply.items()}
    if isinstance(reply, list):
        return [plain(value) for value in reply]
    return reply


@cache
def _columns(name: str) -> tuple[tuple[str, str, Any], ...]:
    kind = globals()[name]
    hints = get_type_hints(kind)
    return tuple((field.name, _WIRE_NAMES.get(field.name, field.name), hints[field.name]) for field in fields(kind))


def _convert(hint: Any, value: Any) -> Any:
    options = [option for option in get_args(hint) if option is not type(None)]
    if type(None) in get_args(hint):
        return None if value is None else _convert(options[0], value)
    if hint is str:
        return text(value)
    if hint is bytes:
        return value if isinstance(value, bytes) else str(value).encode()
    if hint is bool:
        return bool(int(value))
    if hint in (int, float):
        return hint(value)
    if hint == dict[str, str]:
        return {name: text(value) for name, value in as_map(value).items()}
    if is_dataclass(hint):
        return read(hint, value)  # type: ignore[arg-type]
    return tuple(_convert(options[0], one) for one in value)


def read(kind: type[T], reply: Any) -> T:
    """Fill a reply class. Raises KeyError when the server left a field out."""
    found = as_map(reply)
    return kind(**{name: _convert(hint, found[wire]) for name, wire, hint in _columns(kind.__name__)})
