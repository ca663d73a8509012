"""A wheel of this checkout in a fresh virtual environment: what a plain install can do, and what the http extra adds.

Plain: `import kvdb; kvdb.Client` loads nothing of what daemon and engine need, all programs start, the daemon answers
PING, PREFILL and GENERATE without MLX, and says which extra `--http-port` needs. With `http`: an answer over HTTP.

pip installs the wheel and fetches its dependencies. With --quick nothing is fetched: the wheel is unpacked, and exactly
what it declares as its dependencies, and what those declare, is linked from the environment that runs this program.

    python tests/show/fresh_install.py [--quick]
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import Distribution, distribution
from pathlib import Path

import click
from packaging.requirements import Requirement

import kvdb
from kvdb_tools.daemon import free_port

ROOT = Path(__file__).parents[2]
PROGRAMS = ("server", "cli", "dump", "check", "bench", "convert", "demo")
HEAVY = ("numpy", "lmdb", "tokenizers", "msgpack", "mlx", "gguf", "safetensors", "uvicorn", "starlette", "kvdb_engine")
START_S = 60


def build(folder: Path) -> Path:
    """The wheel."""
    run([sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", str(folder), str(ROOT)])
    (wheel,) = folder.glob("kvdb-*.whl")
    return wheel


def run(words: list[str]) -> str:
    """A program's output. Raises ClickException with its words when it fails."""
    done = subprocess.run(words, capture_output=True, text=True, check=False, cwd="/")
    if done.returncode:
        raise click.ClickException(f"{' '.join(words)}\n{done.stdout}{done.stderr}")
    return done.stdout


class Fresh:
    """A virtual environment with the wheel."""

    def __init__(self, folder: Path, wheel: Path, extra: str, *, fetches: bool) -> None:
        run([sys.executable, "-m", "venv", *([] if fetches else ["--without-pip"]), str(folder)])
        self.python = folder / "bin" / "python"
        if fetches:
            wanted = f"{wheel}[{extra}]" if extra else str(wheel)
            run([str(self.python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", wanted])
        else:
            (site,) = folder.glob("lib/python*/site-packages")
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(site)
            for name in closure(Distribution.at(next(site.glob("kvdb-*.dist-info"))), {extra}):
                link(distribution(name), site)

    def __call__(self, code: str) -> str:
        """What a piece of Python prints there; nothing of this environment is seen by it."""
        return run([str(self.python), "-I", "-c", code]).strip()

    @contextmanager
    def daemon(self, folder: Path, **options: str) -> Iterator[int]:
        """A daemon that runs there; its port."""
        port = free_port()
        options = {"dir": str(folder), "port": str(port), "bind": "127.0.0.1", **options}
        words = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", value)]
        code = "from kvdb.server import main; main()"
        log = folder.with_suffix(".log")
        with log.open("wb") as file:
            process = subprocess.Popen([str(self.python), "-I", "-c", code, *words], stdout=file, stderr=file, cwd="/")
        try:
            until = time.monotonic() + START_S
            while b"Ready to accept" not in log.read_bytes():
                if process.poll() is not None or time.monotonic() > until:
                    raise click.ClickException(f"the daemon did not start:\n{log.read_text()}")
                time.sleep(0.02)
            yield port
        finally:
            process.terminate()
            process.wait(START_S)


def closure(root: Distribution, extras: set[str]) -> set[str]:
    """Names of all distributions that `root` with these extras needs here."""
    found: set[str] = set()
    waiting = [(root, extras)]
    while waiting:
        here, wanted = waiting.pop()
        for line in here.requires or ():
            needed = Requirement(line)
            if needed.marker and not any(needed.marker.evaluate({"extra": extra}) for extra in wanted | {""}):
                continue
            if needed.name not in found:
                found.add(needed.name)
                waiting.append((distribution(needed.name), set(needed.extras)))
    return found


def link(package: Distribution, site: Path) -> None:
    """Let what a distribution installed be found in another site-packages too."""
    for top in {path.parts[0] for path in package.files or () if path.parts[0] not in ("..", "__pycache__")}:
        place = site / top
        if not place.exists():
            place.symlink_to(os.path.realpath(str(package.locate_file(top))))


def check_plain(fresh: Fresh, scratch: Path) -> Iterator[tuple[str, bool]]:
    """What an install without extras must do."""
    code = f"import sys, kvdb; kvdb.Client, kvdb.AsyncClient; print([n for n in {HEAVY!r} if n in sys.modules])"
    loaded = fresh(code)
    yield f"import kvdb; kvdb.Client loads nothing of the daemon's or the engine's: {loaded}", loaded == "[]"
    code = "from importlib.util import find_spec; print([n for n in ('mlx', 'gguf', 'uvicorn') if find_spec(n)])"
    there = fresh(code)
    yield f"MLX, GGUF and HTTP packages are not there: {there}", there == "[]"
    begins = "import sys, importlib.metadata as m; sys.argv = ['x', '--help']"
    for program in PROGRAMS:
        text = fresh(f"{begins}\n(p,) = m.entry_points(group='console_scripts', name='kvdb-{program}')\np.load()()")
        yield f"kvdb-{program} --help", bool(text)
    with fresh.daemon(scratch / "plain") as port:
        code = f"""
import kvdb
client = kvdb.Client("127.0.0.1", {port})
session = client.session("s")
print(client.ping(), session.prefill("Once upon a time").computed, len(session.generate(5, seed=1).ids))
"""
        said = fresh(code)
        yield f"kvdb-server: PING, PREFILL, GENERATE through kvdb.Client: {said}", said.startswith("True ")
    words = ["--dir", str(scratch / "refused"), "--port", str(free_port()), "--http-port", str(free_port())]
    done = subprocess.run(
        [str(fresh.python), "-I", "-c", "from kvdb.server import main; main()", *words],
        capture_output=True, text=True, check=False, cwd="/", timeout=START_S,
    )  # fmt: skip
    is_refused = done.returncode == 1 and "pip install 'kvdb[http]'" in done.stdout + done.stderr
    yield "--http-port is refused, with the extra it needs", is_refused


def check_http(fresh: Fresh, scratch: Path) -> Iterator[tuple[str, bool]]:
    """What the http extra adds."""
    http_port = free_port()
    with fresh.daemon(scratch / "http", http_port=str(http_port)):
        body = json.dumps({"model": "dsv4-nano", "prompt": "Once upon a time", "max_tokens": 3}).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{http_port}/v1/completions", body)
        until = time.monotonic() + START_S
        while True:  # this port opens after the other one
            try:
                with urllib.request.urlopen(request, timeout=START_S) as reply:
                    used = json.load(reply)["usage"]["completion_tokens"]
                break
            except ConnectionError:
                pass
            except urllib.error.URLError:
                if time.monotonic() > until:
                    raise
            time.sleep(0.05)
    yield f"with [http]: /v1/completions answers with {used} tokens", used == 3


@click.command()
@click.option("--quick", is_flag=True, help="Fetch nothing: link the declared dependencies from this environment.")
def main(quick: bool) -> None:
    """Build the wheel, install it, and say what works."""
    failed = 0
    with tempfile.TemporaryDirectory(prefix="kvdb-show-") as folder:
        scratch = Path(folder)
        wheel = build(scratch)
        click.echo(f"{wheel.name}, {wheel.stat().st_size:,} bytes, of kvdb {kvdb.__version__}")
        for extra, check in (("", check_plain), ("http", check_http)):
            began = time.monotonic()
            fresh = Fresh(scratch / f"venv-{extra}", wheel, extra, fetches=not quick)
            click.echo(f"kvdb{f'[{extra}]' if extra else ''} installed in {time.monotonic() - began:.1f} s")
            for claim, holds in check(fresh, scratch):
                failed += not holds
                click.echo(f"  {'holds' if holds else 'DOES NOT HOLD'}: {claim}")
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()
