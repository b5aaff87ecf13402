"""Figures and README tables from results files.

``python benchmarks/plot.py`` draws beside the files; ``--readme README.md`` instead fills in the tables between
``<!-- table:NAME -->`` and ``<!-- end -->`` from those of CPUs. NAME: headline, bandwidth, or an op.
"""

from __future__ import annotations

import argparse
import re
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import product
from math import log2
from pathlib import Path

from common import read_rows
from environment import ROOT
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
from numpy import linspace
from tables import Row, by_case, fasticl, fill, percent, variant

RESULTS = ROOT / "benchmarks" / "results"
N_OF_M = ("2:4", "4:8", "8:16")
TICKS = (0.1, 0.25, 0.5, 0.75, 1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32)
NUMBER = FuncFormatter(lambda value, _: f"{value:g}")


def panels(rows: Sequence[Row], op: str) -> dict[tuple[str, str, str], list[list[Row]]]:
    """Cases of ``op``, batches ascending, by (dtype, shape, title).

    Removed neurons are apart from single zeros, and cold from hot weights of shapes that were measured with both.
    """
    found: dict[tuple[str, str, str], list[list[Row]]] = {}
    cases = [case for case in by_case(rows).values() if case[0]["op"] == op]
    places = Counter((case[0]["dtype"], case[0]["shape"], case[0]["batch"]) for case in cases)
    both = {shape for (_, shape, _), count in places.items() if count > 1}
    for case in sorted(cases, key=lambda case: int(case[0]["batch"])):
        patterns = {row["pattern"] for row in case if row["impl"] == "fasticl"}
        apart = "neuron" in patterns
        for group in [{pattern} for pattern in sorted(patterns, reverse=True)] if apart else [patterns]:
            shown = [row for row in case if row["impl"] != "fasticl" or row["pattern"] in group]
            title = ", neurons removed" if group == {"neuron"} else ", single zeros" if apart else ""
            title += f", {case[0]['cache']}" if case[0]["shape"] in both else ""
            shown.sort(key=lambda row: float(row["sparsity"]))
            found.setdefault((case[0]["dtype"], case[0]["shape"], title), []).append(shown)
    return found


def figure(rows: Sequence[Row], op: str, over: str, draw: Callable[[Axes, list[list[Row]]], None]) -> Figure:
    """One panel per dtype (rows) and shape (columns), one legend; ``over`` is the x axis."""
    found = panels(rows, op)
    dtypes = sorted({dtype for dtype, _, _ in found}, reverse=True, key=lambda dtype: dtype == "float32")
    columns = list(dict.fromkeys((shape, title) for _, shape, title in found))
    drawing = Figure(figsize=(3.6 * len(columns) + 1.6, 3.4 * len(dtypes) + 0.5), layout="constrained")
    grid = drawing.subplots(len(dtypes), len(columns), sharey=True, squeeze=False)
    labels: dict[str, Line2D] = {}
    for axes, (dtype, (shape, title)) in zip(grid.flat, product(dtypes, columns), strict=True):
        cases = found.get((dtype, shape, title))
        if not cases:
            axes.set_visible(False)
            continue
        draw(axes, cases)
        axes.axhline(1, color="0.4", linewidth=0.8)
        axes.set_yscale("log", base=2)
        axes.yaxis.set_major_locator(FixedLocator(TICKS))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(NUMBER)
        axes.set_title(f"{shape}{title}, {dtype}", fontsize=9)
        axes.grid(alpha=0.25)
        labels |= {label: line for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    names = sorted(labels, key=_order)
    drawing.legend([labels[name] for name in names], names, loc="outside right upper", fontsize=8, frameon=False)
    drawing.supylabel("times as fast as the best dense", fontsize=10)
    drawing.suptitle(f"{op} over {over} {machine(rows)}", fontsize=11)
    return drawing


def machine(rows: Sequence[Row]) -> str:
    first = rows[0]
    threads = "1 thread" if first["threads"] == "1" else f"{first['threads']} threads"
    return f"({first['device']}, {threads}, torch {first['torch']})"


def _order(label: str) -> tuple[bool, float, str]:
    """Numbered lines by number, then the others."""
    number = re.search(r"\d+(\.\d+)?", label)
    return (number is None or label.startswith(("ideal", "bytes")), float(number[0]) if number else 0.0, label)


def moved(row: Row) -> float:
    """Bytes of one call, in units of 1e6."""
    return float(row["gbps"]) * float(row["ms_p50"])


def shade(share: float) -> tuple[float, ...]:
    """A colour for ``share`` in [0, 1], the same in all panels."""
    return colormaps["viridis"](0.9 * share)


def over_sparsity(axes: Axes, cases: list[list[Row]]) -> None:
    """A line per batch; dashed the ideal 1 / density, dotted the dense weights' bytes over the packed ones'."""
    for case in cases:
        batch = int(case[0]["batch"])
        line = [row for row in case if row["impl"] == "fasticl"]
        if line and (batch in (1, 4, 16, 64, 256) or len(cases) < 6):  # more lines are hard to tell apart
            x = [100 * float(row["sparsity"]) for row in line]
            y = [float(row["speedup"]) for row in line]
            axes.plot(x, y, "o-", color=shade(log2(batch) / 8), label=f"batch {batch}", markersize=3.5)
    line = [row for row in cases[0] if row["impl"] == "fasticl"]
    zeros = [100 * float(row["sparsity"]) for row in line]
    if not zeros:
        return
    fine = linspace(min(zeros), max(zeros), 100)
    axes.plot(fine, 100 / (100 - fine), "--", color="0.3", linewidth=1, label="ideal, 1 / density")
    dense = next(row for row in cases[0] if row["impl"] == "torch")
    ratio = [moved(dense) / moved(row) for row in line]
    axes.plot(zeros, ratio, ":", color="tab:red", linewidth=1.2, label="bytes, dense / packed")
    axes.set_xlabel("zeros (%)")


def over_batch(axes: Axes, cases: list[list[Row]]) -> None:
    """A line per kind of zeros; grey, onnxruntime's dense."""
    lines: dict[str, list[tuple[int, float]]] = {}
    colours: dict[str, tuple[float, ...] | str] = {}
    for case in cases:
        for row in case:
            if row["impl"] in ("fasticl", "onnxruntime"):
                label = "onnxruntime, dense" if row["impl"] == "onnxruntime" else variant(row).removeprefix("neurons ")
                lines.setdefault(label, []).append((int(row["batch"]), float(row["speedup"])))
                share = N_OF_M.index(row["pattern"]) / 3 if row["pattern"] in N_OF_M else float(row["sparsity"]) ** 2
                colours[label] = shade(share) if row["impl"] == "fasticl" else "0.6"
    for label, line in lines.items():
        axes.plot(*zip(*line, strict=True), "o-", color=colours[label], label=label, markersize=3.5)
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted({int(case[0]["batch"]) for case in cases}))
    axes.xaxis.set_major_formatter(NUMBER)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("batch (tokens)")


def bars(rows: Sequence[Row], op: str) -> Figure:
    """One group per case, one bar per contender: times as fast as the best dense."""
    cases = [case for case in by_case(rows).values() if case[0]["op"] == op]
    drawing = Figure(figsize=(8, 0.24 * sum(len(case) + 1 for case in cases) + 0.9), layout="constrained")
    axes = drawing.add_subplot()
    axes.axvline(1, color="0.4", linewidth=0.8, zorder=0)
    position, ticks = 0, []
    for case in cases:
        ticks.append(
            (position + (len(case) - 1) / 2, f"{case[0]['shape']}\nbatch {case[0]['batch']}, {case[0]['dtype']}")
        )
        for row in case:
            value, colour = float(row["speedup"]), shade(0.4 + float(row["sparsity"]) / 2)
            axes.barh(position, value, 0.85, color=colour if fasticl(row) else "0.72")
            label = f"{_bar(row)}: {value:.2f}×"
            box = {"facecolor": "white", "edgecolor": "none", "pad": 0.5, "alpha": 0.8}
            place = {"xytext": (4, 0), "textcoords": "offset points", "va": "center"}
            axes.annotate(label, (value, position), **place, fontsize=8, bbox=box)
            position += 1
        position += 1
    axes.set_yticks([tick for tick, _ in ticks], [label for _, label in ticks], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.5 * max(float(row["speedup"]) for case in cases for row in case))
    axes.set_xlabel("times as fast as the best dense")
    axes.set_title(f"{op} {machine(rows)}", fontsize=11)
    return drawing


def _bar(row: Row) -> str:
    name = row["impl"].replace("_", " ")
    return name if row["pattern"] == "dense" else f"{name} {percent(row['sparsity'])}"


def figures(rows: Sequence[Row]) -> dict[str, Figure]:
    """By file stem, for the ops that ``rows`` have."""
    ops = {row["op"] for row in rows}
    found = {}
    for op in ("bitmap_linear", "sliced_linear", "fused_mlp"):
        if op in ops:
            found[f"{op}-sparsity"] = figure(rows, op, "sparsity", over_sparsity)
    for op in ("bitmap_linear", "sliced_linear", "nm_linear", "fused_mlp"):
        if op in ops:
            found[f"{op}-batch"] = figure(rows, op, "batch", over_batch)
    for op in ("attention_mlp", "model", "decoder"):
        if op in ops:
            found[op] = bars(rows, op)
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="*", help="default: those in benchmarks/results")
    parser.add_argument("--readme", type=Path, help="fill in this file's tables; draw nothing")
    options = parser.parse_args(arguments)
    paths = [path.resolve() for path in options.results or sorted(RESULTS.glob("*.csv"))]
    found = {path: read_rows(path) for path in paths}
    if not found or not all(found.values()):
        raise SystemExit(f"expected rows, got none: {', '.join(str(path) for path in paths if not found[path])}")
    if options.readme:
        results = {
            path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.name: rows
            for path, rows in found.items()
            if rows[0]["device"] == "cpu"
        }
        print(f"{options.readme}: {', '.join(fill(options.readme, results))}")
        return 0
    for path, rows in found.items():
        for stem, drawing in figures(rows).items():
            target = path.with_name(f"{path.stem}-{stem}.png")
            drawing.savefig(target, dpi=130)
            print(target)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
