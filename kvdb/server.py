"""The daemon: `kvdb-server [FILE.conf] [--name value ...]`."""

from __future__ import annotations

import asyncio
import gc
import logging
import signal
import sys
from typing import TYPE_CHECKING

import uvloop

from kvdb import config
from kvdb.backend import Backend
from kvdb.errors import KvdbError
from kvdb.malloc import keep_freed_memory
from kvdb.net.service import Server

if TYPE_CHECKING:
    from kvdb.http.gateway import Gateway

log = logging.getLogger("kvdb")

USAGE = """Usage: kvdb-server [FILE.conf] [--name value ...]

A database for the live states of language models. Speaks RESP2 and RESP3: any Redis client works.

Examples:
  kvdb-server                                        data in the current folder, port 6374
  kvdb-server --dir ~/kvdb --port 7000
  kvdb-server /etc/kvdb.conf --loglevel debug        options win over the file
  kvdb-server --dir data --port 0 --unixsocket /tmp/kvdb.sock
  kvdb-server --model dsv4-nano --model big=/models/dsv4-flash --maxstore 200gb
  redis-cli -p 6374 ping

Every configuration name is an option, and CONFIG GET shows it (a * can be changed by CONFIG SET):

"""


def usage() -> str:
    """The text of --help."""
    lines = []
    for parameter in config.PARAMETERS.values():
        default = parameter.show(parameter.default) or "empty"
        star = "*" if parameter.live else " "
        lines.append(f" {star} --{parameter.name:<28} {parameter.help} ({default})")
    return USAGE + "\n".join(lines) + "\n"


def main() -> None:
    """Entry point of kvdb-server."""
    arguments = sys.argv[1:]
    if {"-h", "--help"} & set(arguments):
        sys.stdout.write(usage())
        return
    if {"-v", "--version"} & set(arguments):
        from kvdb import __version__

        sys.stdout.write(f"kvdb server v={__version__}\n")
        return
    try:
        settings = config.from_command_line(arguments)
    except (KvdbError, OSError) as error:
        sys.stderr.write(f"kvdb-server: {error}\n")
        raise SystemExit(2) from None
    set_up_log(settings)
    try:
        code = uvloop.run(serve(settings))
    except (KvdbError, OSError) as error:
        log.error("cannot start: %s", error)
        raise SystemExit(1) from None
    raise SystemExit(code)


def set_up_log(settings: config.Config) -> None:
    """Send the log where `logfile` says, from `loglevel` up."""
    levels = {"debug": 10, "verbose": 15, "notice": 20, "warning": 30, "nothing": 100}
    logging.addLevelName(15, "VERBOSE")
    logging.addLevelName(20, "NOTICE")
    logfile = settings.text("logfile")
    logging.basicConfig(
        level=levels[settings.text("loglevel")],
        handlers=[logging.FileHandler(logfile) if logfile else logging.StreamHandler(sys.stdout)],
        format="%(process)d %(asctime)s %(levelname)s %(name)s: %(message)s",
        force=True,
    )

    def apply(changed: config.Config, names: frozenset[str]) -> None:
        if "loglevel" in names:
            logging.getLogger().setLevel(levels[changed.text("loglevel")])

    settings.listeners.append(apply)


# The event loop waits for the commit thread at most so long. With Python's 5 ms the slowest replies wait 5 ms more.
_SWITCH_SECONDS = 0.0005


async def serve(settings: config.Config) -> int:
    """Run a server until it is told to end; returns the exit status."""
    sys.setswitchinterval(_SWITCH_SECONDS)
    keep_freed_memory()
    server = Server(settings, Backend())
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, server.request_shutdown)
    await server.start()
    # What is there now stays: the collector need not walk over it again and again, which takes tens of milliseconds.
    gc.freeze()
    gateway = None
    code = 0
    try:
        if settings.number("http-port") or settings.number("http-tls-port"):
            gateway = await start_gateway(server)
        await server.ended.wait()
    finally:
        if gateway is not None:
            await gateway.stop()
        try:
            await server.stop()
        except KvdbError as error:
            log.error("the last writes could not be made durable: %s", error.wire)
            code = 1
    return code


async def start_gateway(server: Server) -> Gateway:
    """Serve HTTP too. Raises KvdbError where its packages are missing or the port cannot be had."""
    try:
        from kvdb.http.gateway import Gateway  # an extra, and an import that nobody else needs to wait for
    except ImportError as error:
        raise KvdbError(f"http-port needs the http extra: pip install 'kvdb[http]' ({error})") from None
    gateway = Gateway(server)
    await gateway.start()
    return gateway


if __name__ == "__main__":
    main()
