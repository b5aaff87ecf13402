"""The paper's figures by one command: trains its models, measures, and puts the authors' values beside ours.

``run(Settings(...))`` writes ``report.html``, and a PNG and a CSV per figure. Source: Li et al., ICML 2024.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import fasticl
from fasticl.stages import Stages

FIGURES = (
    "contexts",
    "alpha",
    "baselines",
    "attention",
    "norms",
    "neurons",
    "pruning",
    "pruning-alpha",
    "gpt2-3layer",
    "width",
    "search",
    "language-model",
    "time",
)


class ReproduceError(RuntimeError):
    """The run cannot be done as asked; the message says what to install or to change."""


@dataclass(frozen=True)
class Settings:
    """What to run; see ``fasticl reproduce --help``.

    Raises:
        ReproduceError: a figure is unknown, ``seeds`` is less than 1, or ``out`` is a file.
    """

    figures: tuple[str, ...] = ()  # none is all
    out: Path = Path("runs/reproduce")
    seeds: int | None = None  # None is 5, or 2 if quick
    quick: bool = False
    device: str = "cpu"
    workers: int | None = None
    ray: str | None = None
    model: Path | None = None

    def __post_init__(self) -> None:
        if unknown := [name for name in self.figures if name not in FIGURES]:
            raise ReproduceError(f"expected figures of {', '.join(FIGURES)}, got {', '.join(unknown)}")
        for name, value in (("--seeds", self.seeds), ("--workers", self.workers)):
            if value is not None and value < 1:
                raise ReproduceError(f"{name}: expected at least 1, got {value}")
        if self.out.exists() and not self.out.is_dir():
            raise ReproduceError(f"--out: expected a folder, got the file {self.out}")


def run(settings: Settings, console: Console) -> dict[str, Any]:
    """Runs what ``settings.out`` holds no result of, and writes the report.

    Returns:
        What ``results.json`` holds: every claim with its verdict, and ``"failures"``, empty if every figure was made.

    Raises:
        ReproduceError: a package or a model is missing. Found before any work is done.
    """
    names, left_out = _check_packages(settings)
    from fasticl.doctor import diagnose
    from fasticl.reproduce import plots, report
    from fasticl.reproduce.figures import SPECS
    from fasticl.reproduce.plan import NoResults, Plan, Results
    from fasticl.reproduce.results import Figure
    from fasticl.reproduce.runner import Job, Outcome, execute

    settings.out.mkdir(parents=True, exist_ok=True)
    work = settings.out / "jobs"
    plan = Plan(
        seeds=settings.seeds or (2 if settings.quick else 5),
        quick=settings.quick,
        device=settings.device,
        checkpoints=None if settings.ray else str(work.resolve()),
        model=None if settings.model is None else str(settings.model.resolve()),
    )
    results, failures, start = Results(), list(left_out), time.perf_counter()

    def together(title: str, jobs: Sequence[Job], workers: int | None = settings.workers) -> None:
        jobs = list(dict.fromkeys(jobs))
        if not jobs:
            return
        with stages.stage(f"{title}: {len(jobs)} jobs", total=len(jobs)) as advance:

            def finished(outcome: Outcome) -> None:
                if outcome.error is not None:
                    console.print(f"    {outcome.job.key}: {outcome.error}", style="red", markup=False, highlight=False)
                advance()

            results.outcomes |= execute(jobs, work, workers=workers, ray_address=settings.ray, finished=finished)

    with Stages(console) as stages:
        wanted = [SPECS[name] for name in names]
        alone = plan.time()  # measured while nothing else runs
        jobs = [job for spec in wanted for job in spec.jobs(plan) if job not in alone]
        # The longest first, so that no single one is left at the end.
        together(
            "train and measure",
            sorted(
                jobs, key=lambda job: job.function.endswith((":gpt2", ":language_model", ":baselines")), reverse=True
            ),
        )
        if any(spec.searches for spec in wanted):
            together("search on among the best", plan.finalists(results))
            together("confirm the search", plan.confirm(results))
        together("time inference", [job for spec in wanted for job in spec.jobs(plan) if job in alone], 1)
        figures: list[Figure] = []
        with stages.stage("write the report"):
            for spec in wanted:
                try:
                    figures.append(spec.make(plan, results))
                except NoResults as error:
                    failures.append(f"{spec.name}: no figure, for no job came to a result: {error}")
            for figure in figures:
                plots.write_csv(figure, settings.out / f"{figure.name}.csv")
                plots.write_png(figure, settings.out / f"{figure.name}.png")
            seconds = time.perf_counter() - start
            summary = {
                "fasticl": fasticl.__version__,
                "torch": torch.__version__,
                "cpu": diagnose()["cpu"]["model"],
                "quick": settings.quick,
                "seeds": plan.seeds,
                "seconds": seconds,
                "job_seconds": sum(outcome.seconds for outcome in results.outcomes.values()),
                "figures": {figure.name: [asdict(claim) for claim in figure.claims] for figure in figures},
                "failures": failures,
            }
            page = report.html(figures, failures, summary, settings.out)
            (settings.out / "report.html").write_text(page, encoding="utf-8")
            (settings.out / "results.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    return summary


def _check_packages(settings: Settings) -> tuple[list[str], list[str]]:
    """The figures to make, and what is left out of "all" for want of a language model."""
    from fasticl.demo import DemoError
    from fasticl.demo import Settings as DemoSettings
    from fasticl.demo.lm import check_packages

    packages = {"matplotlib": "matplotlib", "scikit-learn": "sklearn", "scipy": "scipy", "transformers": "transformers"}
    if settings.ray:
        packages["ray"] = "ray"
    if missing := [name for name, module in packages.items() if find_spec(module) is None]:
        extra = "reproduce,ray" if settings.ray else "reproduce"
        raise ReproduceError(f"reproducing the paper needs {', '.join(missing)}: pip install 'fasticl[{extra}]'")
    names = list(settings.figures or FIGURES)
    if "language-model" in names:
        try:
            check_packages(DemoSettings(model=settings.model))
        except DemoError as error:
            if settings.figures:
                raise ReproduceError(str(error)) from error
            names.remove("language-model")
            return names, [f"language-model: left out, {error}"]
    return names, []
