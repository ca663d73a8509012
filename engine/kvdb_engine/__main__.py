"""Entry point of the engine worker: `python -P -m kvdb_engine MODEL FD`, started by the daemon.

The first frame out is `ready` (what the engine runs on) or `fatal` (why it cannot run).
"""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import socket
import sys
from typing import TYPE_CHECKING, Any

from kvdb_protocol.frames import encode_frame

if TYPE_CHECKING:
    from kvdb_engine.catalog import ModelInfo
    from kvdb_engine.interface import EngineLike

# On a machine whose processors the model fills, the daemon must still be given one at once: it answers everyone else.
NICENESS = 5


def open_engine(info: ModelInfo) -> EngineLike[Any]:
    """The engine for a model; MLX is imported only where the model needs it."""
    if info.is_synthetic:
        from kvdb_engine.synthetic import SyntheticEngine

        return SyntheticEngine(info)
    try:
        from kvdb_engine.engine import Engine
    except ImportError as error:
        raise RuntimeError(f"{error}: install the engine with  pip install 'kvdb[engine]'") from error
    return Engine(info)


def main() -> int:
    """Load the model, say so, serve until the daemon goes away."""
    spec, fd = sys.argv[1], int(sys.argv[2])
    # Ctrl-C, and service managers that end a whole group, reach this process too; but live states have to be stored
    # first: the daemon decides when the worker ends, by closing the socket.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with contextlib.suppress(OSError):
        os.nice(NICENESS)
    sock = socket.socket(fileno=fd)
    try:
        from kvdb_engine.catalog import open_model
        from kvdb_engine.worker import Worker

        info = open_model(spec)
        engine = open_engine(info)
        # Model and modules stay: a collector that walks over them takes some milliseconds, often of a RESTORE.
        gc.freeze()
    except Exception as error:
        sock.sendall(encode_frame({"ev": "fatal", "message": f"{type(error).__name__}: {error}"}))
        return 1
    sock.sendall(encode_frame({"ev": "ready", "fingerprint": info.fingerprint, "stats": engine.stats()}))
    Worker(info, engine, sock).run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
