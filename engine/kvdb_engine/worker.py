"""The engine worker: one process, one model, one queue; live states of many sessions.

The daemon sends requests as frames over a socket pair (kvdb_protocol.frames); every request is answered by events that
carry its id and ends with one `done` or `error` event. Requests are generators that yield between chunks, so they
interleave round-robin: a long prefill delays others by one chunk. A `cancel` closes the generator at that border; the
session stays valid at its last complete token.

The worker knows sessions only by their uid. It decides nothing about durability: `write` packs records into the file
range the daemon reserved, the daemon syncs and commits. When the socket closes, the process ends.

Requests (op: fields -> fields of `done`)
    open: sid, source (sid or None), places ([path, offset, bytes, id] or None) -> tokens, bytes_read, ids
    extend: sid, ids (u32 bytes); events progress(done, total)                -> tokens
    generate: sid, max_tokens, sampling, stop ([bytes]), stop_ids; events token(id) -> tokens, finish
    write: sid, path, offset, have, known ([[page id]], from page `have`)
                                                     -> snapshot, leaf, end, tokens, pages, written
    logits: sid                                                               -> logits (f32 bytes)
    close: sid     status: -     cancel: target
Every `done` carries `bytes`, the memory of all live states, `ms`, and `stats`, what the engine has done so far.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import time
from collections import deque
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kvdb_engine.catalog import ModelInfo
from kvdb_engine.interface import EngineLike, LiveState
from kvdb_engine.sampling import Sampling, sample
from kvdb_engine.state_reader import BadRecordError, Buffers, Place, StateReader
from kvdb_engine.writeback import start_writeback
from kvdb_protocol.frames import FrameReader, Message, encode_frame
from kvdb_protocol.ids import NO_PAGE, Buffer, content_id
from kvdb_protocol.page import Page, encode_page
from kvdb_protocol.record import RecordType, padding, record_bytes
from kvdb_protocol.tail import Tail, encode_tail, state_header, tail_header

Task = Generator[None, None, Message]

# A prefill chunk takes some tenths of a second, a decoded token some milliseconds. Taking turns by time, not by border,
# keeps a session that decodes from getting one token for each chunk of another that reads a long prompt.
SLICE_S = 0.05


class DaemonGoneError(Exception):
    """The other end of the socket is closed: nobody waits for anything any more."""


class RequestError(Exception):
    """An error that goes back to the daemon; `word` is its first word on the wire."""

    def __init__(self, word: str, message: str) -> None:
        super().__init__(message)
        self.word = word


@dataclass(slots=True)
class Live:
    """A session's live state. `page_ids` names its full pages as far as they have been packed or loaded."""

    state: Any
    page_ids: list[bytes] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Running:
    """A request in the queue. sid: the session it works on, if it does."""

    number: int
    sid: bytes | None
    task: Task
    began: float


class Worker:
    """Runs requests against one engine."""

    def __init__(self, info: ModelInfo, engine: EngineLike[Any], sock: socket.socket) -> None:
        self.info = info
        self.engine = engine
        self.sock = sock
        self.sessions: dict[bytes, Live] = {}
        self.first: deque[Running] = deque()  # ahead of `tasks`, in their order
        self.tasks: deque[Running] = deque()
        self.n_bytes = 0  # of all live states
        self._bytes_of: dict[bytes, int] = {}
        self.reader = FrameReader()
        self.buffers = Buffers()

    # -- the loop -----------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Serve until the daemon closes the socket, or is killed."""
        with contextlib.suppress(DaemonGoneError):
            self.serve()

    def serve(self) -> None:
        """The loop: take new requests, run the next one up to its border."""
        while True:
            # With work at hand only look for new requests; without, sleep until one comes. Not `select`: it refuses
            # descriptors from 1024 on, and ours has the number it had in a daemon with any number of clients.
            with contextlib.suppress(BlockingIOError):
                try:
                    data = self.sock.recv(1 << 20, socket.MSG_DONTWAIT if self.first or self.tasks else 0)
                except ConnectionError:
                    return
                if not data:
                    return
                for message in self.reader.feed(data):
                    self.accept(message)
            if self.first or self.tasks:
                self.advance()

    def accept(self, message: Message) -> None:
        """Queue a request, or carry out a cancel at once."""
        if message["op"] == "cancel":
            self.cancel(message["target"])
            return
        handler = getattr(self, f"op_{message['op']}", self.op_unknown)
        request = Running(message["id"], message.get("sid"), handler(message), time.perf_counter())
        # An open goes first: its client's real work follows, which would cost a newcomer another round of turns, and
        # what is asked of a source later must not be done before it is copied. A close that an open overtook would drop
        # what it opened.
        (self.first if message["op"] in ("open", "close") else self.tasks).append(request)

    def advance(self) -> None:
        """Run the request at the head of the queue for a slice of time: at least to its next border."""
        request = (self.first or self.tasks).popleft()
        end = time.monotonic() + SLICE_S
        try:
            next(request.task)
            while time.monotonic() < end:
                next(request.task)
        except StopIteration as stop:
            self.finish(request, stop.value)
        except DaemonGoneError:
            raise
        except RequestError as error:
            self.fail(request, error.word, str(error))
        except OSError as error:
            word = "NOSPACE" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "ERR"
            self.fail(request, word, f"engine worker: {error}")
        except Exception as error:  # a bug in one request must not take the other sessions down, nor memory it lacked
            self.fail(request, "ERR", f"engine worker: {type(error).__name__}: {error}")
        else:
            self.tasks.append(request)

    def finish(self, request: Running, fields: Message) -> None:
        """Send the last event of a request."""
        self.weigh(request.sid)
        ms = (time.perf_counter() - request.began) * 1e3
        stats = self.engine.stats()
        self.send({"id": request.number, "ev": "done", "bytes": self.n_bytes, "ms": ms, "stats": stats, **fields})

    def fail(self, request: Running, word: str, message: str) -> None:
        """Send the error that ends a request; its session stands at its last complete token."""
        self.weigh(request.sid)
        self.send({"id": request.number, "ev": "error", "word": word, "message": message})

    def weigh(self, sid: bytes | None) -> None:
        """Take note of the memory of a session that a request has changed, made or dropped."""
        if sid is None:
            return
        live = self.sessions.get(sid)
        self.n_bytes -= self._bytes_of.pop(sid, 0)
        if live is not None:
            self._bytes_of[sid] = live.state.nbytes
            self.n_bytes += self._bytes_of[sid]

    def cancel(self, target: int) -> None:
        """Close a queued or running request at the border where it stands."""
        for entry in self.tasks:
            if entry.number == target:
                self.tasks.remove(entry)
                entry.task.close()
                self.fail(entry, "CANCELLED", "cancelled at a chunk border")
                return

    def send(self, message: Message) -> None:
        """Write one frame; blocks when the daemon does not read, which is the back-pressure we want."""
        try:
            self.sock.sendall(encode_frame(message))
        except ConnectionError as error:
            raise DaemonGoneError from error

    def live(self, message: Message) -> Live:
        """The session a request names."""
        found = self.sessions.get(message["sid"])
        if found is None:
            raise RequestError("ENGINEDOWN", "the session is not resident in this worker")
        return found

    def op_unknown(self, message: Message) -> Task:
        """A request of another version."""
        yield from ()
        raise RequestError("ERR", f"the engine worker has no request '{message['op']}'")

    # -- requests -----------------------------------------------------------------------------------------------------

    def op_open(self, message: Message) -> Task:
        """Make a session: empty, a copy of a live one, or read from records (pages in order, then the tail)."""
        yield from ()
        places: Sequence[Place] | None = message["places"]
        n_read = 0
        ids = b""
        if message["source"] is not None:
            origin = self.sessions.get(message["source"])
            if origin is None:
                raise RequestError("ENGINEDOWN", "the source session is not resident in this worker")
            live = Live(origin.state.clone(), origin.page_ids)
        elif places is None:
            live = Live(self.engine.new_state())
        else:
            live, n_read = self.read_state(places)
            ids = np.asarray(live.state.ids, "<u4").tobytes()
        self.sessions[message["sid"]] = live
        return {"tokens": live.state.n_tokens, "bytes_read": n_read, "ids": ids}

    def read_state(self, places: Sequence[Place]) -> tuple[Live, int]:
        """Read and check every record of a snapshot and build its live state."""
        try:
            with StateReader(self.info.layout, places, self.buffers) as reader:
                tail = reader.tail()
                state = self.engine.load(reader.pages(), tail)
        except BadRecordError as error:
            raise RequestError("CORRUPT", str(error)) from error
        # Another quantisation's pages: the next write packs them again under this model's name.
        page_ids = reader.page_ids if tail.fingerprint == self.info.fingerprint else []
        return Live(state, page_ids), reader.n_read

    def op_extend(self, message: Message) -> Task:
        """Append given tokens."""
        live = self.live(message)
        ids = np.frombuffer(message["ids"], dtype="<u4")
        before = live.state.n_tokens
        for done in self.engine.prefill(live.state, ids):
            self.send({"id": message["id"], "ev": "progress", "done": int(done), "total": len(ids)})
            yield
        return {"tokens": live.state.n_tokens, "computed": live.state.n_tokens - before}

    def op_generate(self, message: Message) -> Task:
        """Sample and append tokens until a limit, a stop token or a stop string."""
        live = self.live(message)
        state = live.state
        sampling = Sampling(**message["sampling"])
        stop_ids = set(message["stop_ids"])
        stops: list[bytes] = message["stop"]
        longest = max(map(len, stops), default=0)
        recent = b""
        finish = "length"
        for _ in range(message["max_tokens"]):
            if state.n_tokens >= self.info.config.context:
                finish = "context"
                break
            token = sample(self.logits(state), state.n_tokens, sampling)
            self.engine.step(state, token)
            self.send({"id": message["id"], "ev": "token", "token": token})
            if token in stop_ids:
                finish = "eos"
                break
            if stops:
                piece = self.info.tokenizer.token_bytes(token)
                recent = (recent + piece)[-(longest + len(piece)) :]
                if any(stop in recent for stop in stops):
                    finish = "stop"
                    break
            yield
        return {"tokens": state.n_tokens, "finish": finish}

    def op_write(self, message: Message) -> Task:
        """Pack the pages from `have` on and the tail; write what the store does not know yet.

        `written` lists [type, id, offset, payload bytes, parent] of each record written, `pages` the ids of the pages
        from `have` on.
        """
        live = self.live(message)
        state, layout = live.state, self.info.layout
        at: int = message["offset"]
        have: int = message["have"]
        known: list[list[bytes]] = message["known"]
        n_pages = layout.n_pages(state.n_tokens)
        ids = np.asarray(state.ids, dtype="<u4")
        live.page_ids = live.page_ids.copy()  # a fork shares it
        written: list[list[Any]] = []
        handle = os.open(message["path"], os.O_WRONLY | os.O_CLOEXEC)
        try:
            for number in range(have, n_pages):
                wanted = known[number - have] if number - have < len(known) else []
                if number < len(live.page_ids) and live.page_ids[number] in wanted:
                    continue  # packed before: the id alone tells that the store has it
                parent = live.page_ids[number - 1] if number else NO_PAGE
                first = number * layout.page_tokens
                span = ids[first : first + layout.page_tokens]
                text = self.info.tokenizer.decode_bytes(span.tolist())
                page = Page(
                    self.info.fingerprint, parent, first, span.tobytes(), text, self.engine.page_sections(state, number)
                )
                payload = encode_page(page)
                page_id = content_id(payload)
                live.page_ids[number:] = [page_id]
                if page_id not in wanted:
                    size = write_record(handle, at, RecordType.PAGE, page_id, payload)
                    written.append([int(RecordType.PAGE), page_id, at, size, parent])
                    at += record_bytes(size)
                yield
            leaf = live.page_ids[n_pages - 1] if n_pages else NO_PAGE
            first = n_pages * layout.page_tokens
            tail = Tail(
                tail_header(layout, state.n_tokens),
                self.info.fingerprint,
                leaf,
                first,
                ids[first:].tobytes(),
                self.info.tokenizer.decode_bytes(ids[first:].tolist()),
                self.engine.logits(state),
                self.engine.tail_sections(state),
            )
            payload = encode_tail(tail)
            snapshot_id = content_id(payload)
            size = write_record(handle, at, RecordType.TAIL, snapshot_id, payload)
            written.append([int(RecordType.TAIL), snapshot_id, at, size, leaf])
            at += record_bytes(size)
        finally:
            os.close(handle)
        return {
            "snapshot": snapshot_id,
            "leaf": leaf,
            "end": at,
            "tokens": state.n_tokens,
            "pages": live.page_ids[have:n_pages],
            "written": written,
        }

    def op_logits(self, message: Message) -> Task:
        """The logits of the next token."""
        yield from ()
        return {"logits": bytes(self.engine.logits(self.live(message).state))}

    def op_close(self, message: Message) -> Task:
        """Forget a session."""
        yield from ()
        self.sessions.pop(message["sid"], None)
        return {}

    def op_status(self, message: Message) -> Task:
        """What the engine runs on, and who is resident."""
        yield from ()
        resident = {sid: [live.state.n_tokens, live.state.nbytes] for sid, live in self.sessions.items()}
        return {"resident": resident, "queued": len(self.first) + len(self.tasks), "stats": self.engine.stats()}

    def logits(self, state: LiveState) -> np.ndarray[Any, np.dtype[np.float32]]:
        """The next-token logits as numpy; an empty session has none."""
        if state.n_tokens == 0:
            raise RequestError("ERR", "the session is empty: there is nothing to continue")
        return np.frombuffer(self.engine.logits(state), dtype="<f4")


def write_record(handle: int, offset: int, kind: RecordType, record_id: bytes, payload: Sequence[Buffer]) -> int:
    """Write one whole record with its padding at `offset`; returns the payload's bytes.

    A record is not durable before the daemon's fdatasync, and does not exist before its commit.
    """
    begin = offset
    size = sum(memoryview(piece).nbytes for piece in payload)
    pieces = [
        memoryview(piece).cast("B") for piece in (state_header(kind, record_id, payload), *payload, padding(size))
    ]
    pieces = [piece for piece in pieces if len(piece)]
    while pieces:
        n = os.pwritev(handle, pieces[:512], offset)
        offset += n
        while pieces and n >= len(pieces[0]):
            n -= len(pieces[0])
            del pieces[0]
        if n:
            pieces[0] = pieces[0][n:]
    start_writeback(handle, begin, offset - begin)
    return size
