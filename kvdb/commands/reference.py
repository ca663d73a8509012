"""docs/commands.md and docs/kvdb.conf, made from the tables: `python -m kvdb.commands.reference [--check] FILE ...`."""

from __future__ import annotations

from pathlib import Path

import click

from kvdb.commands import all_commands
from kvdb.commands.registry import Bound
from kvdb.commands.spec import Command
from kvdb.commands.table import TABLE
from kvdb.config import PARAMETERS

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


_CONF_HEAD = """# Configuration of kvdb-server: kvdb-server FILE.conf [--name value ...]
#
# One "name value" a line, as in redis.conf; sizes take kb, mb, gb. Every name is here with its default, commented out.
# Names marked * can be changed while the server runs, with CONFIG SET; CONFIG REWRITE writes the changes into the file.
# Made from the table in kvdb/config.py by python -m kvdb.commands.reference docs/kvdb.conf.
"""


def example_config() -> str:
    """The text of docs/kvdb.conf."""
    parts = [_CONF_HEAD]
    for parameter in PARAMETERS.values():
        choices = f": {', '.join(parameter.choices)}" if parameter.choices else ""
        star = "* " if parameter.live else ""
        shown = parameter.show(parameter.default)
        value = shown or '""'
        parts.append(f"\n# {star}{parameter.help}{choices}\n# {parameter.name} {value}\n")
    return "".join(parts)


@click.command()
@click.option("--check", is_flag=True, help="Write nothing; exit 1 if a file is stale.")
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path, dir_okay=False))
def main(check: bool, files: tuple[Path, ...]) -> None:
    """Write FILES: the example configuration where a name ends in .conf, else the page of commands.

    \b
    Example:
        python -m kvdb.commands.reference docs/commands.md docs/kvdb.conf
    """
    stale = False
    for path in files:
        text = example_config() if path.suffix == ".conf" else page()
        if not check:
            path.write_text(text)
        elif not path.exists() or path.read_text() != text:
            click.echo(f"{path} is stale: run python -m kvdb.commands.reference {path}", err=True)
            stale = True
    raise SystemExit(stale)


if __name__ == "__main__":
    main()
