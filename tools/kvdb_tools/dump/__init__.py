"""kvdb-dump: look at a data directory, live or not, or at a ds4 `.kv` file. Reads only; no model, no daemon."""

from kvdb_tools.dump.main import main

__all__ = ["main"]
