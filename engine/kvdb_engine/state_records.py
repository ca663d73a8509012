"""State <-> records: pages, tails, and ds4's version 1 payload.

Invariant: a state that went through records is bit-identical to the one that was written. Rows are packed without loss
(packing.py), frontiers and logits are f32. ds4 payloads also hold frontier rows that no token occupies: they are
written as kv = 0 and score = -1e30 and ignored when read.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from kvdb_engine import backend
from kvdb_engine.attention import LayerState
from kvdb_engine.compressor import CompressorState
from kvdb_engine.errors import StateError
from kvdb_engine.ops import MASKED, Array, Ops
from kvdb_engine.packing import F32, pack_section, unpack_section
from kvdb_engine.rounding import F16, halve
from kvdb_engine.state import State
from kvdb_protocol.dsv4 import Dsv4Layer, Dsv4Payload, frontier_shape
from kvdb_protocol.ids import Buffer
from kvdb_protocol.layout import Part, Section
from kvdb_protocol.page import Page
from kvdb_protocol.sections import PackedSection
from kvdb_protocol.tail import Tail, tail_header

if TYPE_CHECKING:
    from kvdb_engine.catalog import ModelInfo


def page_sections(state: State, index: int) -> list[PackedSection]:
    """The packed rows of full page `index`, in the order of layout.streams."""
    layout = state.layout
    if not 0 <= index < layout.n_pages(state.n_tokens):
        raise StateError(f"page {index} is not full: the state has {state.n_tokens} tokens")
    found = []
    for stream in layout.streams:
        count = layout.page_rows(stream)
        rows = _stream_rows(state, stream, index * count, (index + 1) * count)
        found.append(pack_section(stream, rows, layout.rope_dim))
    return found


def tail_sections(state: State) -> list[PackedSection]:
    """The packed sections of the state's tail, in the order of layout.tail_sections."""
    layout = state.layout
    found = []
    for section in layout.tail_sections:
        if section.part in (Part.COMPRESSED, Part.INDEX):
            first = layout.n_pages(state.n_tokens) * layout.page_rows(section)
            rows = _stream_rows(state, section, first, state.n_tokens // layout.ratios[section.layer])
        elif section.part is Part.WINDOW:
            rows = state.ops.host(state.layers[section.layer].window)
        else:
            rows = _frontier(state, section)
        found.append(pack_section(section, rows, layout.rope_dim))
    return found


def logits_bytes(state: State) -> bytes:
    """The logits of the next token, f32 little-endian."""
    return state.logits.astype("<f4").tobytes()


def state_from_records(info: ModelInfo, pages: Iterable[Page], tail: Tail, ops: Ops | None = None) -> State:
    """Rebuild a live state.

    pages: all full pages in order, decoded with info.layout, taken one by one: only what is unpacked from a page is
    kept. tail: the snapshot's tail. The caller has checked their checksums and their chain. ops: back end that will
    run the state; None takes the process's own.
    Raises StateError when counts or token ids do not fit the model.
    """
    layout = info.layout
    if tail.header != tail_header(layout, tail.n_tokens):
        raise StateError("the tail was written for another layout")
    if tail.n_tokens > layout.context:
        raise StateError(f"the state has {tail.n_tokens} tokens, the model's context is {layout.context}")
    # Rows of a stream: those of every page, then the tail's.
    parts: dict[tuple[int, Part], list[Any]] = {}
    id_runs = []
    for number, page in enumerate(pages):
        if page.first != number * layout.page_tokens or page.n_tokens != layout.page_tokens:
            raise StateError(f"page {number} starts at token {page.first}, not at {number * layout.page_tokens}")
        id_runs.append(bytes(page.ids))
        for stream, packed in zip(layout.streams, page.sections, strict=True):
            rows = _kept(info, stream.part, unpack_section(stream, packed, layout.page_rows(stream), layout.rope_dim))
            parts.setdefault((stream.layer, stream.part), []).append(rows)
    n_pages = layout.n_pages(tail.n_tokens)
    if len(id_runs) != n_pages or tail.first != n_pages * layout.page_tokens:
        raise StateError(f"{len(id_runs)} pages given, a state of {tail.n_tokens} tokens has {n_pages}")
    for section, packed in zip(layout.tail_sections, tail.sections, strict=True):
        rows = unpack_section(section, packed, layout.tail_rows(section, tail.n_tokens), layout.rope_dim)
        rows = _kept(info, section.part, rows)
        parts.setdefault((section.layer, section.part), []).append(rows)
    arrays: dict[tuple[int, Part], F16 | F32] = {
        key: rows[0] if len(rows) == 1 else np.concatenate(rows) for key, rows in parts.items()
    }
    ids = np.concatenate([np.frombuffer(run, "<u4") for run in (*id_runs, tail.ids)])
    return _assemble(info, ops or backend.select(), arrays, ids, np.frombuffer(tail.logits, "<f4"))


def to_dsv4(state: State, context: int | None = None) -> Dsv4Payload:
    """The state as a ds4 version 1 payload. context: the context size to write; None takes the model's."""
    layout = state.layout
    header = replace(tail_header(layout, state.n_tokens), version=1)
    if context is not None:
        header = replace(
            header,
            context=context,
            prefill_chunk=min(context, 2048),
            ring_rows=min(layout.window, context),
            compressed_capacity=context // 4 + 2,
        )
    layers = []
    for number, ratio in enumerate(layout.ratios):
        live = state.layers[number]
        window = _bytes(state.ops.host(live.window))
        if not ratio:
            layers.append(Dsv4Layer(ratio, window))
            continue
        views = [_compressor_views(state, live.compressed, ratio, layout.head_dim)]
        if ratio == 4:
            views.append(_compressor_views(state, live.index, ratio, layout.index_dim))
        layers.append(Dsv4Layer(ratio, window, *(view for three in views for view in three)))
    return Dsv4Payload(header, state.ids.astype("<u4").tobytes(), logits_bytes(state), tuple(layers))


def from_dsv4(info: ModelInfo, payload: Dsv4Payload, ops: Ops | None = None) -> State:
    """A live state from a ds4 version 1 payload. Raises StateError if it is of another geometry."""
    layout, head = info.layout, payload.header
    own = tail_header(layout, head.n_tokens)
    for field in ("n_layers", "head_dim", "index_dim", "vocab", "window"):
        if getattr(head, field) != getattr(own, field):
            raise StateError(f"payload has {field} {getattr(head, field)}, the model has {getattr(own, field)}")
    if head.n_tokens > layout.context:
        raise StateError(f"the state has {head.n_tokens} tokens, the model's context is {layout.context}")
    arrays: dict[tuple[int, Part], F16 | F32] = {}
    for number, layer in enumerate(payload.layers):
        arrays[number, Part.WINDOW] = _kept(info, Part.WINDOW, _rows(layer.window, layout.head_dim))
        if not layer.ratio:
            continue
        arrays[number, Part.COMPRESSED] = _kept(info, Part.COMPRESSED, _rows(layer.compressed, layout.head_dim))
        _, columns = frontier_shape(layer.ratio, layout.head_dim)
        for part, data in ((Part.FRONTIER_KV, layer.frontier_kv), (Part.FRONTIER_SCORE, layer.frontier_score)):
            arrays[number, part] = _occupied(_rows(data, columns), layer.ratio, head.n_tokens)
        if layer.ratio != 4:
            continue
        arrays[number, Part.INDEX] = _kept(info, Part.INDEX, _rows(layer.index, layout.index_dim))
        _, columns = frontier_shape(layer.ratio, layout.index_dim)
        for part, data in (
            (Part.INDEX_FRONTIER_KV, layer.index_frontier_kv),
            (Part.INDEX_FRONTIER_SCORE, layer.index_frontier_score),
        ):
            arrays[number, part] = _occupied(_rows(data, columns), layer.ratio, head.n_tokens)
    ids = np.frombuffer(payload.ids, "<u4")
    return _assemble(info, ops or backend.select(), arrays, ids, np.frombuffer(payload.logits, "<f4"))


def _kept(info: ModelInfo, part: Part, rows: F32) -> F16 | F32:
    """Rows as a live state keeps them: f16 unless that would lose something.

    ds4 on a GPU leaves the RoPE values of its compressed rows in f32; such a state stays f32 where it came so.
    """
    return halve(rows) if info.config.kv_rounding and part in (Part.WINDOW, Part.COMPRESSED, Part.INDEX) else rows


def _stream_rows(state: State, stream: Section, first: int, last: int) -> F32:
    live = state.layers[stream.layer]
    compressor = live.compressed if stream.part is Part.COMPRESSED else live.index
    assert compressor is not None
    return state.ops.host(state.ops.view(compressor.rows)[first:last])


def _frontier(state: State, section: Section) -> F32:
    """Occupied frontier rows: the previous group's four, if there is one, then the open group's."""
    live = state.layers[section.layer]
    compressor = live.compressed if section.part in (Part.FRONTIER_KV, Part.FRONTIER_SCORE) else live.index
    assert compressor is not None
    if section.part in (Part.FRONTIER_KV, Part.INDEX_FRONTIER_KV):
        previous, opened = compressor.previous_kv, compressor.open_kv
    else:
        previous, opened = compressor.previous_score, compressor.open_score
    rows = [state.ops.host(part) for part in (previous, opened) if part is not None]
    return rows[0] if len(rows) == 1 else np.concatenate(rows)


def _assemble(
    info: ModelInfo, ops: Ops, arrays: dict[tuple[int, Part], F16 | F32], ids: np.ndarray, logits: F32
) -> State:
    layout = info.layout
    if ids.size and int(ids.max()) >= layout.vocab:
        raise StateError(f"token id {int(ids.max())} is outside the vocabulary of {layout.vocab}")

    def compressor(number: int, rows: Part, kv: Part, score: Part) -> CompressorState:
        values, frontier_kv, frontier_score = arrays[number, rows], arrays[number, kv], arrays[number, score]
        run = ops.append(ops.no_rows(values.shape[1], values.dtype == np.float16), ops.array(values))
        # Ratio 4 after its first group: four rows of the previous group come first.
        older = 4 if layout.ratios[number] == 4 and len(ids) >= 4 else 0
        previous: list[Array | None] = [None, None]
        if older:
            previous = [ops.array(frontier_kv[:older]), ops.array(frontier_score[:older])]
        return CompressorState(run, ops.array(frontier_kv[older:]), ops.array(frontier_score[older:]), *previous)

    layers = []
    for number, ratio in enumerate(layout.ratios):
        compressed = index = None
        if ratio:
            compressed = compressor(number, Part.COMPRESSED, Part.FRONTIER_KV, Part.FRONTIER_SCORE)
        if ratio == 4:
            index = compressor(number, Part.INDEX, Part.INDEX_FRONTIER_KV, Part.INDEX_FRONTIER_SCORE)
        layers.append(LayerState(ops.array(arrays[number, Part.WINDOW]), compressed, index))
    return State(ops, layout, tuple(layers), ids.astype(np.uint32), ops.array(logits.astype(np.float32)))


def _compressor_views(
    state: State, compressor: CompressorState | None, ratio: int, width: int
) -> tuple[Buffer, Buffer, Buffer]:
    """Rows, frontier kv and frontier score of a version 1 payload, unoccupied frontier rows filled."""
    assert compressor is not None
    ops = state.ops
    shape = frontier_shape(ratio, width)
    kv, score = np.zeros(shape, np.float32), np.full(shape, MASKED, np.float32)
    if compressor.previous_kv is not None:
        kv[:ratio], score[:ratio] = ops.host(compressor.previous_kv), ops.host(compressor.previous_score)
    start = ratio if ratio == 4 else 0
    n_open = state.n_tokens % ratio
    kv[start : start + n_open], score[start : start + n_open] = (
        ops.host(compressor.open_kv),
        ops.host(compressor.open_score),
    )
    return _bytes(ops.host(ops.view(compressor.rows))), _bytes(kv), _bytes(score)


def _occupied(frontier: F32, ratio: int, n_tokens: int) -> F32:
    """The occupied rows of a version 1 frontier, packed together."""
    if ratio != 4:
        return frontier[: n_tokens % ratio]
    first = 0 if n_tokens >= 4 else 4
    return frontier[first : 4 + n_tokens % 4]


def _rows(data: Buffer, width: int) -> F32:
    return np.frombuffer(data, "<f4").reshape(-1, width)


def _bytes(rows: F32) -> bytes:
    return rows.astype("<f4").tobytes()
