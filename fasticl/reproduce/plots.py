"""PNG and CSV files of figures."""

from __future__ import annotations

import csv
import math
from itertools import cycle
from pathlib import Path

from fasticl.report import axes, label, legend
from fasticl.reproduce.results import Curve, Figure

_COLORS = ("#1769aa", "#dd9a4a", "#2e8555", "#b3362b", "#7b5ea7", "#5c6670")


def write_csv(figure: Figure, path: Path) -> None:
    """One line per point: panel, curve, x, mean, the 95 % interval's ends (empty without one), seeds, who."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("panel", "curve", "x", "mean", "low", "high", "n", "source"))
        for line in figure.curves:
            for x, estimate in line.points:
                ends = ("" if math.isnan(end) else f"{end:.6g}" for end in (estimate.low, estimate.high))
                who = "authors" if line.paper else "fasticl"
                title = figure.panels[line.panel].title
                writer.writerow((title, line.name, f"{x:g}", f"{estimate.mean:.6g}", *ends, estimate.n, who))


def write_png(figure: Figure, path: Path) -> None:
    """Panels two or three to a row; bands are 95 % intervals, cut off beyond the means; crosses the authors' values."""
    columns = 2 if len(figure.panels) in (2, 4) else min(len(figure.panels), 3)
    drawing, panels = axes(len(figure.panels), width=max(4.2 * columns, 5.6), height=3.4, per_row=columns)
    for number, (panel, described) in enumerate(zip(panels, figure.panels, strict=True)):
        lines = [line for line in figure.curves if line.panel == number]
        ours = [line for line in lines if not line.paper]
        floor = _floor(ours) if described.log_y else -math.inf
        for color, line in zip(cycle(_COLORS), ours):
            x = [point for point, _ in line.points]
            mean, low, high = ([max(getattr(e, end), floor) for _, e in line.points] for end in ("mean", "low", "high"))
            marker = "o" if len(x) < 20 else None
            panel.plot(x, mean, color=color, linewidth=1.5, marker=marker, markersize=3, label=line.name)
            if not any(math.isnan(e.low) for _, e in line.points):
                panel.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)
        for marker, line in zip(cycle("x+1"), (line for line in lines if line.paper)):
            x = [point for point, _ in line.points]
            panel.plot(x, [e.mean for _, e in line.points], marker, color="#22272e", markersize=7, label=line.name)
        means = [max(e.mean, floor) for line in lines for _, e in line.points]
        if described.log_y:
            panel.set_yscale("log")
            panel.set_ylim(min(means) / 1.3, max(means) * 1.3)
        else:
            margin = 0.08 * (max(means) - min(means)) or 0.1
            panel.set_ylim(min(means) - margin, max(means) + margin)
        if described.log_x:
            panel.set_xscale("log", base=2)
        label(panel, described.title, described.x, described.y)
        legend(panel)
    drawing.savefig(path, dpi=100)


def _floor(lines: list[Curve]) -> float:
    """Where a logarithmic axis ends: half the smallest mean above 0, so that an error of 0 is drawn on the floor."""
    above = [estimate.mean for line in lines for _, estimate in line.points if estimate.mean > 0]
    return min(above, default=1e-4) / 2
