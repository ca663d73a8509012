"""docs/commands.md, made from the command table: `python -m kvdb.commands.reference [--check] FILE`."""

from __future__ import annotations

import sys
from pathlib import Path

from kvdb.commands import all_commands
from kvdb.commands.registry import Bound
from kvdb.commands.spec import Command
from kvdb.commands.table import TABLE

_GROUPS = {
    "state": ("States", "What kvdb is for: sessions are live timelines, snapshots are stored ones."),
    "engine": ("Engine", "The workers that run the models."),
    "store": ("Store", "What lies on disk."),
    "connection": ("Connection", ""),
    "generic": ("Keys", "These work on keys of every type, snapshots and sessions included."),
    "string": ("Strings", ""),
    "hash": ("Hashes", ""),
    "sorted-set": ("Sorted sets", ""),
    "transactions": ("Transactions", "Commands that wait for an engine or a disk cannot be queued."),
    "pubsub": ("Publish and subscribe", ""),
    "server": ("Server", ""),
}

_HEAD = """# Commands

Made from the command table (`kvdb/commands/rows`) by `python -m kvdb.commands.reference docs/commands.md`; a test fails
when this page is stale. Where Redis has a command of the same name, arity, flags, replies and errors are those of Redis
7; what differs is listed in `tests/kvdb/server/test_compat.py`. Any command may answer `ERR`; a command on a key of
another type answers `WRONGTYPE`. What is not listed answers Redis' own unknown-command error.

"""


def page(table: tuple[Command, ...] = TABLE) -> str:
    """The text of docs/commands.md."""
    known = {row.name for bound in all_commands().values() for row in _rows(bound)}
    parts = [_HEAD]
    for group, (title, intro) in _GROUPS.items():
        rows = [row for row in table if row.group == group and row.name in known and not row.name.endswith(" HELP")]
        parts.append(f"## {title}\n\n")
        if intro:
            parts.append(f"{intro}\n\n")
        parts += [_entry(row) for row in rows]
    return "".join(parts)


def _rows(bound: Bound) -> list[Command]:
    own = [bound.command] if bound.fn is not None else []
    return own + [sub.command for sub in bound.subcommands.values()]


def _entry(row: Command) -> str:
    facts = [row.complexity]
    if "write" in row.flag_set:
        facts.append("writes")
    facts.append(
        "since " + (f"kvdb {row.since}" if row.group in ("state", "engine", "store") else f"Redis {row.since}")
    )
    facts.append(" ".join(f"@{name}" for name in sorted(row.acl_categories)))
    errors = f" Errors: {', '.join(f'`{word}`' for word in row.errors.split())}." if row.errors else ""
    return f"### `{f'{row.name} {row.syntax}'.strip()}`\n\n{row.summary}.{errors}\n<sub>{' · '.join(facts)}</sub>\n\n"


def main() -> int:
    """Write the page, or with --check say whether it is up to date."""
    words = [word for word in sys.argv[1:] if word != "--check"]
    if len(words) != 1:
        sys.stderr.write("usage: python -m kvdb.commands.reference [--check] FILE\n")
        return 2
    path = Path(words[0])
    if "--check" not in sys.argv:
        path.write_text(page())
        return 0
    if path.exists() and path.read_text() == page():
        return 0
    sys.stderr.write(f"{path} is stale: run python -m kvdb.commands.reference {path}\n")
    return 1


if __name__ == "__main__":
    raise SystemExit(main())
