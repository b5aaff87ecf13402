"""What a figure is made of: estimates over seeds, curves of them, and claims of the paper with a verdict on each."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from fasticl.reproduce.runner import Job

Verdict = Literal["reproduced", "in trend", "not reproduced"]


RECIPE = "One-layer model, recipe settings: kappa = 1/2, a small W_O (xi = 0.02), plain SGD."


@dataclass(frozen=True)
class Estimate:
    """Mean over ``n`` seeds with its 95 % confidence interval (Student's t); one seed has no interval."""

    mean: float
    low: float
    high: float
    n: int

    @staticmethod
    def of(values: Iterable[float]) -> Estimate:
        from scipy.stats import t

        values = list(values)
        n, mean = len(values), math.fsum(values) / len(values)
        if n == 1:
            return Estimate(mean, math.nan, math.nan, 1)
        deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1))
        half = float(t.ppf(0.975, n - 1)) * deviation / math.sqrt(n)
        return Estimate(mean, mean - half, mean + half, n)

    def __str__(self) -> str:
        return f"{self.mean:.3g}" if math.isnan(self.low) else f"{self.mean:.3g} ({self.low:.2g} to {self.high:.2g})"

    @property
    def positive(self) -> bool:
        """Whether the interval lies above 0; with one seed, whether the value does."""
        return (self.mean if math.isnan(self.low) else self.low) > 0


@dataclass(frozen=True)
class Panel:
    """One set of axes."""

    title: str
    x: str
    y: str
    log_y: bool = False
    log_x: bool = False


@dataclass(frozen=True)
class Curve:
    """Points (x, estimate); ``paper`` are the authors' values, drawn as markers."""

    panel: int
    name: str
    points: list[tuple[float, Estimate]]
    paper: bool = False


@dataclass(frozen=True)
class Claim:
    """A value or a trend that the paper shows, beside ours.

    Attributes:
        rule: what decides the verdict.
    """

    what: str
    paper: str
    ours: str
    verdict: Verdict
    rule: str


@dataclass(frozen=True)
class Figure:
    """A figure of the report; ``notes`` say what was left out of it and why."""

    name: str
    title: str
    text: str
    panels: list[Panel]
    curves: list[Curve]
    claims: list[Claim]
    settings: str
    notes: list[str] = field(default_factory=list)


def curve(
    panel: int, name: str, results: Sequence[Mapping[str, Any]], rows: str, x: str, y: str, **where: Any
) -> Curve:
    """The mean over results of ``result[rows][...][y]`` against ``x``, of the rows where all of ``where`` holds."""
    values: dict[float, list[float]] = {}
    for result in results:
        for row in result[rows]:
            if all(row[key] == value for key, value in where.items()):
                values.setdefault(row[x], []).append(row[y])
    return Curve(panel, name, [(at, Estimate.of(found)) for at, found in sorted(values.items())])


def at(found: Curve, x: float) -> Estimate:
    """The estimate at ``x``, which the curve must have."""
    return next(estimate for where, estimate in found.points if where == x)


def authors(panel: int, name: str, points: Iterable[tuple[float, float]]) -> Curve:
    return Curve(panel, name, [(x, Estimate(y, math.nan, math.nan, 1)) for x, y in points], paper=True)


def value_claim(what: str, paper: float, ours: Estimate, *, factor: float, trend: bool | None = None) -> Claim:
    """Reproduced if the mean comes within a factor of the authors' value; else, ``trend`` decides.

    Args:
        factor: how far off counts as equal: values are read by eye off figures, settings are partly unknown.
        trend: whether the figure's direction holds; None if it has none.
    """
    equal = paper / factor <= ours.mean <= paper * factor
    verdict: Verdict = "reproduced" if equal else "in trend" if trend else "not reproduced"
    rule = f"mean within a factor of {factor:g}" + ("" if trend is None else "; else in trend if the direction holds")
    return Claim(what, f"{paper:g}", str(ours), verdict, rule)


def trend_claim(what: str, paper: str, ours: Estimate | str, holds: bool, rule: str) -> Claim:
    return Claim(what, paper, str(ours), "reproduced" if holds else "not reproduced", rule)


def pick(result: Mapping[str, Any], rows: str, score: str = "zero_one", **where: Any) -> float:
    """``score`` of the first row where all of ``where`` holds."""
    return next(row[score] for row in result[rows] if all(row[key] == value for key, value in where.items()))


def trace(found: Sequence[Mapping[str, Any]], group: str, name: str) -> list[tuple[float, Estimate]]:
    """(step, estimate) of ``trace[i][group][name]``."""
    steps = [row["step"] for row in found[0]["trace"]]
    return [(step, Estimate.of(r["trace"][i][group][name] for r in found)) for i, step in enumerate(steps)]


def settings_of(jobs: Sequence[Job]) -> str:
    """What all jobs have in common, and the seeds."""
    first = jobs[0].arguments
    common = [
        f"{name} = {value}"
        for name, value in first.items()
        if name not in ("seed", "checkpoint") and all(job.arguments.get(name) == value for job in jobs)
    ]
    seeds = sorted({job.arguments["seed"] for job in jobs if "seed" in job.arguments})
    return ", ".join(common) + (
        f"; seeds {', '.join(map(str, seeds[:6]))}{' ...' if len(seeds) > 6 else ''}" if seeds else ""
    )
