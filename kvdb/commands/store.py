"""STORE STATS, VERIFY, GC: what is on disk, whether it is whole, and giving dead bytes back."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import TYPE_CHECKING

from kvdb.commands.arguments import unknown_option
from kvdb.commands.registry import handler
from kvdb.errors import KvdbError
from kvdb_protocol.resp import Reply

if TYPE_CHECKING:
    from kvdb.net.client import Client

# Findings named in one reply; kvdb-check lists them all.
_FINDINGS_SHOWN = 1000


@handler("STORE STATS")
async def stats(client: Client, raw: list[bytes]) -> Reply:
    """STORE STATS: where every byte of the data directory is."""
    found = await client.server.store.stats()
    return {**asdict(found), "live": found.live}


@handler("STORE VERIFY")
async def verify(client: Client, raw: list[bytes]) -> Reply:
    """STORE VERIFY [DEEP]: what is damaged, and which keys that hurts. DEEP reads and checks every payload."""
    if len(raw) > 1:
        raise KvdbError("syntax error")
    if raw and raw[0].upper() != b"DEEP":
        raise unknown_option(raw[0])
    began = time.perf_counter()
    findings = await client.server.store.verify(deep=bool(raw))
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
