"""The DSV4 header and ds4's session payload, version 1 (all f32, whole state in one piece).

Header, 13 x u32: magic "DSV4", version, context, prefill chunk, ring rows, window, compressed row capacity, tokens,
layers, KV head dim, indexer head dim, vocabulary, window rows stored. Then, in version 1:

    u32[n] token ids, f32[vocab] logits, u32[layers] compressed row counts, u32[layers] index row counts,
    and for each layer: window rows oldest first; if its ratio is not 0: compressed rows, frontier kv, frontier score
    (c*ratio rows of c*head_dim, c = 2 for ratio 4); if its ratio is 4: index rows, index frontier kv and score.

Version 2 is kvdb's tail (tail.py). Source: the public description of ds4's format, restated in docs/format.md.
"""

from __future__ import annotations

import struct
from dataclasses import astuple, dataclass

from kvdb_protocol.errors import FormatError, VersionError
from kvdb_protocol.ids import Buffer

MAGIC = 0x34565344  # "DSV4" read as a little-endian u32
HEADER_BYTES = 52
NEGATIVE_INFINITY = -1.0e30  # how ds4 writes "no score": finite, so that it survives fast-math
_HEADER = struct.Struct("<13I")


@dataclass(frozen=True, slots=True)
class Dsv4Header:
    """The fields after the magic, in their order on disk."""

    version: int
    context: int
    prefill_chunk: int
    ring_rows: int
    window: int
    compressed_capacity: int
    n_tokens: int
    n_layers: int
    head_dim: int
    index_dim: int
    vocab: int
    window_rows: int

    def to_bytes(self) -> bytes:
        """The 52 header bytes."""
        return _HEADER.pack(MAGIC, *astuple(self))

    @classmethod
    def from_bytes(cls, data: Buffer) -> Dsv4Header:
        """Read the header at the start of `data`. Any version is accepted; callers check it."""
        if len(data) < HEADER_BYTES:
            raise FormatError(f"DSV4 header is truncated: {len(data)} of {HEADER_BYTES} bytes")
        magic, *fields = _HEADER.unpack_from(data)
        if magic != MAGIC:
            raise FormatError(f"not a DSV4 payload: magic {magic:#010x}")
        return cls(*fields)


@dataclass(frozen=True, slots=True)
class Dsv4Layer:
    """Views of one layer's arrays in a version 1 payload: little-endian f32, rows as in the header's widths.

    Absent parts are empty. `ratio` is 0, 4 or 128.
    """

    ratio: int
    window: Buffer
    compressed: Buffer = b""
    frontier_kv: Buffer = b""
    frontier_score: Buffer = b""
    index: Buffer = b""
    index_frontier_kv: Buffer = b""
    index_frontier_score: Buffer = b""


@dataclass(frozen=True, slots=True)
class Dsv4Payload:
    """A version 1 payload. ids: u32[n], logits: f32[vocab], both little-endian."""

    header: Dsv4Header
    ids: Buffer
    logits: Buffer
    layers: tuple[Dsv4Layer, ...]


def frontier_shape(ratio: int, width: int) -> tuple[int, int]:
    """(rows, columns) of a version 1 frontier array: the whole state, also rows that hold no token."""
    overlap = 2 if ratio == 4 else 1
    return overlap * ratio, overlap * width


def encode_payload(payload: Dsv4Payload) -> list[Buffer]:
    """A version 1 payload as a list of buffers; rows are not copied. Row counts follow from the views' sizes."""
    head = payload.header
    compressed = [len(memoryview(layer.compressed).cast("B")) // (4 * head.head_dim) for layer in payload.layers]
    index = [
        len(memoryview(layer.index).cast("B")) // (4 * head.index_dim) if head.index_dim else 0
        for layer in payload.layers
    ]
    counts = struct.pack(f"<{2 * head.n_layers}I", *compressed, *index)
    pieces: list[Buffer] = [head.to_bytes(), payload.ids, payload.logits, counts]
    for layer in payload.layers:
        pieces.append(layer.window)
        if layer.ratio:
            pieces += [layer.compressed, layer.frontier_kv, layer.frontier_score]
        if layer.ratio == 4:
            pieces += [layer.index, layer.index_frontier_kv, layer.index_frontier_score]
    return pieces


def decode_payload(data: Buffer, ratios: tuple[int, ...]) -> Dsv4Payload:
    """Decode a version 1 payload of a model with these layer ratios. Views point into `data`.

    Refuses, naming the field, what ds4's own reader refuses, and also counts that do not fit the token count.
    """
    view = memoryview(data).cast("B")
    head = Dsv4Header.from_bytes(view)
    if head.version != 1:
        raise VersionError(f"DSV4 payload version {head.version} is not supported")
    if head.n_layers != len(ratios):
        raise FormatError(f"payload has {head.n_layers} layers, the model has {len(ratios)}")
    if head.window_rows != min(head.n_tokens, head.window):
        raise FormatError(f"payload stores {head.window_rows} window rows for {head.n_tokens} tokens")
    at = HEADER_BYTES

    def take(n_bytes: int, what: str) -> memoryview:
        nonlocal at
        piece = view[at : at + n_bytes]
        if len(piece) < n_bytes:
            raise FormatError(f"payload is truncated in {what}")
        at += n_bytes
        return piece

    def rows(count: int, width: int, what: str) -> memoryview:
        return take(4 * count * width, what)

    ids = take(4 * head.n_tokens, "token ids")
    logits = take(4 * head.vocab, "logits")
    compressed = struct.unpack(f"<{head.n_layers}I", take(4 * head.n_layers, "row counts"))
    index = struct.unpack(f"<{head.n_layers}I", take(4 * head.n_layers, "row counts"))
    layers = []
    for number, ratio in enumerate(ratios):
        want = head.n_tokens // ratio if ratio else 0
        if compressed[number] != want or index[number] != (want if ratio == 4 else 0):
            raise FormatError(
                f"layer {number}: row counts {compressed[number]}, {index[number]} do not fit the token count"
            )
        what = f"layer {number}"
        window = rows(head.window_rows, head.head_dim, what)
        if not ratio:
            layers.append(Dsv4Layer(ratio, window))
            continue
        n_rows, n_columns = frontier_shape(ratio, head.head_dim)
        parts = [rows(want, head.head_dim, what), rows(n_rows, n_columns, what), rows(n_rows, n_columns, what)]
        if ratio == 4:
            n_rows, n_columns = frontier_shape(ratio, head.index_dim)
            parts += [rows(want, head.index_dim, what), rows(n_rows, n_columns, what), rows(n_rows, n_columns, what)]
        layers.append(Dsv4Layer(ratio, window, *parts))
    if at != len(view):
        raise FormatError(f"payload has {len(view) - at} trailing bytes")
    return Dsv4Payload(head, ids, logits, tuple(layers))
