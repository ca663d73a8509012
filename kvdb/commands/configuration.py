"""CONFIG GET, SET, REWRITE, RESETSTAT."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvdb.commands.registry import handler
from kvdb.errors import KvdbError
from kvdb.rewrite import rewrite_file
from kvdb_protocol.replies import OK, Reply

if TYPE_CHECKING:
    from kvdb.net.client import Client


@handler("CONFIG GET")
def config_get(client: Client, args: list[bytes]) -> Reply:
    """Names and values that match the patterns."""
    found = client.server.config.matching(pattern.decode("utf-8", "replace") for pattern in args)
    return dict(found)


@handler("CONFIG SET")
def config_set(client: Client, args: list[bytes]) -> Reply:
    """Change values, all or none."""
    if len(args) % 2:
        raise KvdbError("wrong number of arguments for 'config|set' command")
    words = [word.decode("utf-8", "surrogateescape") for word in args]
    client.server.config.set(list(zip(words[::2], words[1::2], strict=True)))
    return OK


@handler("CONFIG REWRITE")
def config_rewrite(client: Client, args: list[bytes]) -> Reply:
    """Write the values in force into the configuration file, keeping its comments and order."""
    config = client.server.config
    if config.file is None:
        raise KvdbError("The server is running without a config file")
    rewrite_file(config)
    return OK


@handler("CONFIG RESETSTAT")
def config_resetstat(client: Client, args: list[bytes]) -> Reply:
    """Set the counters of INFO to zero."""
    server = client.server
    server.statistics.reset()
    for bound in server.commands.values():
        bound.reset()
        for sub in bound.subcommands.values():
            sub.reset()
    return OK
