"""LATENCY and DEBUG."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from kvdb.commands.describe import wire_name
from kvdb.commands.parse import parse_float
from kvdb.commands.registry import Bound, handler
from kvdb.errors import KvdbError
from kvdb_protocol.replies import OK, Reply, Verbatim

if TYPE_CHECKING:
    from kvdb.net.client import Client


@handler("LATENCY LATEST")
def latest(client: Client, args: list[bytes]) -> Reply:
    """Event, time of the latest sample, its ms, the largest ms."""
    samples = client.server.observers.latency
    return [[name, rows[-1][0], rows[-1][1], max(ms for _, ms in rows)] for name, rows in samples.items() if rows]


@handler("LATENCY HISTORY")
def history(client: Client, args: list[bytes]) -> Reply:
    """(Time, ms) of each sample."""
    rows = client.server.observers.latency.get(args[0].decode("utf-8", "replace"), ())
    return [[moment, took_ms] for moment, took_ms in rows]


@handler("LATENCY RESET")
def reset(client: Client, args: list[bytes]) -> Reply:
    """How many events were forgotten."""
    samples = client.server.observers.latency
    names = [arg.decode("utf-8", "replace") for arg in args] or list(samples)
    return sum([samples.pop(name, None) is not None for name in names])


@handler("LATENCY DOCTOR")
def doctor(client: Client, args: list[bytes]) -> Reply:
    """A report for people."""
    if not client.server.config.number("latency-monitor-threshold"):
        return Verbatim(
            "Latency monitoring is off: switch it on with CONFIG SET latency-monitor-threshold <milliseconds>."
        )
    samples = client.server.observers.latency
    if not samples:
        return Verbatim("No latency was seen that is over the threshold.")
    lines = [f"{name}: {len(rows)} samples, worst {max(ms for _, ms in rows)} ms" for name, rows in samples.items()]
    return Verbatim("\n".join(lines) + "\n")


@handler("LATENCY HISTOGRAM")
def histogram(client: Client, args: list[bytes]) -> Reply:
    """Calls of each command, and how many took at most so many microseconds."""
    commands = client.server.commands
    if args:
        chosen = [commands[name.upper()] for name in args if name.upper() in commands]
    else:
        chosen = [bound for name, bound in commands.items() if name.isupper()]
    every = [bound for top in chosen for bound in (top, *top.subcommands.values())]
    return {wire_name(bound.command): _histogram(bound) for bound in every if bound.calls}


def _histogram(bound: Bound) -> Reply:
    """Only the mean is kept for each command, so the distribution has one step."""
    mean_us = bound.seconds * 1e6 / bound.calls
    step = 1
    while step < mean_us:
        step *= 2
    return {"calls": bound.calls, "histogram_usec": {str(step): bound.calls}}


@handler("DEBUG")
def debug(client: Client, args: list[bytes]) -> Reply:
    """DEBUG SLEEP seconds holds this connection; SET-ACTIVE-EXPIRE and the like are not there."""
    allowed = client.server.config.text("enable-debug-command")
    is_local = client.listener == "unix" or client.peer.startswith(("127.", "[::1]"))
    if allowed == "no" or (allowed == "local" and not is_local):
        raise KvdbError(
            'DEBUG command not allowed. If the enable-debug-command option is set to "local", you can run it from a '
            "local connection, otherwise you need to set this option in the configuration file, and then restart "
            "the server."
        )
    if args[0].upper() == b"SLEEP" and len(args) == 2:
        seconds = parse_float(args[1])

        async def sleep() -> Reply:
            await asyncio.sleep(seconds)
            return OK

        return sleep()  # type: ignore[return-value]
    raise KvdbError(
        f"unknown subcommand or wrong number of arguments for '{args[0].decode('utf-8', 'replace')}'. Try DEBUG HELP."
    )
