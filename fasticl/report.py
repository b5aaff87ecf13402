"""Pieces of the reports that commands write: HTML files with style and plots inside, that need no network."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, FAINT = "#22272e", "#d8dde3"
_STYLE = """
:root { --ink: #22272e; --soft: #5c6670; --line: #e3e7eb; --paper: #ffffff; --wash: #f6f8fa; --accent: #1769aa; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--wash); color: var(--ink); -webkit-font-smoothing: antialiased;
  font: 16px/1.6 system-ui, -apple-system, "Segoe UI", "Helvetica Neue", "DejaVu Sans", Arial, sans-serif; }
main { max-width: 60rem; min-height: 100vh; margin: 0 auto; padding: 3.5rem 3rem 4rem; background: var(--paper); }
h1 { font-size: 2.1rem; line-height: 1.2; letter-spacing: -.02em; margin: 0 0 .6rem; }
h2 { font-size: 1.35rem; letter-spacing: -.01em; margin: 3.2rem 0 .4rem; padding-top: 1.2rem;
  border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 2rem 0 .5rem; }
p { max-width: 44rem; margin: .5rem 0 1rem; }
.lead, .note { color: var(--soft); }
.note { font-size: .9rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)); gap: 1rem; margin: 1.8rem 0 1rem; }
.card { background: var(--wash); border-radius: 8px; padding: 1rem 1.1rem; }
.card b { display: block; font-size: 1.75rem; line-height: 1.2; letter-spacing: -.02em; color: var(--accent); }
.card span { font-size: .85rem; color: var(--soft); line-height: 1.35; display: block; margin-top: .2rem; }
.verdict { border-left: 4px solid #2e8555; background: #eef7f1; border-radius: 0 6px 6px 0; margin: 1.4rem 0;
  padding: .7rem 1.1rem; }
.verdict.bad { border-color: #b3362b; background: #fcefed; }
.verdict p { margin: .15rem 0; max-width: none; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; margin: .8rem 0 1.4rem; font-size: .92rem;
  font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 600; color: var(--soft); font-size: .82rem; border-bottom: 2px solid var(--line); }
th, td { padding: .42rem .8rem .42rem 0; vertical-align: top; }
td { border-bottom: 1px solid var(--line); }
.number { text-align: right; padding-right: 1.1rem; }
tr.ours td { font-weight: 600; color: var(--accent); }
.answers td { width: 33%; font-size: .92rem; white-space: pre-line; overflow-wrap: anywhere; }
.question { font-weight: 600; margin: 1.5rem 0 0; }
img { display: block; max-width: 100%; margin: 1.2rem 0; }
img.narrow { max-width: 66%; }
pre { background: var(--wash); padding: 1rem; border-radius: 8px; overflow-x: auto;
  font: .76rem/1.5 ui-monospace, "DejaVu Sans Mono", monospace; }
summary { cursor: pointer; color: var(--accent); }
@media print { body { background: none; } main { padding: 0; } }
"""


def page(title: str, sections: Iterable[str]) -> str:
    """A whole HTML file; ``sections`` are HTML."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(sections)
        + "\n</main>\n</body>\n</html>\n"
    )


def table(columns: Iterable[str], rows: Sequence[Sequence[str]], *, ours: int | None = None, css: str = "") -> str:
    """``ours`` is the row to stand out. Columns of numbers go to the right."""
    columns = list(columns)
    numeric = [bool(rows) and all(row[i][:1].isdigit() for row in rows) for i in range(len(columns))]
    classes = ['class="number"' if right and css != "answers" else "" for right in numeric]

    def line(tag: str, cells: Iterable[str]) -> str:
        return "".join(f"<{tag} {c}>{escape(cell)}</{tag}>" for cell, c in zip(cells, classes, strict=True))

    head = line("th", columns)
    body = "".join(f"<tr{' class=ours' if i == ours else ''}>{line('td', row)}</tr>" for i, row in enumerate(rows))
    found = f'<table class="{css}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
    return f'<div class="scroll">{found}</div>'


def image(path: Path, alternative: str, *, css: str = "") -> str:
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    return f'<img class="{css}" src="data:image/png;base64,{data}" alt="{escape(alternative)}">'


def axes(
    count: int, *, width: float = 8.4, height: float = 3.0, per_row: int | None = None
) -> tuple[Figure, list[Axes]]:
    """A figure of ``count`` panels side by side; drawn by Agg, without pyplot's global state or a display.

    ``width`` inches are of the whole figure, ``height`` of each row of ``per_row`` panels; None is all in one.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(count, per_row or count)
    rows = -(-count // columns)
    figure = Figure(figsize=(width, height * rows), layout="constrained")
    FigureCanvasAgg(figure)
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for empty in panels[count:]:
        empty.set_visible(False)
    panels = panels[:count]
    for panel in panels:
        panel.spines[["top", "right"]].set_visible(False)
        panel.spines[["left", "bottom"]].set_color(FAINT)
        panel.tick_params(colors=INK, labelsize=9, color=FAINT)
        panel.set_axisbelow(True)
        panel.grid(axis="y", color=FAINT, linewidth=0.6)
    return figure, panels


def label(panel: Axes, title: str, x: str = "", y: str = "") -> None:
    panel.set_title(title, loc="left", fontsize=10.5, color=INK, fontweight="bold")
    panel.set_xlabel(x, fontsize=9, color=INK)
    panel.set_ylabel(y, fontsize=9, color=INK)


def legend(panel: Axes) -> None:
    panel.legend(frameon=False, fontsize=8.5, labelcolor=INK)
