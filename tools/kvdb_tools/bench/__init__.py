"""kvdb-bench: measurements beside their baselines, in one run on one machine."""

from kvdb_tools.bench.main import main

__all__ = ["main"]
