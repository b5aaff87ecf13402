"""``report.html``: every figure with its table of claims."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from fasticl.report import image, page, table
from fasticl.reproduce.results import Figure, Verdict


def html(figures: Sequence[Figure], failures: Sequence[str], summary: Mapping[str, Any], folder: Path) -> str:
    """The page, from figures whose PNGs lie in ``folder``."""
    counts = Counter(claim.verdict for figure in figures for claim in figure.claims)
    verdicts: tuple[Verdict, ...] = ("reproduced", "in trend", "not reproduced")
    cards = "".join(f"<div class=card><b>{counts[v]}</b><span>claims {v}</span></div>" for v in verdicts)
    sections = [
        "<h1>The paper, reproduced</h1>",
        '<p class="lead">How Do Nonlinear Transformers Learn and Generalize in In-Context Learning? Li et al., ICML '
        f"2024, arXiv 2402.15607. FastICL {escape(summary['fasticl'])}, torch {escape(summary['torch'])}, "
        f"{escape(summary['cpu'])}{'; quick settings, whose numbers mean little' if summary['quick'] else ''}.</p>",
        f'<div class="cards">{cards}</div>',
        "<p>Lines are means over seeds, bands 95 % confidence intervals, crosses the authors' values, read by eye off "
        "their figures. A value is reproduced if our mean comes within the stated factor; in trend if "
        "it does not but moves the way it should. Rules are beside each verdict. A figure lists what was left out of "
        "it.</p>",
    ]
    if failures:
        sections.append('<div class="verdict bad">' + "".join(f"<p>{escape(f)}</p>" for f in failures) + "</div>")
    sections.append(
        table(
            ("figure", "shows", *verdicts),
            [
                (figure.name, figure.title, *(str(sum(c.verdict == v for c in figure.claims)) for v in verdicts))
                for figure in figures
            ],
        )
    )
    for figure in figures:
        sections += [
            f'<h2 id="{figure.name}">{escape(figure.title)}</h2>',
            f"<p>{escape(figure.text)}</p>",
            image(folder / f"{figure.name}.png", figure.title),
            table(
                ("claim", "paper", "ours (95 % interval)", "verdict", "rule"),
                [(c.what, c.paper, c.ours, c.verdict, c.rule) for c in figure.claims],
            ),
            f'<p class="note">{escape(figure.settings)}</p>',
            *(f'<p class="note">{escape(note)}</p>' for note in figure.notes),
        ]
    return page("FastICL: the paper, reproduced", sections)
