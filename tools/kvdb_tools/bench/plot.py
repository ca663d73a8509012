"""Charts of results: one picture, one panel a result that has bars. Needs matplotlib (the `bench` extra)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from kvdb_tools.bench.scenario import Result


def draw(results: Sequence[Result], path: Path) -> None:
    """Write a PNG. Raises a usage error when matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        raise click.UsageError("--plot needs matplotlib: pip install 'kvdb[bench]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = [result for result in results if result.bars]
    if not shown:
        raise click.UsageError("--plot: none of these scenarios has a chart")
    figure, axes = pyplot.subplots(len(shown), 1, figsize=(9, 4 * len(shown)), squeeze=False, layout="constrained")
    for axis, result in zip(axes[:, 0], shown, strict=True):
        bars = result.bars
        assert bars is not None
        width = 0.8 / len(bars.series)
        for number, (name, values) in enumerate(bars.series.items()):
            places = [group + number * width for group in range(len(bars.groups))]
            drawn = axis.bar(places, values, width, label=name)
            axis.bar_label(drawn, fmt="{:,.3g}", fontsize=7)
        axis.set_xticks([group + 0.4 - width / 2 for group in range(len(bars.groups))], bars.groups)
        axis.set_ylabel(bars.unit)
        axis.set_title(result.title)
        axis.legend(loc="upper left", bbox_to_anchor=(1, 1))  # beside the bars, not over them
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
