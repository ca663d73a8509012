"""ENGINE LOAD, UNLOAD, STATUS, MODELS, CANCEL: the workers, seen from outside."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from kvdb.commands.registry import handler
from kvdb.store.rows import Reason
from kvdb_protocol.replies import Reply, Simple

if TYPE_CHECKING:
    from kvdb.net.client import Client


def _name(raw: list[bytes]) -> str | None:
    return raw[0].decode(errors="replace") if raw else None


@handler("ENGINE LOAD")
async def load(client: Client, raw: list[bytes]) -> Reply:
    """ENGINE LOAD [model]: start the worker now instead of at first use."""
    await client.server.sessions.model(_name(raw)).client.start()
    return Simple("OK")


@handler("ENGINE UNLOAD")
async def unload(client: Client, raw: list[bytes]) -> Reply:
    """ENGINE UNLOAD [model]: store what is live and end the worker."""
    sessions = client.server.sessions
    model = sessions.model(_name(raw))
    await sessions.park(model, Reason.EVICT)
    await model.client.stop()
    return Simple("OK")


@handler("ENGINE STATUS")
def status(client: Client, raw: list[bytes]) -> Reply:
    """ENGINE STATUS [model]: whether a worker runs, what it holds and what it is doing. Starts nothing."""
    sessions = client.server.sessions
    model = sessions.model(_name(raw))
    worker = model.client
    return {
        "model": model.info.name,
        "state": "running" if worker.running else "stopped",
        "pid": worker.process.pid if worker.process is not None else None,
        "uptime_s": round(time.monotonic() - worker.started_at, 1) if worker.running else 0,
        "starts": worker.starts,
        "requests": [
            {
                "session": place[1] if sid is not None and (place := sessions.keyspace.session_place(sid)) else None,
                "op": op,
                "done": done,
                "total": total,
                "seconds": round(seconds, 3),
            }
            for sid, op, done, total, seconds in worker.requests()
        ],
        "resident_sessions": sessions.n_resident(model),
        "resident_bytes": worker.resident_bytes,
        "rss_bytes": worker.rss_bytes(),
        "backend": {str(name): value for name, value in worker.stats.items()},
    }


@handler("ENGINE MODELS")
def models(client: Client, raw: list[bytes]) -> Reply:
    """ENGINE MODELS: what is served here."""
    replies: list[Reply] = []
    for name, model in client.server.sessions.models.items():
        config, layout = model.info.config, model.info.layout
        replies.append(
            {
                "name": name,
                "fingerprint": model.info.fingerprint.hex(),
                "family": model.info.family.hex(),
                "context": config.context,
                "vocab": config.vocab,
                "layers": len(layout.ratios),
                "page_tokens": layout.page_tokens,
            }
        )
    return replies


@handler("ENGINE CANCEL")
async def cancel(client: Client, raw: list[bytes]) -> Reply:
    """ENGINE CANCEL session: stop its prefill or generation at the next chunk; how many were stopped."""
    session = await client.server.sessions.get(client.db, raw[0])
    return session.model.client.cancel(session.uid)
