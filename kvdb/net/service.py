"""The server object: configuration, store, clients, listeners and the background rounds.

Handlers reach everything through it: `client.server`. All of it belongs to the event loop's thread.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import socket
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from kvdb import acl_file
from kvdb.acl import Acl
from kvdb.commands import all_commands
from kvdb.config import Config
from kvdb.errors import KvdbError
from kvdb.net import listeners
from kvdb.net.observers import Observers
from kvdb.net.pubsub import PubSub
from kvdb.net.send_buffers import SendBuffers
from kvdb.net.statistics import Statistics
from kvdb_protocol.requests import Request

if TYPE_CHECKING:
    from kvdb.commands.registry import Bound
    from kvdb.keyspace import Keyspace
    from kvdb.net.client import Client
    from kvdb.session import Model
    from kvdb.sessions import Sessions
    from kvdb.store.store import Store
    from kvdb.storing import Background

log = logging.getLogger("kvdb")

_EXPIRE_BATCH = 1000
_EXPIRE_SECONDS = 0.01  # of a round of 0.1 s
_LAZY_FLUSH_SECONDS = 5  # `appendfsync no`: memory is given back by committing
_STOP_SECONDS = 5.0  # how long clients may take to read their last replies at shutdown


class Backend(Protocol):
    """What lies behind the commands. Opened by `Server.start`, closed by `Server.stop`."""

    store: Store
    keyspace: Keyspace
    sessions: Sessions
    models: dict[str, Model]
    background: Background

    async def open(self, server: Server) -> None:
        """Open the data directory and set the four attributes."""

    async def close(self) -> None:
        """Store live sessions (reason `shutdown`), make everything durable, close."""


class Server:
    """Everything a running daemon has. `start` opens the backend and listens; `stop` undoes that."""

    store: Store
    keyspace: Keyspace
    sessions: Sessions
    models: dict[str, Model]
    background: Background  # snapshots that are being stored for SNAPSHOT ... ASYNC

    def __init__(self, config: Config, backend: Backend) -> None:
        self.config = config
        self.backend = backend
        self.loop = asyncio.get_running_loop()
        self.now = time.time()
        self.started = self.now
        self.run_id = secrets.token_hex(20)
        self.directory = Path(config.text("dir")).expanduser().absolute()
        self.commands = all_commands()
        self.acl = Acl()
        self.pubsub = PubSub()
        self.send_buffers = SendBuffers()
        self.statistics = Statistics()
        self.observers = Observers(self.pubsub)
        self.clients: dict[int, Client] = {}
        self.ended = asyncio.Event()
        self.last_save = self.now
        self.addresses: list[str] = []
        self.gated = False  # while someone watches or holds all commands, no request takes the fast path
        self.refusal: KvdbError | None = None  # why commands that add data are refused at present
        self.paused_until = 0.0
        self.pauses_writes_only = True
        self._next_client_id = 1
        self._unsent: list[Client] = []  # may hold a client twice
        self._background: set[asyncio.Task[None]] = set()
        self._listeners: list[asyncio.Server] = []
        self._rounds_task: asyncio.Task[None] | None = None
        self._apply(config, frozenset())
        config.listeners.append(self._apply)

    def _apply(self, config: Config, names: frozenset[str]) -> None:
        """Copy what is needed often out of the configuration; called again after CONFIG SET."""
        self.durable_writes = config.text("appendfsync") == "always"
        self.max_query_bytes = config.number("client-query-buffer-limit")
        slower_us = config.number("slowlog-log-slower-than")
        self.slow_log_seconds = slower_us / 1e6 if slower_us >= 0 else float("inf")
        threshold_ms = config.number("latency-monitor-threshold")
        self.latency_seconds = threshold_ms / 1000 if threshold_ms else float("inf")
        self.slow_seconds = min(self.slow_log_seconds, self.latency_seconds)
        self.observers.configure(config)
        if "requirepass" in names or (not names and config.text("requirepass")):
            self.acl.set_default_password(config.text("requirepass"))
        for client in self.clients.values():
            client.parser.max_bulk_bytes = config.number("proto-max-bulk-len")

    # life ------------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Open the data directory, listen, and begin the background rounds."""
        self.directory.mkdir(parents=True, exist_ok=True)
        if self.config.text("aclfile"):
            self.acl.replace_all(acl_file.load(Path(self.config.text("aclfile")).expanduser()))
        await self.backend.open(self)
        backend = self.backend
        self.store, self.keyspace = backend.store, backend.keyspace
        self.sessions, self.models, self.background = backend.sessions, backend.models, backend.background
        self.store.budget.on_evicted = self._evicted
        self.keyspace.on_expired = self._expired
        listeners.raise_file_limit(self.config.number("maxclients"))
        try:
            self._listeners = await listeners.open_all(self)
        except BaseException:
            await backend.close()
            raise
        self._rounds_task = self.loop.create_task(self._rounds())
        log.info("%s is served on %s", self.directory, ", ".join(self.addresses))
        log.info("Ready to accept connections")

    def request_shutdown(self) -> None:
        """SIGTERM, SIGINT, SHUTDOWN: end in an orderly way."""
        log.info("shutting down")
        self.ended.set()

    async def stop(self) -> None:
        """Stop listening, make everything durable, send what is ready, close."""
        for listener in self._listeners:
            listener.close()
        if self._rounds_task is not None:
            self._rounds_task.cancel()
        for client in list(self.clients.values()):
            if client.task is None:
                client.close()
        try:
            await self.backend.close()
        finally:
            for client in list(self.clients.values()):
                client.close()
            until = self.loop.time() + _STOP_SECONDS
            while self.clients and self.loop.time() < until:
                await asyncio.sleep(0.01)
            for client in list(self.clients.values()):
                client.abort()
            listeners.remove_unix_socket(self.config)
        log.info("bye")

    async def _rounds(self) -> None:
        """Everything that happens by the clock."""
        while True:
            hz = self.config.number("hz")
            await asyncio.sleep(1 / hz)
            before, self.now = self.now, time.time()
            try:
                self._expire()
                self.statistics.sample(self)
                self._check_space()
                if int(self.now) != int(before):
                    every = _LAZY_FLUSH_SECONDS if self.config.text("appendfsync") == "no" else 1
                    if int(self.now) % every == 0:
                        self.keyspace.flush_soon()
                    self._close_idle()
            except KvdbError as error:
                log.warning("background round: %s", error.wire)
            except Exception:
                log.exception("background round failed")

    def _expire(self) -> None:
        """Delete keys whose time has come, for some milliseconds at most: the rest waits for the next round."""
        until = time.perf_counter() + _EXPIRE_SECONDS
        while True:
            expired = self.keyspace.expire_cycle(int(self.now * 1000), _EXPIRE_BATCH)
            if len(expired) < _EXPIRE_BATCH or time.perf_counter() > until:
                return

    def _check_space(self) -> None:
        """Refuse commands that add data while commits fail or the store is over `maxstore`; reads and DEL go on.

        Looked at in every round: the limit may be passed by what is written in between.
        """
        before, self.refusal = self.refusal, None
        if (error := self.store.write_error) is not None:
            # Not the same words as the writes of the failed round get: those are kept, and tried again.
            self.refusal = type(error)(f"{error} (this command was not run)")
        else:
            try:
                self.store.budget.check()
            except KvdbError as error:
                self.refusal = error
        if (before is None) != (self.refusal is None):
            if self.refusal is not None:
                log.warning("writes are refused: %s", self.refusal.wire)
            else:
                log.info("writes are accepted again")
            self.update_gate()

    def _expired(self, db: int, key: bytes) -> None:
        self.changed(db, key, "expired", "x")
        self.statistics.expired_keys += 1

    def _evicted(self, db: int, key: bytes) -> None:
        self.changed(db, key, "evicted", "e")

    def _close_idle(self) -> None:
        timeout = self.config.number("timeout")
        for client in list(self.clients.values()):
            idle = self.now - client.last_used
            if timeout and idle > timeout and not client.is_blocked and not client.is_subscriber:
                client.close()
            else:
                self.check_output(client)

    # clients ---------------------------------------------------------------------------------------------------

    def accept(self, client: Client, sock: socket.socket | None) -> str | None:
        """Register a new connection; the error line if it is refused."""
        self.statistics.connections_received += 1
        if len(self.clients) >= self.config.number("maxclients"):
            self.statistics.connections_rejected += 1
            return "ERR max number of clients reached"
        if refusal := listeners.protected_mode_refusal(self, client):
            self.statistics.connections_rejected += 1
            return refusal
        client.id = self._next_client_id
        self._next_client_id += 1
        client.created = client.last_used = time.time()
        client.parser.max_bulk_bytes = self.config.number("proto-max-bulk-len")
        self.clients[client.id] = client
        if sock is not None and client.listener != "unix":
            listeners.tune(sock, self.config.number("tcp-keepalive"), is_local=listeners.is_local(client))
        return None

    def send_soon(self, client: Client) -> None:
        """Send what a client's commands have answered, once all requests that have arrived by now are run.

        As Redis does: what is written at once wakes its reader at once, and a reader that runs between two writes has
        to be woken by both. Waking a process that sleeps is most of what a small command costs.
        """
        if not self._unsent:
            self.loop.call_soon(self._send_unsent)
        self._unsent.append(client)

    def _send_unsent(self) -> None:
        unsent, self._unsent = self._unsent, []
        for client in unsent:
            try:
                client.flush()
            except Exception:
                log.exception("client %d (%s) closed: its replies could not be sent", client.id, client.peer)
                client.abort()

    def refresh_users(self) -> None:
        """Users have changed: connections of users that are gone are closed, the others see their new rights."""
        for client in list(self.clients.values()):
            user = self.acl.users.get(client.user.name)
            if user is None:
                client.close_after_reply()
                continue
            client.user = user
            client.update_gate()

    def forget(self, client: Client) -> None:
        """A connection is gone."""
        if self.clients.pop(client.id, None) is not None:
            self.statistics.input_bytes += client.input_bytes
            self.statistics.output_bytes += client.output_bytes
            self.pubsub.forget(client)
            self.observers.forget(client)
            self.update_gate()

    def check_output(self, client: Client) -> None:
        """Close a client whose waiting output is over the limit of its class."""
        limits = self.config.words("client-output-buffer-limit")
        name = "replica" if client.is_monitor else "pubsub" if client.is_subscriber else "normal"
        at = limits.index(name)
        hard, soft, seconds = (int(word) for word in limits[at + 1 : at + 4])
        waiting = client.output_buffer_bytes
        if soft and waiting > soft:
            client.over_soft_since = client.over_soft_since or self.now
            too_long = self.now - client.over_soft_since > seconds
        else:
            client.over_soft_since = 0.0
            too_long = False
        if too_long or (hard and waiting > hard):
            self.statistics.output_limit_disconnections += 1
            log.warning("client %d (%s) closed: %d bytes wait for it", client.id, client.peer, waiting)
            client.abort()

    def update_gate(self) -> None:
        """Call after MONITOR, CLIENT PAUSE or a refusal of writes begins or ends."""
        self.gated = self.observers.is_watching or self.paused_until > time.time() or self.refusal is not None

    def pause(self, seconds: float, *, writes_only: bool) -> None:
        """CLIENT PAUSE: hold the commands of all clients."""
        until = time.time() + seconds
        if until > self.paused_until or self.pauses_writes_only != writes_only:
            self.paused_until = max(until, self.paused_until)
            self.pauses_writes_only = writes_only and self.pauses_writes_only
        self.update_gate()
        self.loop.call_later(max(self.paused_until - time.time(), 0) + 0.001, self._end_pause)

    def unpause(self) -> None:
        """CLIENT UNPAUSE."""
        self.paused_until = 0.0
        self._end_pause()

    def _end_pause(self) -> None:
        if self.paused_until <= time.time():
            self.pauses_writes_only = True
            self.update_gate()
            for client in list(self.clients.values()):
                client.go_on()

    def holds(self, bound: Bound) -> bool:
        """Whether CLIENT PAUSE holds this command now."""
        if self.paused_until <= time.time() or bound.command.name.startswith("CLIENT "):
            return False
        return not self.pauses_writes_only or bound.is_write

    def run_in_background(self, work: Coroutine[object, object, None]) -> None:
        """Run a coroutine that belongs to no client; what it raises is logged."""
        task = self.loop.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background_done)

    def _background_done(self, task: asyncio.Task[None]) -> None:
        self._background.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("background work failed: %s", error, exc_info=error)

    # counters and observers ------------------------------------------------------------------------------------

    def count_error(self, word: str) -> None:
        """An error reply was made."""
        self.statistics.errors[word] = self.statistics.errors.get(word, 0) + 1

    def note_slow(self, client: Client, request: Request, seconds: float) -> None:
        """A command took longer than `slowlog-log-slower-than` or `latency-monitor-threshold`."""
        if seconds >= self.slow_log_seconds:
            self.observers.slow_log.add(client, request, seconds, self.now)
        if seconds >= self.latency_seconds:
            self.observers.note_latency("command", self.now, seconds)

    def observe(self, client: Client, bound: Bound, request: Request) -> None:
        """Show a command to MONITOR."""
        if self.gated:
            self.observers.show(client, bound, request)

    def changed(self, db: int, key: bytes, event: str, letter: str) -> None:
        """A key changed: break transactions that watch it, publish the keyspace event.

        event: its name (`set`, `del`, `expire` ...). letter: its class in notify-keyspace-events (`$`, `g`, `h`, `z`,
        `x`, `e`).
        """
        self.observers.changed(db, key, event, letter)
