"""kvdb-check: is a data directory sound? Exit status 0 clean, 1 damage found, 2 wrong use.

Checks the tables of the index against each other and every record's header; `--deep` also reads every payload and
compares checksums, page and snapshot ids, prefix hashes and sections. Shares its code with STORE VERIFY. Reads only,
also while a daemon is running; `--repair` needs the daemon stopped.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import click
from rich.console import Console
from rich.progress import Progress

from kvdb.errors import CorruptError, KvdbError
from kvdb.store.change_log import LOG_NAME, ChangeLog
from kvdb.store.errors import as_kvdb_error
from kvdb.store.files import OsFiles
from kvdb.store.index import STAMP, Index
from kvdb.store.index_damage import damaged_rows
from kvdb.store.lock import Lock
from kvdb.store.logged import Logged, read_logged
from kvdb.store.repair import repair, take_logged
from kvdb.store.verify import Finding, verify


@dataclass(frozen=True, slots=True)
class Report:
    """What was found, what was done, and what is left after that."""

    findings: list[Finding]
    done: list[str]
    left: list[Finding]
    n_logged: int = 0  # records of the change log that go into the index at the next start


def check(folder: Path, *, deep: bool, mend: bool, show_progress: bool = False) -> Report:
    """Verify a data directory, and repair it if `mend`. Raises KvdbError if it is none, or if a daemon has it."""
    lock = Lock(folder / "LOCK") if mend and folder.is_dir() else None
    try:
        if mend:
            try:
                damaged_rows(folder / "index")
            except CorruptError as error:  # nothing in it can be trusted, so nothing is changed
                finding = Finding("index", str(error))
                return Report([finding], [], [finding])
        index = Index(folder / "index", read_only=not mend)
        try:
            logged, log_findings = _read_log(index, folder)
            if mend and logged.layers:
                try:
                    logged.make_durable(ChangeLog(folder, OsFiles(), index.id), folder / "segments", OsFiles())
                except OSError as error:
                    raise as_kvdb_error(error, f"sync of {LOG_NAME}") from error
                if take_logged(index, logged):
                    logged = Logged()
            findings = [*log_findings, *_verify(index, folder, deep, show_progress)]
            if not mend or not findings:
                return Report(findings, [], findings, len(logged.layers))
            done = repair(index, {finding.id for finding in findings if finding.id}, logged)
            if log_findings:
                done.insert(0, f"dropped {LOG_NAME} from the damaged record on")
            return Report(findings, done, _verify(index, folder, deep, show_progress))
        finally:
            index.close()
    finally:
        if lock is not None:
            lock.release()


def _verify(index: Index, folder: Path, deep: bool, show_progress: bool) -> list[Finding]:
    files, segments = OsFiles(), folder / "segments"
    if not show_progress:
        return list(verify(index, segments, files, deep=deep))
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("records", total=None)

        def report(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        return list(verify(index, segments, files, deep=deep, progress=report))


def _read_log(index: Index, folder: Path) -> tuple[Logged, list[Finding]]:
    """What the change log has and the index has not, and what is wrong with it."""
    files = OsFiles()
    change_log = ChangeLog(folder, files, index.id)
    while True:
        with index.read() as txn:
            stamp = txn.meta(STAMP)
            try:
                logged, problem = read_logged(change_log, txn, folder / "segments", files)
            except (CorruptError, OSError) as error:
                logged, problem = Logged(), str(error)
        with index.read() as txn:
            if txn.meta(STAMP) == stamp:  # else a daemon writes it anew by now
                return logged, [Finding("log", problem)] if problem else []


def _as_json(finding: Finding) -> dict[str, object]:
    keys = [{"db": db, "key": key.decode(errors="backslashreplace")} for db, key in finding.keys]
    return {"kind": finding.kind, "message": finding.message, "id": finding.id.hex(), "keys": keys}


def _print(report: Report, deep: bool) -> None:
    for finding in report.findings:
        click.echo(f"{finding.kind}: {finding.message}")
        for db, key in finding.keys:
            click.echo(f"    hurts key {key.decode(errors='backslashreplace')!r} of database {db}")
    for line in report.done:
        click.echo(f"repair: {line}")
    if report.n_logged:
        click.echo(f"{report.n_logged} records of {LOG_NAME} go into the index at the next start")
    if not report.findings:
        click.echo("clean" if deep else "clean (headers and index; --deep reads every payload)")
    elif report.done:
        for finding in report.left:
            click.echo(f"left: {finding.message}")
        click.echo("clean after repair" if not report.left else f"{len(report.left)} findings are left")
    else:
        click.echo(f"{len(report.findings)} findings; --repair drops what is damaged and keeps the rest")


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("directory", metavar="DIR", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--deep", is_flag=True, help="Read every payload; compare checksums, ids, prefix hashes and sections.")
@click.option("--repair", "mend", is_flag=True, help="Drop what is damaged and keep the rest. Daemon stopped.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def main(directory: Path, deep: bool, mend: bool, as_json: bool) -> None:
    """Check the kvdb data directory DIR.

    Exit status: 0 clean, 1 damage found (also when it was repaired), 2 wrong use.

    Example: kvdb-check ~/kvdb --deep
    """
    try:
        report = check(directory, deep=deep, mend=mend, show_progress=not as_json and sys.stderr.isatty())
    except KvdbError as error:
        raise click.UsageError(str(error)) from error
    if as_json:
        click.echo(
            json.dumps(
                {
                    "clean": not report.findings,
                    "logged": report.n_logged,
                    "findings": [_as_json(finding) for finding in report.findings],
                    "repaired": report.done,
                    "left": [_as_json(finding) for finding in report.left],
                }
            )
        )
    else:
        _print(report, deep)
    sys.exit(1 if report.findings else 0)
