"""The longest stored prefix against a search that compares the prompt with every snapshot."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from kvdb.store.index import Index, Table, end_key
from kvdb.store.lookup import Match, longest_prefix
from kvdb.store.rows import ModelRow, pack
from kvdb_engine.catalog import open_model
from kvdb_protocol.ids import extend_prefix, root_prefix

PAGE = 128
INFO = open_model(f"synthetic:dsv4-nano,page_tokens={PAGE}")
OWN, OTHER, FOREIGN = (bytes([number]) * 32 for number in range(1, 4))
NUMBERS = {OWN: 1, OTHER: 2, FOREIGN: 3}  # the last is of another family
FAMILY = INFO.family

Stored = tuple[tuple[int, ...], bytes, bytes]  # token ids, model, snapshot id


def packed(ids: tuple[int, ...]) -> bytes:
    return np.array(ids, "<u4").tobytes()


def fill(index: Index, snapshots: list[Stored]) -> None:
    txn = index.begin_write()
    for fingerprint, number in NUMBERS.items():
        family = FAMILY if fingerprint != FOREIGN else b"another family of models, 32 byte"
        txn.put(Table.MODELS, fingerprint, pack(ModelRow(number, "m", family, INFO.layout.to_bytes())))
    for ids, fingerprint, snapshot_id in snapshots:
        prefix, data = root_prefix(FAMILY), packed(ids)
        for page in range(len(ids) // PAGE):
            prefix = extend_prefix(prefix, data[4 * page * PAGE : 4 * (page + 1) * PAGE])
            txn.put(Table.PREFIXES, prefix + snapshot_id, pack((NUMBERS[fingerprint],)))
        tail = data[4 * (len(ids) // PAGE) * PAGE :]
        key = end_key(prefix, len(tail) // 4, extend_prefix(prefix, tail), snapshot_id)
        txn.put(Table.ENDS, key, pack((NUMBERS[fingerprint],)))
    txn.raw.commit()


def by_comparing(
    snapshots: list[Stored], prompt: tuple[int, ...], models: set[bytes], bad: set[bytes]
) -> tuple[int, bool]:
    """(tokens, of the own model) of the best: the longest, of the own model if one is."""
    fitting = [
        (len(ids), fingerprint == OWN)
        for ids, fingerprint, snapshot_id in snapshots
        if fingerprint in models and snapshot_id not in bad and prompt[: len(ids)] == ids
    ]
    return max(fitting, default=(-1, False))


@pytest.mark.parametrize("seed", range(12))
def test_finds_what_a_comparison_with_all_finds(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    trunk = tuple(rng.randrange(3) for _ in range(4 * PAGE))
    snapshots: list[Stored] = []
    for number in range(150):
        ids = trunk[: rng.choice((rng.randrange(4 * PAGE), rng.randrange(12), 2 * PAGE + rng.randrange(5)))]
        ids += tuple(rng.randrange(3) for _ in range(rng.choice((0, 0, 1, 2, 5))))
        # Few lengths have many snapshots, most have one: both ways of going on are taken.
        snapshots.append((ids, rng.choice((OWN, OTHER)), number.to_bytes(32, "big")))
    index = Index(tmp_path / "index")
    fill(index, snapshots)
    with index.read() as txn:
        for _ in range(60):
            prompt = trunk[: rng.randrange(4 * PAGE + 1)] + tuple(rng.randrange(3) for _ in range(rng.randrange(4)))
            cross_quant = rng.random() < 0.5
            bad = {rng.randrange(150).to_bytes(32, "big") for _ in range(rng.choice((0, 20)))}
            found = longest_prefix(txn, FAMILY, OWN, packed(prompt), cross_quant, lambda one, bad=bad: one not in bad)  # type: ignore[misc]
            wanted = by_comparing(snapshots, prompt, {OWN, OTHER} if cross_quant else {OWN}, bad)
            assert ((found.n_tokens, found.same_quant) if found else (-1, False)) == wanted
            if isinstance(found, Match):
                assert found.snapshot_id not in bad
    index.close()
