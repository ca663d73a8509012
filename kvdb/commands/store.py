"""STORE STATS, VERIFY, GC: what is on disk, whether it is whole, and giving dead bytes back."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import TYPE_CHECKING

from kvdb.commands.arguments import Arguments, unknown_option
from kvdb.commands.registry import handler
from kvdb_protocol.replies import Reply

if TYPE_CHECKING:
    from kvdb.net.client import Client

# Findings named in one reply; kvdb-check lists them all.
_FINDINGS_SHOWN = 1000


@handler("STORE STATS")
async def stats(client: Client, raw: list[bytes]) -> Reply:
    """STORE STATS: where every byte of the data directory is."""
    store = client.server.store
    found = await store.stats()
    verified, to_verify = store.verified
    return {**asdict(found), "live": found.live, "verified": verified, "to_verify": to_verify}


@handler("STORE VERIFY")
async def verify(client: Client, raw: list[bytes]) -> Reply:
    """STORE VERIFY [DEEP] [RATE bytes]: what is damaged, and which keys that hurts.

    DEEP reads and checks every payload. RATE: bytes of payloads a second at most. STORE STATS says how far it is.
    """
    args = Arguments(raw)
    deep, rate = False, 0
    while args:
        word = args.word()
        if word == b"DEEP":
            deep = True
        elif word == b"RATE":
            rate = args.integer("RATE", 1, 1 << 50)
        else:
            raise unknown_option(word)
    began = time.perf_counter()
    findings = await client.server.store.verify(deep=deep, bytes_per_s=rate)
    return {
        "damaged": len(findings),
        "findings": [
            {
                "kind": finding.kind,
                "message": finding.message,
                "keys": [key for db, key in finding.keys if db == client.db],
            }
            for finding in findings[:_FINDINGS_SHOWN]
        ],
        "ms": round((time.perf_counter() - began) * 1e3, 3),
    }


@handler("STORE GC")
async def gc(client: Client, raw: list[bytes]) -> Reply:
    """STORE GC: give every dead byte back to the file system; how many there were."""
    return {"bytes_freed": await client.server.store.gc()}
