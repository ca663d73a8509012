"""ds4's `.kv` files in and out: rows unpacked to f32 and packed again, without loss and without an engine process.

A `.kv` file names no model. It belongs to a served model whose geometry its payload has and whose tokenizer makes its
text from its tokens; anything else is refused. What the store has no field for (context, reason, times, hits) is kept
in the key's META under `ds4.*` names and written back on export, so an exported file has the header of the imported
one. Frontier rows that no token occupies have no meaning: export writes kv = 0 and score = -1e30 there.

CPU-heavy; for a thread.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence

from kvdb.errors import CorruptError, KvdbError, WrongModelError
from kvdb.store.exchange import Incoming, IncomingState
from kvdb.store.files import Files
from kvdb.store.read import Reader, RecordPlace
from kvdb_engine import state_records
from kvdb_engine.catalog import ModelInfo
from kvdb_engine.errors import StateError
from kvdb_engine.ops_numpy import NumpyOps
from kvdb_engine.state import State
from kvdb_protocol.dsv4 import Dsv4Header, decode_payload, encode_payload
from kvdb_protocol.errors import FormatError
from kvdb_protocol.ids import NO_PAGE, Buffer, content_id, extend_prefix, root_prefix
from kvdb_protocol.kvc import Kvc, KvcFlags, KvcReason, decode_kvc
from kvdb_protocol.page import Page, decode_page, encode_page
from kvdb_protocol.record import RecordType
from kvdb_protocol.tail import Tail, decode_tail, encode_tail, tail_header

CONTEXT, REASON, CREATED, USED, HITS = b"ds4.context", b"ds4.reason", b"ds4.created", b"ds4.used", b"ds4.hits"


def is_kv(data: Buffer) -> bool:
    """Whether bytes are a `.kv` file."""
    return bytes(memoryview(data)[:3]) == b"KVC"


def expert_bits(info: ModelInfo) -> int:
    """ds4's name for a model's quantisation: 4 if its routed experts are Q4_K, else 2."""
    return 4 if "Q4_K" in info.quant else 2


def read_kv(
    models: Iterable[ModelInfo], data: Buffer, *, cross_quant: bool
) -> tuple[IncomingState, dict[bytes, bytes]]:
    """The state of a `.kv` file, and the META fields that keep its header.

    Raises CorruptError for a damaged file, WrongModelError if no served model fits it.
    """
    try:
        file = decode_kvc(data)
        header = Dsv4Header.from_bytes(file.payload)
    except FormatError as error:
        raise CorruptError(f".kv file: {error}") from error
    if header.n_tokens != file.n_tokens:
        raise CorruptError(f".kv file: header says {file.n_tokens} tokens, payload {header.n_tokens}")
    refusals = []
    for info in models:
        why = _misfit(info, file, header, cross_quant)
        if why:
            refusals.append(f"{info.name}: {why}")
            continue
        try:
            payload = decode_payload(file.payload, info.layout.ratios)
            state = state_records.from_dsv4(info, payload, NumpyOps())
        except (FormatError, StateError) as error:
            raise CorruptError(f".kv file: {error}") from error
        text = info.tokenizer.decode_bytes(state.ids.tolist())
        if not file.flags & (KvcFlags.RESPONSES_VISIBLE | KvcFlags.THINKING_VISIBLE) and text != file.text:
            refusals.append(f"{info.name}: its tokenizer makes another text from the tokens")
            continue
        return records_of(info, state), _meta(file)
    raise WrongModelError(f"no served model fits the .kv file ({'; '.join(refusals) or 'none is served'})")


def _misfit(info: ModelInfo, file: Kvc, header: Dsv4Header, cross_quant: bool) -> str:
    own = tail_header(info.layout, header.n_tokens)
    for field in ("n_layers", "head_dim", "index_dim", "vocab", "window"):
        if getattr(header, field) != getattr(own, field):
            return f"{field} is {getattr(header, field)} in the file, {getattr(own, field)} in the model"
    if header.n_tokens > info.layout.context:
        return f"the file has {header.n_tokens} tokens, the context is {info.layout.context}"
    if not cross_quant and file.quant_bits != expert_bits(info):
        return f"experts of {file.quant_bits} bits in the file, {expert_bits(info)} in the model (cross-quant deny)"
    return ""


def _meta(file: Kvc) -> dict[bytes, bytes]:
    values = {
        CONTEXT: file.context,
        REASON: int(file.reason),
        CREATED: file.created_s,
        USED: file.used_s,
        HITS: file.hits,
    }
    return {name: b"%d" % value for name, value in values.items()}


def records_of(info: ModelInfo, state: State) -> IncomingState:
    """The very records that the engine would write for a state."""
    layout = info.layout
    ids = state.ids.astype("<u4").tobytes()
    page_bytes = 4 * layout.page_tokens
    prefix, parent = root_prefix(info.family), NO_PAGE
    records = []
    for number in range(layout.n_pages(state.n_tokens)):
        span = ids[number * page_bytes : (number + 1) * page_bytes]
        first = number * layout.page_tokens
        text = info.tokenizer.decode_bytes(state.ids[first : first + layout.page_tokens].tolist())
        sections = state_records.page_sections(state, number)
        payload = encode_page(Page(info.fingerprint, parent, first, span, text, sections))
        prefix = extend_prefix(prefix, span)
        page_id = content_id(payload)
        records.append(Incoming(RecordType.PAGE, page_id, payload, parent, prefix, first, layout.page_tokens))
        parent = page_id
    first = layout.n_pages(state.n_tokens) * layout.page_tokens
    tail = Tail(
        tail_header(layout, state.n_tokens),
        info.fingerprint,
        parent,
        first,
        ids[4 * first :],
        info.tokenizer.decode_bytes(state.ids[first:].tolist()),
        state_records.logits_bytes(state),
        state_records.tail_sections(state),
    )
    payload = encode_tail(tail)
    records.append(Incoming(RecordType.TAIL, content_id(payload), payload, parent, prefix, first))
    return IncomingState(info.fingerprint, state.n_tokens, ids[4 * first :], records)


def write_kv(info: ModelInfo, files: Files, places: Sequence[RecordPlace], meta: Mapping[bytes, bytes]) -> Kvc:
    """The `.kv` file of a stored state. meta: the key's, for the fields that an import kept. Raises CorruptError."""
    with Reader(files) as reader:
        try:
            tail = decode_tail(info.layout, memoryview(bytes(reader.payload(places[-1]))))
            # One by one: each page's rows are unpacked before the reader's buffer is used again.
            pages = (decode_page(info.layout, reader.payload(place)) for place in places[:-1])
            state = state_records.state_from_records(info, pages, tail, NumpyOps())
        except (FormatError, StateError) as error:
            raise CorruptError(f"the stored state cannot be read: {error}") from error
    context = _number(meta, CONTEXT, info.layout.context)
    payload = state_records.to_dsv4(state, context)
    now = int(time.time())
    return Kvc(
        quant_bits=expert_bits(info),
        reason=KvcReason(_number(meta, REASON, KvcReason.UNKNOWN)),
        flags=KvcFlags(0),
        n_tokens=state.n_tokens,
        hits=_number(meta, HITS, 0),
        context=context,
        created_s=_number(meta, CREATED, now),
        used_s=_number(meta, USED, now),
        text=info.tokenizer.decode_bytes(state.ids.tolist()),
        payload=b"".join(memoryview(piece).cast("B") for piece in encode_payload(payload)),
    )


def _number(meta: Mapping[bytes, bytes], name: bytes, default: int) -> int:
    value = meta.get(name, b"")
    if not value.isdigit():
        return default
    if len(value) > 18:
        raise KvdbError(f"META {name.decode()} is not a number ds4 can hold")
    return int(value)
