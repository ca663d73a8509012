"""Listening sockets: TCP on every address, a unix socket, TLS; and what a socket is set to."""

from __future__ import annotations

import asyncio
import logging
import os
import random
import resource
import socket
import ssl
import stat
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from kvdb.config import Config
from kvdb.errors import KvdbError
from kvdb.net.client import Client

if TYPE_CHECKING:
    from kvdb.net.service import Server

_UNSENT_BYTES = 256 * 1024

log = logging.getLogger("kvdb")

_OWN_DESCRIPTORS = 128  # segments, index, journal, workers, listeners

_DENIED = (
    "DENIED kvdb is running in protected mode because protected mode is enabled and no password is set for the default "
    "user. In this mode connections are only accepted from the loopback interface. To connect from other machines "
    "set a password (requirepass, or ACL SETUSER default), or disable protected mode with 'CONFIG SET protected-mode "
    "no' from the same machine."
)


async def open_all(server: Server) -> list[asyncio.Server]:
    """Open every listener the configuration asks for. Raises OSError or KvdbError naming the address."""
    config = server.config
    opened: list[asyncio.Server] = []
    try:
        port = config.number("port")
        if port:
            opened += await _open_tcp(server, port, None)
        tls_port = config.number("tls-port")
        if tls_port:
            opened += await _open_tcp(server, tls_port, tls_context(config))
        path = config.text("unixsocket")
        if path:
            opened.append(await _open_unix(server, path))
        if not opened:
            raise KvdbError("nothing to listen on: set port, tls-port or unixsocket")
    except BaseException:
        for listener in opened:
            listener.close()
        raise
    return opened


async def _open_tcp(server: Server, port: int, tls: ssl.SSLContext | None) -> list[asyncio.Server]:
    opened: list[asyncio.Server] = []
    kind = "tls" if tls is not None else "tcp"
    for word in server.config.words("bind"):
        optional = word.startswith("-")
        address = word.removeprefix("-")
        address = {"*": "0.0.0.0", "::*": "::"}.get(address, address)
        try:
            listener = await server.loop.create_server(
                partial(Client, server, kind),
                address,
                port,
                backlog=server.config.number("tcp-backlog"),
                ssl=tls,
                reuse_address=True,
            )
        except OSError as error:
            if optional:
                log.info("cannot listen on %s: %s", address, error.strerror or error)
                continue
            for done in opened:
                done.close()
            raise KvdbError(f"cannot listen on {address} port {port}: {error.strerror or error}") from None
        opened.append(listener)
        server.addresses.append(f"{kind}://{f'[{address}]' if ':' in address else address}:{port}")
    if not opened:
        raise KvdbError(f"cannot listen on any address of bind with port {port}")
    return opened


async def _open_unix(server: Server, path: str) -> asyncio.Server:
    remove_unix_socket(server.config)
    try:
        listener = await server.loop.create_unix_server(
            partial(Client, server, "unix"), path, backlog=server.config.number("tcp-backlog")
        )
        if permissions := server.config.text("unixsocketperm"):
            Path(path).chmod(int(permissions, 8))
    except (OSError, ValueError) as error:
        raise KvdbError(f"cannot listen on unix socket {path}: {error}") from None
    server.addresses.append(f"unix://{path}")
    return listener


def remove_unix_socket(config: Config) -> None:
    """Remove the socket file, if it is one: an earlier run may have left it behind."""
    path = config.text("unixsocket")
    if path and os.path.lexists(path) and stat.S_ISSOCK(Path(path).lstat().st_mode):
        Path(path).unlink()


def tls_context(config: Config) -> ssl.SSLContext:
    """The server side's TLS settings; client certificates as `tls-auth-clients` says."""
    cert, key = config.text("tls-cert-file"), config.text("tls-key-file")
    if not cert or not key:
        raise KvdbError("TLS needs tls-cert-file and tls-key-file")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(cert, key, config.text("tls-key-file-pass") or None)
        ca_file, ca_dir = config.text("tls-ca-cert-file"), config.text("tls-ca-cert-dir")
        if ca_file or ca_dir:
            context.load_verify_locations(ca_file or None, ca_dir or None)
        elif config.text("tls-auth-clients") != "no":
            raise KvdbError("tls-auth-clients needs tls-ca-cert-file or tls-ca-cert-dir; or set it to no")
    except (OSError, ssl.SSLError) as error:
        raise KvdbError(f"cannot use the TLS files: {error}") from None
    modes = {"yes": ssl.CERT_REQUIRED, "optional": ssl.CERT_OPTIONAL, "no": ssl.CERT_NONE}
    context.verify_mode = modes[config.text("tls-auth-clients")]
    return context


def raise_file_limit(maxclients: int) -> None:
    """Allow a descriptor for each client; warn when the system does not."""
    wanted = maxclients + _OWN_DESCRIPTORS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    except (OSError, ValueError):
        allowed = soft
    if allowed < wanted:
        log.warning("only %d of %d clients fit: raise the limit of open files", allowed - _OWN_DESCRIPTORS, maxclients)


def tune(sock: socket.socket, keepalive_seconds: int, *, is_local: bool) -> None:
    """Set up an accepted TCP socket: no delay, keepalive probes, and a congestion control that does not throttle.

    is_local: whether its other end is on this machine.
    The default on some systems (bbr) holds loopback bulk traffic at a quarter of what reno reaches.
    """
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    # When a process of this machine ends, the kernel says so. Probes of thousands of its connections at once overflow
    # the loopback device's queue (1,000 packets), and after three that were lost a connection that is well is cut.
    if keepalive_seconds and not is_local:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if hasattr(socket, "TCP_KEEPIDLE"):
            # Not all at once either, if all came at once.
            idle = max(1, round(keepalive_seconds * random.uniform(0.5, 1)))
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, idle)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, max(1, idle // 3))
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
    if hasattr(socket, "TCP_NOTSENT_LOWAT"):
        # What a client does not read would fill megabytes of the kernel's memory for each such client, and filling them
        # takes the time of all others. This does not limit what is under way to a client that reads.
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, _UNSENT_BYTES)
    if hasattr(socket, "TCP_CONGESTION"):
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"reno")
        except OSError:
            log.debug("no reno congestion control here")


def is_local(client: Client) -> bool:
    """Whether the client's end of a TCP connection is on this machine."""
    host = _host(client.peer)
    return host.startswith("127.") or host == _host(client.local)


def _host(address: str) -> str:
    return address.rpartition(":")[0].strip("[]").removeprefix("::ffff:")


def protected_mode_refusal(server: Server, client: Client) -> str | None:
    """The error line for another machine's connection while there is no password; None if it may come in."""
    if client.listener == "unix" or not server.config.flag("protected-mode") or not server.acl.default.is_nopass:
        return None
    host = _host(client.peer)
    return None if host.startswith("127.") or host in ("::1", "") else _DENIED
