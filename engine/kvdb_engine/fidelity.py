"""Compare the engine with vectors made by ds4: `python -m kvdb_engine.fidelity FOLDER [BACKEND]`.

FOLDER holds what tests/vectors/ds4/README.md lists. For each way of running the same 280 tokens (one chunk, chunks of
128, token by token) every section of the state is compared with ds4's payload, then 20 more tokens are decoded and
their logits compared. The last lines load ds4's own payloads and compute one step: no drift, so the difference is
arithmetic alone.

Differences grow from rounding: where two implementations differ in the last bit of a value that lies on the border
between two FP8 or FP4 codes, the stored row differs by a whole code, and later tokens see it; where that moves a router
score across another one, a token gets another expert. The same happens between two ways of ours to compute the same
tokens (one by one, in chunks, by numpy or MLX), and when the embeddings are nudged by two units in their last place:
how far these lie apart is the noise. Nudges matter because the ways of one machine may all fall on the same side of a
border. Most likely tokens are compared where the reference's best two logits differ by more than the noise there.

tests/show/fidelity.py prints the whole table, for both references.
"""

from __future__ import annotations

import gzip
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from kvdb_engine.catalog import open_model
from kvdb_engine.engine import Engine
from kvdb_engine.model import Model, empty_layers
from kvdb_engine.packing import F32
from kvdb_engine.state import State
from kvdb_engine.state_records import to_dsv4
from kvdb_protocol.dsv4 import Dsv4Payload, decode_payload

N_PREFILL = 280
# Tokens at a time of the ways whose spread is the noise.
WAYS = (1, 7, 64, 300)
# And of the runs with nudged embeddings, how many there are, and by how much a value is changed at most, of itself.
NUDGED_WAY = 64
NUDGES = 8
NUDGE = 2.0**-22


@dataclass(frozen=True, slots=True)
class Difference:
    """Two arrays compared. median and largest are of absolute differences; rms is of the reference."""

    what: str
    values: int
    median: float
    largest: float
    correlation: float
    rms: float


def compare(what: str, ours: F32, theirs: F32) -> Difference:
    """Compare two arrays of the same size."""
    a, b = ours.ravel().astype(np.float64), theirs.ravel().astype(np.float64)
    gap = np.abs(a - b)
    correlation = float(np.corrcoef(a, b)[0, 1]) if a.size > 1 and a.std() and b.std() else 1.0
    return Difference(
        what, a.size, float(np.median(gap)), float(gap.max()), correlation, float(np.sqrt(np.mean(b * b)))
    )


class Vectors:
    """ds4's files for the tiny model."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ids = np.fromfile(folder / "tokens.i32", "<i4").astype(np.uint32)
        self.from_token_1 = self._read("logits_from_token1.f32.gz").reshape(len(self.ids), -1)
        self.after_prefill = self._read("logits.f32.gz").reshape(-1, self.from_token_1.shape[1])

    def _read(self, name: str) -> F32:
        return np.frombuffer(gzip.decompress((self.folder / name).read_bytes()), "<f4")

    def payload(self, name: str, ratios: tuple[int, ...]) -> Dsv4Payload:
        """A decoded payload file."""
        return decode_payload(gzip.decompress((self.folder / f"{name}.payload.gz").read_bytes()), ratios)

    def engine(self, backend: str = "auto", prefill_chunk: int = 1024) -> Engine:
        """The tiny model, loaded (its GGUF is unpacked into a temporary file for as long as that takes)."""
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) / "tiny.gguf"
            path.write_bytes(gzip.decompress((self.folder / "tiny.gguf.gz").read_bytes()))
            info = open_model(str(path))
            _ = info.tokenizer
            return Engine(info, backend_name=backend, prefill_chunk=prefill_chunk)


def run(engine: Engine, ids: Sequence[int] | np.ndarray, chunk: int) -> State:
    """A state of these tokens, computed in chunks of `chunk`; 1 decodes token by token."""
    state = engine.new_state()
    engine.prefill_chunk = chunk
    for _ in engine.prefill(state, np.asarray(ids, np.uint32)):
        pass
    return state


def compare_states(ours: Dsv4Payload, theirs: Dsv4Payload, n_tokens: int) -> list[Difference]:
    """Section by section; of the frontiers only the rows that hold a token."""
    parts: dict[str, tuple[list[F32], list[F32]]] = {}

    def add(what: str, a: object, b: object, rows: slice = slice(None), width: int = 1) -> None:
        x, y = (np.frombuffer(data, "<f4").reshape(-1, width)[rows] for data in (a, b))  # type: ignore[call-overload]
        parts.setdefault(what, ([], []))[0].append(x.ravel())
        parts[what][1].append(y.ravel())

    head = theirs.header
    for a, b in zip(ours.layers, theirs.layers, strict=True):
        add("window rows", a.window, b.window)
        if not a.ratio:
            continue
        overlap = 2 if a.ratio == 4 else 1
        rows = slice(0, (4 if a.ratio == 4 else 0) + n_tokens % a.ratio)
        name = f"ratio {a.ratio}"
        add(f"compressed rows, {name}", a.compressed, b.compressed)
        add(f"frontier kv, {name}", a.frontier_kv, b.frontier_kv, rows, overlap * head.head_dim)
        add(f"frontier score, {name}", a.frontier_score, b.frontier_score, rows, overlap * head.head_dim)
        if a.ratio == 4:
            add("index rows", a.index, b.index)
            add("index frontier kv", a.index_frontier_kv, b.index_frontier_kv, rows, 2 * head.index_dim)
            add("index frontier score", a.index_frontier_score, b.index_frontier_score, rows, 2 * head.index_dim)
    add("logits", ours.logits, theirs.logits)
    return [compare(what, np.concatenate(a), np.concatenate(b)) for what, (a, b) in sorted(parts.items())]


def prefill_table(engine: Engine, vectors: Vectors, chunk: int) -> list[Difference]:
    """Sections after 280 tokens run in this chunking, then the logits of 20 decoded tokens."""
    state = run(engine, vectors.ids[:N_PREFILL], chunk)
    theirs = vectors.payload("prefill", engine.info.config.ratios)
    found = compare_states(to_dsv4(state, 1024), theirs, N_PREFILL)
    logits = []
    for token in vectors.ids[N_PREFILL:]:
        engine.step(state, int(token))
        logits.append(state.logits)
    return [*found, compare("20 decoded logits", np.stack(logits), vectors.after_prefill[1:])]


def decode_logits(engine: Engine, vectors: Vectors) -> F32:
    """(300, vocab) logits of decoding all tokens one by one."""
    state = engine.new_state()
    logits = []
    for token in vectors.ids:
        engine.step(state, int(token))
        logits.append(state.logits)
    return np.stack(logits)


def one_step(engine: Engine, vectors: Vectors) -> list[Difference]:
    """Load ds4's payload after 280 and after 299 tokens, compute one token, compare with ds4's next logits."""
    ratios = engine.info.config.ratios
    found = []
    for name, row in (("prefill", 1), ("decode", 20)):
        payload = vectors.payload(name, ratios)
        state = engine.load_dsv4(payload)
        engine.step(state, int(vectors.ids[payload.header.n_tokens]))
        what = f"one step from ds4's payload of {payload.header.n_tokens} tokens"
        found.append(compare(what, state.logits, vectors.after_prefill[row]))
    return found


def every_logits(model: Model, ids: np.ndarray, size: int) -> F32:
    """(T, vocab) logits after each token, computed `size` tokens at a time."""
    layers, found = empty_layers(model.ops, model.config), []
    for first in range(0, len(ids), size):
        layers, logits = model.forward(layers, ids[first : first + size], first, every=True)
        found.append(model.ops.host(logits))
    return np.concatenate(found)


def nudged_logits(model: Model, ids: np.ndarray) -> list[F32]:
    """`every_logits` with embeddings that differ in their last bits, NUDGES times."""
    ops, weights = model.ops, model.weights
    table = ops.host(ops.embed(weights.embed, np.arange(model.config.vocab)))
    found = []
    for seed in range(NUDGES):
        factors = 1 + np.random.default_rng(seed).uniform(-NUDGE, NUDGE, table.shape).astype(np.float32)
        nudged = Model(ops, model.config, replace(weights, embed=ops.array(table * factors)))
        found.append(every_logits(nudged, ids, NUDGED_WAY))
    return found


def own_noise(ways: Sequence[F32]) -> F32:
    """(T,) how far our own ways of computing the same logits lie apart: the largest difference at each position."""
    stacked = np.stack(ways)
    noise: F32 = (stacked.max(0) - stacked.min(0)).max(-1)
    return noise


def argmax_agreement(ours: F32, theirs: F32, noise: F32) -> tuple[int, int]:
    """(agreeing, counted) positions whose best two logits lie further apart in the reference than the noise there."""
    best = np.sort(theirs, axis=1)
    sure = best[:, -1] - best[:, -2] > noise
    return int((ours.argmax(1) == theirs.argmax(1))[sure].sum()), int(sure.sum())


def _print(title: str, rows: Sequence[Difference]) -> None:
    print(f"\n{title}\n{'section':44} {'values':>7} {'rms':>8} {'median':>9} {'largest':>9} {'correlation':>12}")
    for row in rows:
        print(
            f"{row.what:44} {row.values:7} {row.rms:8.3f} {row.median:9.1e} {row.largest:9.1e} {row.correlation:12.7f}"
        )


def main(arguments: Sequence[str]) -> int:
    """Print all tables."""
    if not 1 <= len(arguments) <= 2:
        print(__doc__, file=sys.stderr)
        return 2
    vectors = Vectors(Path(arguments[0]))
    engine = vectors.engine(arguments[1] if len(arguments) > 1 else "auto")
    print(f"back end {engine.ops.name}")
    for title, chunk in (("one chunk", 1024), ("chunks of 128", 128), ("token by token", 1)):
        _print(f"280 tokens as {title}", prefill_table(engine, vectors, chunk))
    ours, theirs = decode_logits(engine, vectors), vectors.from_token_1
    rows = [compare("tokens 1 to 5", ours[:5], theirs[:5]), compare("tokens 1 to 300", ours, theirs)]
    _print("logits of decoding from the first token", rows)
    engines = {engine.ops.name: engine, "numpy": engine if engine.ops.name == "numpy" else vectors.engine("numpy")}
    ways = [every_logits(one.model, vectors.ids, size) for one in engines.values() for size in WAYS]
    ways += nudged_logits(engine.model, vectors.ids)
    agree, counted = argmax_agreement(ours, theirs, own_noise(ways))
    print(f"same argmax where the best two differ by more than the noise there: {agree} of {counted}")
    _print("without drift", one_step(engine, vectors))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
