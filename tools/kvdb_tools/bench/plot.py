"""Charts of results: one picture, one row a result that has a chart. Needs matplotlib (the `bench` extra)."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click

from kvdb_tools.bench.scenario import Bars, Curves, Result

# Measured curves are points with their intervals; predictions are lines, told apart without colour too.
_LINES = (("0.35", ":"), ("tab:orange", "--"), ("tab:green", "-."))


def need_matplotlib() -> None:
    """Raise a usage error where there is no matplotlib: to be called before minutes are spent on measuring."""
    if find_spec("matplotlib") is None:
        raise click.UsageError("--plot needs matplotlib: pip install 'kvdb[bench]'")


def draw(results: Sequence[Result], path: Path) -> None:
    """Write a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = [result for result in results if result.bars or result.curves]
    if not shown:
        raise click.UsageError("--plot: none of these scenarios has a chart")
    panels = max(len(result.curves.panels) if result.curves else 1 for result in shown)
    figure = pyplot.figure(figsize=(max(9.0, 3.2 * panels), 4 * len(shown)), layout="constrained")
    for row, result in zip(figure.subfigures(len(shown), 1, squeeze=False)[:, 0], shown, strict=True):
        row.suptitle(result.title)
        if result.curves is not None:
            _draw_curves(row, result.curves)
        elif result.bars is not None:
            _draw_bars(row, result.bars)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _draw_bars(figure: Any, bars: Bars) -> None:
    axis = figure.subplots()
    width = 0.8 / len(bars.series)
    for number, (name, values) in enumerate(bars.series.items()):
        places = [group + number * width for group in range(len(bars.groups))]
        drawn = axis.bar(places, values, width, label=name)
        axis.bar_label(drawn, fmt="{:,.3g}", fontsize=7)
    axis.set_xticks([group + 0.4 - width / 2 for group in range(len(bars.groups))], bars.groups)
    axis.set_ylabel(bars.unit)
    axis.legend(loc="upper left", bbox_to_anchor=(1, 1))  # beside the bars, not over them


def _draw_curves(figure: Any, curves: Curves) -> None:
    axes = figure.subplots(1, len(curves.panels), sharey=True, squeeze=False)[0]
    for axis, (title, series) in zip(axes, curves.panels.items(), strict=True):
        styles = iter(_LINES)
        for name, curve in series.items():
            if curve.low:
                below = [value - low for value, low in zip(curve.values, curve.low, strict=True)]
                above = [high - value for value, high in zip(curve.values, curve.high, strict=True)]
                axis.errorbar(curves.x, curve.values, (below, above), fmt="o", ms=5, capsize=3, label=name, zorder=3)
            else:
                color, style = next(styles)
                axis.plot(curves.x, curve.values, style, color=color, label=name)
        axis.set_xscale("log")
        axis.set_xticks(curves.x, [f"{x:g}" for x in curves.x])
        axis.minorticks_off()
        axis.grid(axis="y", alpha=0.3)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel(curves.x_unit)
    axes[0].set_ylabel(curves.unit)
    names, labels = axes[0].get_legend_handles_labels()
    figure.legend(names, labels, loc="outside lower center", ncols=len(names))
