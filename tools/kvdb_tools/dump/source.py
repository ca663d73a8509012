"""What the subcommands share: opening a directory to read, errors and exit codes, printing bytes and tables."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import click
from rich.console import Console
from rich.table import Table as RichTable

from kvdb.errors import CorruptError, KvdbError
from kvdb.store.index import Index, Txn
from kvdb_protocol.errors import FormatError

F = TypeVar("F", bound=Callable[..., Any])
Json = dict[str, Any]

DIRECTORY = click.Path(exists=True, file_okay=False, path_type=Path)
FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


def json_option(function: F) -> F:
    """The --json option that every subcommand has."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON.")(function)


@contextmanager
def opened(folder: Path) -> Iterator[Txn]:
    """A read transaction on a directory's index; errors become exit codes."""
    with exit_codes():
        index = Index(folder / "index", read_only=True)
        try:
            with index.read() as txn:
                yield txn
        finally:
            index.close()


@contextmanager
def exit_codes() -> Iterator[None]:
    """Damage ends with status 1, wrong use with 2."""
    try:
        yield
    except (CorruptError, FormatError) as error:
        click.echo(f"damage: {error}", err=True)
        sys.exit(1)
    except KvdbError as error:
        raise click.UsageError(str(error)) from error


def text(data: bytes) -> str:
    """Bytes as text: UTF-8 where it is that, escapes where not."""
    return data.decode("utf-8", "backslashreplace")


def excerpt(data: bytes, n_bytes: int = 60) -> str:
    """The beginning of bytes on one line."""
    shown = text(data[:n_bytes]).encode("unicode_escape").decode()
    return shown if len(data) <= n_bytes else shown + f"... ({len(data)} bytes)"


def when(ms: int) -> str:
    """Unix ms as UTC."""
    return datetime.fromtimestamp(ms / 1000, UTC).strftime("%Y-%m-%d %H:%M:%S") if ms else "never"


def size(n_bytes: int) -> str:
    """Bytes for people."""
    value = float(n_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def print_json(value: object) -> None:
    """One JSON document."""
    click.echo(json.dumps(value, indent=1))


def print_facts(facts: Sequence[tuple[str, object]]) -> None:
    """Name and value a line."""
    width = max((len(name) for name, _ in facts), default=0)
    for name, value in facts:
        click.echo(f"{name:{width}}  {value}")


def print_table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A table; numbers right, not cut on a terminal that is too narrow or absent."""
    table = RichTable(box=None, pad_edge=False)
    for number, column in enumerate(columns):
        is_number = bool(rows) and all(isinstance(row[number], int) for row in rows)
        table.add_column(column, justify="right" if is_number else "left", no_wrap=True)
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    width = max(Console().width, 200) if not sys.stdout.isatty() else None
    Console(width=width, soft_wrap=True, markup=False, highlight=False).print(table)
