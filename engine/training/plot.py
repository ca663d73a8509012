"""Draw the loss curve of a training run from its log.jsonl."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

GROUPS = {
    "Python source": ("python",),
    "documentation": ("python-doc", "sqlite-doc", "postgresql-doc", "jargon"),
    "prose": ("kjv", "promessi-sposi", "devil"),
    "tool-call conversations": ("episodes",),
}
COLORS = ("#1f77b4", "#2ca02c", "#d62728", "#9467bd")
PHASES = ("1,024 tokens", "2,048 tokens,\nindexer learns", "selection and\nrounding on", "16,384\ntokens")


def smooth(points: list[tuple[float, float]], width: int) -> tuple[list[float], list[float]]:
    """Return the points with their values averaged over the last ``width`` of them."""
    xs, ys = [], []
    for i in range(len(points)):
        part = [y for _, y in points[max(0, i - width + 1) : i + 1]]
        xs.append(points[i][0])
        ys.append(sum(part) / len(part))
    return xs, ys


def main() -> None:
    """Write the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("log", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    records = [json.loads(line) for line in args.log.read_text().splitlines()]
    figure, (top, bottom) = plt.subplots(
        2, 1, figsize=(9, 6.6), height_ratios=(4, 1), sharex=True, constrained_layout=True
    )
    for (label, sources), color in zip(GROUPS.items(), COLORS, strict=True):
        points = []
        for record in records:
            values = [record["by_source"][s] for s in sources if s in record["by_source"]]
            if values:
                points.append((record["tokens"] / 1e6, sum(values) / len(values)))
        top.plot(*smooth(points, 12), label=label, color=color, linewidth=1.4)
    bottom.plot(
        *smooth([(r["tokens"] / 1e6, r["index_loss"]) for r in records if r["phase"] > 0], 12),
        color="#555",
        linewidth=1.4,
    )
    starts = [next(r for r in records if r["phase"] == p)["tokens"] / 1e6 for p in range(4)]
    ends = [*starts[1:], records[-1]["tokens"] / 1e6]
    for p, (a, b) in enumerate(zip(starts, ends, strict=True)):
        for axes in (top, bottom):
            axes.axvspan(a, b, color="#000", alpha=0.05 if p % 2 else 0.0, linewidth=0)
        narrow = b - a < 20
        top.text((a + b) / 2, 4.42, PHASES[p], ha="center", va="top", fontsize=7 if narrow else 9, color="#333")
    top.set_ylim(0, 4.5)
    top.set_ylabel("training loss (nats per token)")
    top.legend(loc="upper right", bbox_to_anchor=(1, 0.88), frameon=False)
    top.set_title("dsv4-nano: training loss by kind of text (mean of 12 log entries)", fontsize=11)
    bottom.set_ylim(bottom=0)
    bottom.set_ylabel("indexer KL\n(nats, 3 layers)")
    bottom.set_xlabel("tokens seen (millions)")
    for axes in (top, bottom):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(args.out, dpi=110)


if __name__ == "__main__":
    main()
