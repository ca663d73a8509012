"""Check on this machine what kvdb promises: `python -m kvdb_engine.selfcheck [MODEL] [BACKEND]`.

Runs a model over random tokens and compares, bit by bit, live states with stored and restored ones, with forks and with
a second run; then prefill with decode, where only a bound holds; and prints speeds. Exit status 1 if anything that must
be equal is not: then snapshots made on this machine and back end do not resume exactly.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence

import numpy as np

from kvdb_engine.catalog import open_model
from kvdb_engine.engine import Engine
from kvdb_engine.state import U32, State
from kvdb_protocol.ids import NO_PAGE
from kvdb_protocol.page import Page, decode_page, encode_page
from kvdb_protocol.tail import Tail, decode_tail, encode_tail, tail_header

# Lengths around the borders of groups, blocks, windows, chunks and pages.
LENGTHS = (1, 2, 3, 4, 5, 63, 65, 127, 128, 129, 255, 256, 257, 511, 513, 1024, 2049)
SPEED_LENGTHS = (128, 2048, 16384)
N_STEPS = 6
N_EXTEND = 150
N_NOISE = 300


def through_records(engine: Engine, state: State) -> State:
    """Write a state's pages and tail to bytes and read them back."""
    info, layout = engine.info, state.layout
    ids = np.asarray(state.ids, "<u4")
    n_pages = layout.n_pages(state.n_tokens)
    pages = []
    for number in range(n_pages):
        first = number * layout.page_tokens
        span = ids[first : first + layout.page_tokens].tobytes()
        page = Page(info.fingerprint, NO_PAGE, first, span, b"", engine.page_sections(state, number))
        pages.append(decode_page(layout, memoryview(b"".join(bytes(piece) for piece in encode_page(page)))))
    first = n_pages * layout.page_tokens
    tail = Tail(
        tail_header(layout, state.n_tokens),
        info.fingerprint,
        NO_PAGE,
        first,
        ids[first:].tobytes(),
        b"",
        engine.logits(state),
        engine.tail_sections(state),
    )
    data = b"".join(bytes(piece) for piece in encode_tail(tail))
    return engine.load(pages, decode_tail(layout, memoryview(data)))


def everything(engine: Engine, state: State) -> list[bytes]:
    """All that a state holds, as bytes."""
    pages = range(state.layout.n_pages(state.n_tokens))
    sections = [section for number in pages for section in engine.page_sections(state, number)]
    sections += engine.tail_sections(state)
    return [state.ids.tobytes(), bytes(engine.logits(state)), *(bytes(section.data) for section in sections)]


def prefilled(engine: Engine, ids: U32) -> State:
    """A new state of these tokens."""
    state = engine.new_state()
    _prefill(engine, state, ids)
    return state


def _prefill(engine: Engine, state: State, ids: U32) -> None:
    for _ in engine.prefill(state, ids):
        pass
    _ = state.logits  # waits for the device


def _decode(engine: Engine, state: State, ids: U32) -> None:
    for token in ids:
        engine.step(state, int(token))
        _ = state.logits


def continued(engine: Engine, state: State, ids: U32) -> list[bytes]:
    """Decode N_STEPS tokens, prefill the rest; the logits after each, then the whole state."""
    found = []
    for token in ids[:N_STEPS]:
        engine.step(state, int(token))
        found.append(bytes(engine.logits(state)))
    found.extend(bytes(engine.logits(state)) for _ in engine.prefill(state, ids[N_STEPS:]))
    return found + everything(engine, state)


def check_length(engine: Engine, ids: U32, n_tokens: int) -> list[str]:
    """What differs, in words, for a state of `n_tokens`; nothing if all is well."""
    live = prefilled(engine, ids[:n_tokens])
    restored = through_records(engine, live)
    fork = live.clone()
    origin = everything(engine, live)
    follow = ids[n_tokens : n_tokens + N_STEPS + N_EXTEND]
    found = []
    if everything(engine, restored) != origin:
        found.append("restored state differs")
    wanted = continued(engine, fork, follow)
    if everything(engine, live) != origin:
        found.append("a fork changed its origin")
    for what, state in (("restored", restored), ("live", live), ("second run", prefilled(engine, ids[:n_tokens]))):
        if continued(engine, state, follow) != wanted:
            found.append(f"{what} state continues otherwise than a fork")
    return found


def noise(engine: Engine, ids: U32) -> tuple[float, float]:
    """Median and largest difference of logits between prefill and decode of the same tokens, relative to their rms."""
    at_once, one_by_one = prefilled(engine, ids), engine.new_state()
    for token in ids:
        engine.step(one_by_one, int(token))
    gap = np.abs(at_once.logits - one_by_one.logits) / np.sqrt(np.mean(at_once.logits**2))
    return float(np.median(gap)), float(gap.max())


def _rate(count: int, work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return count / (time.perf_counter() - started)


def main(arguments: Sequence[str]) -> int:
    """Run all checks and print them."""
    if len(arguments) > 2 or any(argument.startswith("-") for argument in arguments):
        print(__doc__, file=sys.stderr)
        return 2
    info = open_model(arguments[0] if arguments else "dsv4-nano")
    engine = Engine(info, backend_name=arguments[1] if len(arguments) > 1 else "auto")
    print(f"{info.name} on {engine.ops.name}")
    vocab, context = info.config.vocab, info.config.context
    ids = np.random.default_rng(7).integers(0, vocab, 20_000).astype(np.uint32)
    bad = 0
    for n_tokens in LENGTHS:
        if n_tokens + N_STEPS + N_EXTEND > context:
            continue
        found = check_length(engine, ids, n_tokens)
        bad += len(found)
        print(f"{n_tokens:6} tokens: {'; '.join(found) or 'live, restored, forked and repeated runs are equal'}")
    median, largest = noise(engine, ids[: min(N_NOISE, context)])
    print(f"prefill against decode, {N_NOISE} tokens: median {median:.1e}, largest {largest:.1e} of the logits' rms")
    state = engine.new_state()
    for n_tokens in SPEED_LENGTHS:
        if n_tokens + 50 > context:
            break
        before = state.n_tokens
        rate = _rate(n_tokens - before, lambda: _prefill(engine, state, ids[before:n_tokens]))  # noqa: B023
        fork = state.clone()
        _decode(engine, fork, ids[:2])
        steps = _rate(32, lambda: _decode(engine, fork, ids[:32]))  # noqa: B023
        print(f"prefill {before} to {n_tokens}: {rate:.0f} tokens/s; decode at {n_tokens}: {steps:.1f} tokens/s")
    print("all equal" if not bad else f"{bad} DIFFERENCES: do not trust snapshots made here")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
