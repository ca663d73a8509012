"""The command table: every command kvdb knows.

It feeds dispatch, arity checks, COMMAND, COMMAND DOCS, ACL categories and docs/commands.md. Facts that clients rely on
(arity, flags, key positions, categories) are those of Redis 7 where Redis has the command.
"""

from __future__ import annotations

from kvdb.commands.rows import connection, hashes, keys, pubsub, server, sorted_sets, state, strings, transactions
from kvdb.commands.spec import Command

TABLE: tuple[Command, ...] = (
    *connection.ROWS,
    *keys.ROWS,
    *strings.ROWS,
    *hashes.ROWS,
    *sorted_sets.ROWS,
    *transactions.ROWS,
    *pubsub.ROWS,
    *server.ROWS,
    *state.ROWS,
)
