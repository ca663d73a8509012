"""What lies behind the commands: the store, the served models and their sessions, opened and closed together."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from kvdb.errors import KvdbError
from kvdb.keyspace import Keyspace
from kvdb.session import Model
from kvdb.sessions import Sessions
from kvdb.store.records import ModelRecord
from kvdb.store.store import Store
from kvdb.storing import Background, store_state
from kvdb_engine.catalog import open_model
from kvdb_engine.errors import ModelError

if TYPE_CHECKING:
    from kvdb.config import Config
    from kvdb.net.service import Server

log = logging.getLogger("kvdb")

_ROUND_S = 1.0


class Backend:
    """Opened by `Server.start`, closed by `Server.stop`."""

    store: Store
    keyspace: Keyspace
    sessions: Sessions
    models: dict[str, Model]
    background: Background

    def __init__(self) -> None:
        self._rounds_task: asyncio.Task[None] | None = None

    async def open(self, server: Server) -> None:
        """Open the data directory and the models; nothing is loaded into an engine yet."""
        config = server.config
        self.models = open_models(config)
        self.store = Store.open(Path(server.directory), loop=server.loop)
        try:
            for model in self.models.values():
                info = model.info
                await self.store.register_model(
                    ModelRecord(info.name, info.fingerprint, info.family, info.layout.to_bytes())
                )
        except BaseException:
            await self.store.close()
            raise
        self.keyspace = self.store.keyspace
        self.sessions = Sessions(self.store, self.models, store_state)
        self.background = Background()
        self._configure(config, frozenset())
        config.listeners.append(self._configure)
        self._rounds_task = server.loop.create_task(self._rounds(config))

    def _configure(self, config: Config, names: frozenset[str]) -> None:
        """Take over what CONFIG SET may change."""
        self.sessions.cross_quant = config.text("cross-quant") == "allow"
        self.sessions.cache_bytes = config.number("engine-cache-bytes")
        for model in self.models.values():
            model.client.queue_limit = config.number("engine-queue-limit")
        self.store.budget.configure(config.number("maxstore"), config.text("maxstore-policy"))

    async def _rounds(self, config: Config) -> None:
        """End engines that hang; put idle ones to rest and forget sessions that are gone, which may wait for one."""
        care: asyncio.Task[None] | None = None
        while True:
            await asyncio.sleep(_ROUND_S)
            self._end_hanging(config.number("engine-hang-timeout"))
            if care is None or care.done():
                care = asyncio.create_task(self._care(config.number("engine-idle-timeout")))

    async def _care(self, idle_timeout_s: int) -> None:
        try:
            await self.sessions.sweep()
            if idle_timeout_s:
                await self.sessions.reap_idle(idle_timeout_s)
        except KvdbError as error:
            log.warning("engine round: %s", error.wire)
        except Exception:
            log.exception("engine round failed")

    def _end_hanging(self, timeout_s: int) -> None:
        for model in self.models.values():
            if timeout_s and model.client.silent_for() > timeout_s:
                log.error("engine worker of %s said nothing for %d s: killed", model.info.name, timeout_s)
                model.client.kill()

    async def close(self) -> None:
        """Store live sessions (reason `shutdown`), make everything durable, close."""
        if self._rounds_task is not None:
            self._rounds_task.cancel()
        try:
            self.sessions.stop_work()
            await self.background.idle()
            await self.sessions.close()
        finally:
            await self.store.close()


def open_models(config: Config) -> dict[str, Model]:
    """The models that `model` names, in its order. Raises KvdbError naming the one that cannot be opened."""
    models: dict[str, Model] = {}
    for spec in config.words("model"):
        try:
            info = open_model(spec)
        except ModelError as error:
            raise KvdbError(f"model '{spec}': {error}") from error
        if info.name in models:
            raise KvdbError(f"two models are called '{info.name}': name one of them with --model NAME=PATH")
        models[info.name] = Model(info, spec)
    return models
