"""kvdb-cli: talk to a kvdb (or Redis) server from a terminal or a script."""

from kvdb_tools.cli.main import main

__all__ = ["main"]
