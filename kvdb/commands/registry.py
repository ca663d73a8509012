"""Joins the command table with the functions that run the commands.

A handler is `fn(client, args) -> reply`; `args` are the arguments behind the command's name (and its subcommand's). It
returns a reply value at once, or a coroutine that yields one: then the connection runs it as a task and starts no
further command of this client until it is done, so replies stay in order; the task is cancelled when the client goes.
Errors are raised (`kvdb.errors`). Invariant: every handler has a row in the table; a row without one is an unknown
command (a test checks that there is none).
"""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Iterable
from typing import TYPE_CHECKING

from kvdb.commands.spec import Command
from kvdb_protocol.replies import Reply
from kvdb_protocol.requests import Request

if TYPE_CHECKING:
    from kvdb.net.client import Client

Handler = Callable[["Client", list[bytes]], "Reply | Awaitable[Reply]"]

# Answers the first requests of a pipeline that all name its command; see `batch_handler`.
BatchHandler = Callable[["Client", list[Request]], tuple[int, bytes]]

_handlers: dict[str, Handler] = {}
_batch_handlers: dict[str, BatchHandler] = {}


def handler(*names: str) -> Callable[[Handler], Handler]:
    """Register a function as the handler of these commands (`GET`, `CONFIG GET`)."""

    def register(fn: Handler) -> Handler:
        for name in names:
            if name in _handlers:
                raise ValueError(f"{name} has two handlers")
            _handlers[name] = fn
        return fn

    return register


def batch_handler(name: str) -> Callable[[BatchHandler], BatchHandler]:
    """Register a second handler of a command that clients pipeline by the thousand.

    It gets what waits from such a request on, and returns how many of these it has answered from memory, maybe none,
    and the encoded replies to them: it stops at the first request that is another command or needs the handler itself.
    """

    def register(fn: BatchHandler) -> BatchHandler:
        _batch_handlers[name] = fn
        return fn

    return register


class Bound:
    """A command ready to run: its row, its handler, and its counters (the only mutable part)."""

    __slots__ = (
        "batch_fn",
        "calls",
        "command",
        "failed_calls",
        "fn",
        "is_write",
        "lengths",
        "max_args",
        "min_args",
        "n_names",
        "rejected_calls",
        "seconds",
        "subcommands",
        "waits",
    )

    def __init__(self, command: Command, fn: Handler | None) -> None:
        self.command = command
        self.fn = fn
        self.batch_fn = _batch_handlers.get(command.name)
        self.n_names = 1 + command.name.count(" ")
        self.min_args = abs(command.arity)
        self.max_args = command.arity if command.arity > 0 else 1 << 31
        # Lengths of requests, name included, that this entry takes; none if only its subcommands can be run.
        self.lengths = range(self.min_args, self.max_args + 1) if fn is not None else range(0)
        self.is_write = "write" in command.flag_set or command.name == "EXEC"
        self.waits = inspect.iscoroutinefunction(fn)
        self.subcommands: dict[bytes, Bound] = {}
        self.reset()

    def reset(self) -> None:
        """Set the counters to zero."""
        self.calls = 0
        self.seconds = 0.0
        self.rejected_calls = 0
        self.failed_calls = 0


def build(table: Iterable[Command]) -> dict[bytes, Bound]:
    """Bind the table to the registered handlers. Keys are upper-case names; subcommands hang under their container."""
    bound: dict[bytes, Bound] = {}
    used: set[str] = set()
    for command in table:
        fn = _handlers.get(command.name)
        used.add(command.name)
        if fn is None and not command.is_container:
            continue
        entry = Bound(command, fn)
        container, _, sub = command.name.partition(" ")
        if sub:
            parent = bound[container.encode()]
            parent.subcommands[sub.encode()] = entry
            parent.max_args = 1  # with any argument it is the subcommand's turn
            parent.lengths = range(parent.lengths.start, 2) if parent.lengths else parent.lengths
        else:
            bound[container.encode()] = entry
    extra = set(_handlers) - used
    if extra:
        raise ValueError(f"handlers without a row in the table: {sorted(extra)}")
    return bound
