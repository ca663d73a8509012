"""Rows of the command table: transactions commands."""

from kvdb.commands.spec import Command

ROWS = (
    Command(
        "MULTI",
        "transactions",
        1,
        flags="noscript loading stale fast allow_busy",
        categories="transaction",
        summary="Starts a transaction",
        since="1.2.0",
    ),
    Command(
        "EXEC",
        "transactions",
        1,
        flags="noscript loading stale skip_slowlog",
        categories="transaction",
        summary="Runs the queued commands as one transaction",
        complexity="O(N)",
        since="1.2.0",
    ),
    Command(
        "DISCARD",
        "transactions",
        1,
        flags="noscript loading stale fast allow_busy",
        categories="transaction",
        summary="Drops the queued commands",
        complexity="O(N),",
        since="2.0.0",
    ),
    Command(
        "WATCH",
        "transactions",
        -2,
        flags="noscript loading stale fast allow_busy",
        keys=(1, -1, 1),
        categories="transaction",
        syntax="key [key ...]",
        summary="EXEC runs only if these keys stay unchanged",
        complexity="O(1) for every key",
        since="2.2.0",
    ),
    Command(
        "UNWATCH",
        "transactions",
        1,
        flags="noscript loading stale fast allow_busy",
        categories="transaction",
        summary="Forgets the watched keys",
        since="2.2.0",
    ),
)
