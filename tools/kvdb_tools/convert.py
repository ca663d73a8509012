"""kvdb-convert: weights in kvdb's asymmetric recipe, and checks against official continuations.

Exit status 0 fine, 1 a vector failed, 2 wrong use or a model that cannot be used.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path

import click
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table

from kvdb_engine.catalog import open_model
from kvdb_engine.config import from_hf
from kvdb_engine.convert import convert
from kvdb_engine.errors import ModelError
from kvdb_engine.recipe import ClassReport, Recipe, recipe_size


@click.group(help=__doc__)
def main() -> None:
    """Run the command line."""


def _way(text: str) -> tuple[int, int]:
    """BITS/GROUP, e.g. 2/128."""
    try:
        bits, group_size = (int(part) for part in text.split("/"))
    except ValueError:
        raise click.BadParameter(f"{text!r}: give BITS/GROUP, e.g. 2/128") from None
    if bits not in (2, 3, 4, 5, 6, 8) or group_size not in (32, 64, 128):
        raise click.BadParameter(f"{text!r}: bits are 2, 3, 4, 5, 6 or 8, groups 32, 64 or 128")
    return bits, group_size


def _recipe(gate_up: str, down: str, early_down: str, rest: str) -> Recipe:
    return Recipe(_way(gate_up), _way(down), _way(early_down), _way(rest))


_RECIPE = (
    click.option("--gate-up", default="2/128", show_default=True, help="Routed experts' gate and up: BITS/GROUP."),
    click.option("--down", default="2/128", show_default=True, help="Routed experts' down."),
    click.option("--early-down", default="2/64", show_default=True, help="Down in the first quarter of the layers."),
    click.option("--rest", default="8/64", show_default=True, help="Attention, shared expert, embedding, head."),
    click.option("--json", "as_json", is_flag=True, help="Print JSON."),
)


def _recipe_options(command: click.decorators.FC) -> click.decorators.FC:
    for option in reversed(_RECIPE):
        command = option(command)
    return command


def _fail(error: Exception) -> None:
    click.echo(f"kvdb-convert: {error}", err=True)
    sys.exit(2)


def _print_classes(classes: list[ClassReport], as_json: bool, **more: float) -> None:
    total = ClassReport("all", sum(c.weights for c in classes), sum(c.bytes for c in classes))
    if as_json:
        rows = [
            {"class": c.name, "weights": c.weights, "bytes": c.bytes, "bits": c.bits_per_weight}
            for c in (*classes, total)
        ]
        click.echo(json.dumps({"classes": rows, **more}))
        return
    table = Table("tensors", "weights", "bytes", "GiB", "bits per weight")
    for c in (*classes, total):
        table.add_row(c.name, f"{c.weights:,}", f"{c.bytes:,}", f"{c.bytes / 2**30:.2f}", f"{c.bits_per_weight:.3f}")
    Console().print(table)
    for name, value in more.items():
        click.echo(f"{name.replace('_', ' ')}: {value:,.1f}")


@main.command("weights")
@click.argument("source")
@click.argument("target", type=click.Path(path_type=Path))
@_recipe_options
@click.option(
    "--calibrate",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="UTF-8 text to fit routed experts to. Slower, and all other weights are in memory.",
)
def weights(
    source: str,
    target: Path,
    gate_up: str,
    down: str,
    early_down: str,
    rest: str,
    as_json: bool,
    calibrate: Path | None,
) -> None:
    """Convert model SOURCE (a folder, a .gguf file or a built-in name) into the new folder TARGET."""
    recipe = _recipe(gate_up, down, early_down, rest)
    started = time.perf_counter()
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    try:
        with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task("", total=None)
            classes = convert(
                source,
                target,
                recipe,
                lambda done, of, name: bar.update(task, completed=done, total=of, description=name),
                calibrate.read_text(encoding="utf-8") if calibrate else "",
                lambda done, of: bar.update(task, completed=done, total=of, description="calibrating experts"),
            )
    except (ModelError, OSError, UnicodeDecodeError) as error:
        _fail(error)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << (20 if sys.platform == "darwin" else 10))
    _print_classes(classes, as_json, seconds=time.perf_counter() - started, peak_memory_MiB=peak)


@main.command()
@click.argument("config")
@_recipe_options
def size(config: str, gate_up: str, down: str, early_down: str, rest: str, as_json: bool) -> None:
    """What a model takes in the recipe. CONFIG: a config.json, or a model's name (synthetic:dsv4-flash).

    Needs no weights.
    """
    try:
        if config.endswith(".json"):
            geometry = from_hf(json.loads(Path(config).read_text(encoding="utf-8")), config)
        else:
            geometry = open_model(config).config
        _print_classes(recipe_size(geometry, _recipe(gate_up, down, early_down, rest)), as_json)
    except (ModelError, ValueError, OSError) as error:
        _fail(error)


@main.command("verify-vectors")
@click.option("--model", default="dsv4-nano", show_default=True, help="Built-in name, folder or .gguf file.")
@click.option("--vectors", required=True, type=click.Path(path_type=Path), help="Folder with official.vec and prompts.")
@click.option("--backend", default="auto", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print JSON lines.")
def verify_vectors(model: str, vectors: Path, backend: str, as_json: bool) -> None:
    """Run official continuations.

    A step passes if the most likely token has the official bytes, and every listed token is among the 20 most likely
    with a log-probability within 4.0 nats.
    """
    from kvdb_engine.engine import Engine
    from kvdb_engine.official_vectors import LOGPROB_TOLERANCE, N_TOP, read_vectors, run_case

    failed = steps = 0
    try:
        cases = read_vectors(vectors)
        engine = Engine(open_model(model), backend_name=backend)
        for case in cases:
            for result in run_case(engine, case):
                failed += not result.is_passed
                steps += 1
                if as_json:
                    fields = {"case": result.case, "step": result.step, "passed": result.is_passed}
                    fields |= {"official": result.official.hex(), "chosen": result.chosen.hex()}
                    click.echo(json.dumps({**fields, "gap": result.largest_gap, "missing": result.missing}))
                    continue
                click.echo(
                    f"{'pass' if result.is_passed else 'FAIL'} {result.case} step {result.step}: official "
                    f"{result.official!r}, chosen {result.chosen!r}, largest gap {result.largest_gap:.2f} of "
                    f"{LOGPROB_TOLERANCE}, missing from the top {N_TOP}: {result.missing}"
                )
    except ModelError as error:
        _fail(error)
    if failed:
        click.echo(f"{failed} of {steps} steps failed", err=True)
        sys.exit(1)
    if not as_json:
        click.echo(f"all {steps} steps pass")


if __name__ == "__main__":
    main()
