"""Fidelity: configuration x reference x section -> largest difference, correlation, and the most likely token.

References: transformers' DeepseekV4ForCausalLM in float32 (tests/vectors/transformers: random tiny configurations,
no rounding of rows) and ds4's processor path (tests/vectors/ds4: rounded rows). Every section of the state is compared,
for each way of running the same tokens: the table has the worst of them.

The most likely token must be the reference's in 99.9 % of the positions where the reference's best two logits differ by
more than the noise: the largest difference, at that position, between our own ways of computing the same tokens (for
ds4: in chunks of 1, 7, 64 and 300, on every back end, and with embeddings nudged in their last bits). For ds4's
vectors, differences of states are bounded by correlation: a flipped FP8 or FP4 code is a whole step.

    python tests/show/fidelity.py [--quick]
"""

from __future__ import annotations

import importlib.util
import sys
import tempfile
from pathlib import Path

import click
import numpy as np
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[2]))

from kvdb_engine import backend
from kvdb_engine.fidelity import (
    WAYS,
    Difference,
    Vectors,
    argmax_agreement,
    compare,
    every_logits,
    nudged_logits,
    one_step,
    own_noise,
    prefill_table,
)
from kvdb_engine.model import Model, empty_layers
from tests.engine.test_transformers import FOLDER, golden, load, sections

ROOT = Path(__file__).parents[2]
PIECES = {"one piece": [512], "pieces": [1, 2, 3, 127, 1, 60, 512], "one by one": [1] * 512}
TRANSFORMERS_TOLERANCE = 1e-4  # float32 on both sides; logits have an rms of about 1
DS4_CORRELATION = 0.998
AGREEMENT = 0.999


class Report:
    """The table as it grows, and whether all of it holds."""

    def __init__(self) -> None:
        self.table = Table("reference", "configuration", "back end", "section", "values", "largest", "correlation", "")
        self.tokens = Table(
            "reference", "configuration", "back end", "positions", "surer than noise", "agreeing", "%", ""
        )
        self.counted = self.agreeing = self.wrong = 0
        self.ds4: dict[str, list[np.ndarray]] = {}  # logits of each of our ways, by back end
        self.nudged: list[np.ndarray] = []

    def section(self, reference: str, name: str, ops: str, row: Difference, holds: bool) -> None:
        """A line of the first table."""
        self.wrong += not holds
        cells = (f"{row.values:,}", f"{row.largest:.1e}", f"{row.correlation:.7f}", "holds" if holds else "WRONG")
        self.table.add_row(reference, name, ops, row.what, *cells)

    def agreement(self, reference: str, name: str, ops: str, positions: int, agreeing: int, counted: int) -> None:
        """A line of the second table."""
        holds = agreeing >= AGREEMENT * counted and counted > 0
        self.wrong += not holds
        self.counted += counted
        self.agreeing += agreeing
        share = f"{100 * agreeing / max(counted, 1):.2f}"
        cells = (f"{positions:,}", f"{counted:,}", f"{agreeing:,}", share, "holds" if holds else "WRONG")
        self.tokens.add_row(reference, name, ops, *cells)


def against_transformers(report: Report, name: str, ops_name: str) -> None:
    """One configuration: every section in every way, and the logits of every position."""
    ops = backend.select(ops_name)
    with tempfile.TemporaryDirectory() as scratch:
        model = load(name, ops, Path(scratch))
    ids = golden.case_ids(name)
    with np.load(FOLDER / f"{name}.npz") as file:
        theirs = dict(file)
    ours: dict[str, list[np.ndarray]] = {}
    wanted: dict[str, list[np.ndarray]] = {}
    logits = []
    for sizes in PIECES.values():
        layers, every = run(model, ids, sizes)
        logits.append(every)
        found = {**sections(model, layers, ids), "logits": every}
        assert found.keys() == theirs.keys()
        for key, values in theirs.items():
            kind = ".".join(part for part in key.split(".") if not part.isdigit())
            ours.setdefault(kind, []).append(found[key].ravel())
            wanted.setdefault(kind, []).append(values.ravel())
    for kind in ours:
        a, b = (np.concatenate(values[kind]) for values in (ours, wanted))
        if a.size:
            row = compare(kind, a, b)
            report.section("transformers", name, ops_name, row, row.largest < TRANSFORMERS_TOLERANCE)
    noise = own_noise(logits)
    pairs = [argmax_agreement(one, theirs["logits"], noise) for one in logits]
    agreeing, counted = (sum(numbers) for numbers in zip(*pairs, strict=True))
    report.agreement("transformers", name, ops_name, len(pairs) * len(ids), agreeing, counted)


def run(model: Model, ids: np.ndarray, sizes: list[int]) -> tuple[object, np.ndarray]:
    """The state after all tokens, and the logits of every position."""
    layers, found, at = empty_layers(model.ops, model.config), [], 0
    for size in sizes:
        chunk = ids[at : at + size]
        if not len(chunk):
            break
        layers, logits = model.forward(layers, chunk, at, every=True)
        found.append(model.ops.host(logits))
        at += len(chunk)
    return layers, np.concatenate(found)


def against_ds4(report: Report, vectors: Vectors, ops_name: str, chunks: tuple[int, ...]) -> None:
    """Sections after a prefill in each chunking, one step from ds4's own states, and the logits of every position."""
    engine = vectors.engine(ops_name)
    for row in one_step(engine, vectors):
        report.section("ds4", "no drift", ops_name, row, row.largest < 1e-4)
    for chunk in chunks:
        name = "280 tokens one by one" if chunk == 1 else f"280 tokens by {chunk}"
        for row in prefill_table(engine, vectors, chunk):
            report.section("ds4", name, ops_name, row, row.correlation > DS4_CORRELATION)
    report.ds4[ops_name] = [every_logits(engine.model, vectors.ids, size) for size in WAYS]
    if ops_name == "numpy":
        report.nudged = nudged_logits(engine.model, vectors.ids)


def tokens_of_ds4(report: Report, vectors: Vectors) -> None:
    """The most likely tokens of every way; the noise is the spread of all of them."""
    noise = own_noise([*report.nudged, *(one for ways in report.ds4.values() for one in ways)])
    for ops_name, ways in report.ds4.items():
        pairs = [argmax_agreement(one, vectors.from_token_1, noise) for one in ways]
        agreeing, counted = (sum(numbers) for numbers in zip(*pairs, strict=True))
        report.agreement("ds4", "300 tokens, four ways", ops_name, len(pairs) * len(vectors.ids), agreeing, counted)
    print(f"ds4: the noise is {np.median(noise):.3f} at the median position and {noise.max():.2f} at the largest")


@click.command(help=__doc__)
@click.option("--quick", is_flag=True, help="Two configurations of transformers, and numpy only.")
def main(quick: bool) -> None:
    """Print both tables."""
    names = ["numpy"]
    if not quick and importlib.util.find_spec("mlx") is not None:
        names.append("mlx-cpu")
    report = Report()
    vectors = Vectors(ROOT / "tests" / "vectors" / "ds4")
    for ops_name in names:
        for name in list(golden.CASES)[: 2 if quick else None]:
            against_transformers(report, name, ops_name)
        against_ds4(report, vectors, ops_name, (128,) if quick else (1024, 128, 1))
    tokens_of_ds4(report, vectors)
    console = Console(width=150)
    console.print(report.table)
    console.print(report.tokens)
    print(
        f"most likely token where the reference is surer than the noise: {report.agreeing:,} of {report.counted:,} "
        f"({100 * report.agreeing / max(report.counted, 1):.3f} %); {report.wrong} lines do not hold"
    )
    sys.exit(1 if report.wrong else 0)


if __name__ == "__main__":
    main()
