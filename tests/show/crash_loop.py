"""SIGKILL at random moments under a mixed load: nothing acknowledged is lost, nothing wrong is served.

Several clients snapshot (also ASYNC), fork, restore, rewind, delete, expire, copy, rename, set strings and hashes and
run transactions, under `appendfsync always` and a `maxstore` small enough that snapshots are evicted; one more client
compacts, collects, backs up, verifies, exports and imports. The daemon is killed at a random moment, one time in ten
while it is starting. kvdb-check --deep looks at the directory and at the backup; the daemon starts again; every key
must hold what was acknowledged last (truth.py says what that means), nothing else may be there, and a snapshot of each
client is restored and continued.

    python tests/show/crash_loop.py [--quick] [--kills N] [--seed N] [--jobs N] [--model M]
"""

from __future__ import annotations

import random
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import click
from crash.clients import Carer, Client, Counts, digest
from rich.console import Console
from rich.table import Table

from kvdb_tools.check import check
from kvdb_tools.cli.connection import Connection
from kvdb_tools.daemon import Caller, CommandError, Daemon, DaemonError

N_CLIENTS = 3
DOCUMENT_TOKENS = 700
REPORT_EVERY = 25


@dataclass
class Job:
    """One daemon that is killed again and again."""

    number: int
    seed: int
    directory: Path
    options: dict[str, str]
    counts: Counts = field(default_factory=Counts)
    kills: int = 0
    checks: int = 0
    backups: int = 0
    restored: int = 0
    restart_s: list[float] = field(default_factory=list)

    def run(self, kills: int, console: Console) -> None:
        rng = random.Random(f"{self.seed} {self.number}")
        documents = [[rng.randrange(1, 1000) for _ in range(DOCUMENT_TOKENS)] for _ in range(3)]
        clients: list[Client] = [
            Client(b"c%d" % n, random.Random(f"{self.seed} {self.number} {n}"), documents) for n in range(N_CLIENTS)
        ]
        clients.append(Carer(b"care", random.Random(f"{self.seed} {self.number} care"), documents))
        with Daemon(self.directory, self.options) as daemon:
            while self.kills < kills and len(self.counts.problems) < 20:
                self.load_and_kill(daemon, clients, rng)
                self.check(daemon.directory)
                if rng.random() < 0.1:
                    self.kill_while_starting(daemon, rng)
                    self.check(daemon.directory)
                self.restart_s.append(daemon.start())
                self.look(daemon, clients, rng)
                if self.kills % REPORT_EVERY < 2 and self.kills > 1:
                    acknowledged = sum(client.truth.acknowledged for client in clients)
                    console.print(f"job {self.number}: {self.kills} kills, {acknowledged} commands acknowledged")

    def load_and_kill(self, daemon: Daemon, clients: list[Client], rng: random.Random) -> None:
        stop = threading.Event()
        threads = [threading.Thread(target=self.serve, args=(daemon, client, stop)) for client in clients]
        wanted = sum(client.truth.acknowledged for client in clients) + rng.choice((0, 1, 10, 40, 80))
        for thread in threads:
            thread.start()
        deadline = time.time() + 20
        while sum(client.truth.acknowledged for client in clients) < wanted and time.time() < deadline:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.1))
        if not daemon.is_running:
            self.counts.problems.append(f"the daemon ended by itself:\n{daemon.log_tail()}")
        daemon.kill()
        self.kills += 1
        stop.set()
        for thread in threads:
            thread.join()

    def serve(self, daemon: Daemon, client: Client, stop: threading.Event) -> None:
        try:
            with Connection(daemon.target, timeout=60) as connection:
                client.work(Caller(connection), self.counts, stop)
        except ConnectionError:
            pass

    def kill_while_starting(self, daemon: Daemon, rng: random.Random) -> None:
        timer = threading.Timer(rng.uniform(0.2, 0.6), daemon.kill)
        timer.start()
        try:
            daemon.start()
        except (DaemonError, AssertionError):
            pass
        timer.join()
        daemon.kill()
        self.kills += 1

    def check(self, directory: Path) -> None:
        self.checks += 1
        self.look_into(directory, "kvdb-check")
        backup = directory / "transfer" / "backup"
        if (backup / "index" / "data.mdb").exists():
            self.backups += 1
            self.look_into(backup, "kvdb-check of the backup")

    def look_into(self, directory: Path, what: str) -> None:
        findings = check(directory, deep=True, mend=False).findings
        self.counts.problems += [f"{what}: {finding.message}" for finding in findings]

    def look(self, daemon: Daemon, clients: list[Client], rng: random.Random) -> None:
        with Connection(daemon.target, timeout=60) as connection:
            call = Caller(connection)
            for client in clients:
                found = client.look(call)
                self.counts.checked += len(found)
                problems = client.truth.compare(found)
                self.counts.problems += [f"kill {self.kills}: {problem}" for problem in problems]
                source = client.lasting("snapshot")
                if source is None:
                    continue
                try:
                    call("RESTORE", source, "probe", "REPLACE")
                    if digest(call.data("LOGITS", "probe", "RAW")) != client.held(source).digest:
                        self.counts.problems.append(f"wrong: other logits after RESTORE of {source!r}")
                    call("GENERATE", "probe", "MAXTOKENS", 1)
                    call("DEL", "probe")
                    self.restored += 1
                except CommandError as error:
                    self.counts.problems.append(f"RESTORE of {source!r}: {error}")


@click.command()
@click.option("--quick", is_flag=True, help="4 kills.")
@click.option("--kills", default=500, show_default=True)
@click.option("--seed", default=1, show_default=True)
@click.option("--jobs", default=2, show_default=True, help="Daemons that are killed side by side.")
@click.option("--model", default="synthetic:dsv4-nano,page_tokens=128", show_default=True)
@click.option("--maxstore", default="4mb", show_default=True)
def main(quick: bool, kills: int, seed: int, jobs: int, model: str, maxstore: str) -> None:
    """Print what was done, checked and found; exit 1 when anything acknowledged is lost or wrong, or damaged."""
    console = Console(highlight=False, soft_wrap=True)
    kills, jobs = (4, 1) if quick else (kills, jobs)
    options = {
        "model": model,
        "appendfsync": "always",
        "maxstore": maxstore,
        "maxstore-policy": "volatile-lru",
    }
    began = time.time()
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(jobs) as pool:
        work = [Job(number, seed, Path(scratch) / f"data{number}", options) for number in range(jobs)]
        share = -(-kills // jobs)
        for done in [pool.submit(job.run, share, console) for job in work]:
            done.result()
    report(console, work, time.time() - began)
    problems = [problem for job in work for problem in job.counts.problems]
    for problem in problems:
        console.print(problem, markup=False)
    lost = sum("lost:" in problem for problem in problems)
    wrong = sum("wrong:" in problem for problem in problems)
    n_kills = sum(job.kills for job in work)
    console.print(f"{n_kills} SIGKILLs: {lost} lost, {wrong} wrong, {len(problems) - lost - wrong} other problems")
    raise SystemExit(1 if problems or n_kills < kills else 0)


def report(console: Console, work: list[Job], seconds: float) -> None:
    """The counts of all jobs together."""
    table = Table(title=f"{sum(job.kills for job in work)} SIGKILLs in {seconds:.0f} s", show_header=False)
    done = sum((job.counts.done for job in work), type(work[0].counts.done)())
    restarts = sorted(second for job in work for second in job.restart_s)
    for name, value in [
        ("commands by kind", ", ".join(f"{name} {count}" for name, count in done.most_common())),
        ("snapshots evicted", str(sum(job.counts.evicted for job in work))),
        ("keys compared after a crash", str(sum(job.counts.checked for job in work))),
        ("snapshots restored and continued", str(sum(job.restored for job in work))),
        ("kvdb-check --deep of the store / of a backup",
         f"{sum(job.checks for job in work)} / {sum(job.backups for job in work)}"),
        ("start-up s, median and slowest", f"{restarts[len(restarts) // 2]:.2f}, {restarts[-1]:.2f}"),
    ]:  # fmt: skip
        table.add_row(name, value)
    console.print(table)


if __name__ == "__main__":
    main()
