"""kvdb-demo: the whole path on a scratch directory, checked, with one table at the end."""

from kvdb_tools.demo.main import main

__all__ = ["main"]
