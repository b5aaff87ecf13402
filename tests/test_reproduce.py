"""Reproducing the paper: the runner against crashes, verdicts against numbers, and one small run of everything."""

from __future__ import annotations

import csv
import json
import math
import os
import re
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from fasticl import reproduce
from fasticl.cli import app
from fasticl.reproduce import FIGURES, ReproduceError, Settings, plan
from fasticl.reproduce.plan import NoResults, Plan, Results
from fasticl.reproduce.results import Curve, Estimate, Figure, Panel, curve, pick, trend_claim, value_claim
from fasticl.reproduce.runner import Job, Outcome, execute

# What workers run. They find it by name: pytest's path to this folder goes with them.


def add(a: int, b: int) -> int:
    return a + b


def note(folder: str, name: str) -> int:
    """Leaves a trace of each run."""
    (Path(folder) / f"{name}.{len(list(Path(folder).iterdir()))}").touch()
    return torch.get_num_threads()


def boom() -> None:
    raise ValueError("no such pattern")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def job(name: str, /, **arguments: Any) -> Job:
    return Job(f"{__name__}:{name}", arguments)


@pytest.mark.parametrize("ray_address", [None, "local"], ids=["processes", "ray"])
def test_runner_keeps_what_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ray_address: str | None) -> None:
    """One job raises, one is killed: the others' results are kept, and only the two are run again."""
    if ray_address:
        pytest.importorskip("ray")
        monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))  # Ray's workers do not inherit pytest's path
    traces, work = tmp_path / "traces", tmp_path / "work"
    traces.mkdir()
    jobs = [
        job("note", folder=str(traces), name="first"),
        job("boom"),
        *([] if ray_address else [job("die")]),  # Ray starts it again, each time after a pause
        job("add", a=2, b=3),
        job("note", folder=str(traces), name="last"),
    ]
    seen: list[Outcome] = []
    outcomes = execute([*jobs, jobs[0]], work, workers=2, ray_address=ray_address, finished=seen.append)
    assert set(outcomes) == set(jobs)
    assert sorted(map(repr, seen)) == sorted(map(repr, outcomes.values()))
    assert outcomes[jobs[0]].result == outcomes[jobs[-1]].result == 1  # a thread of its own, no more
    assert outcomes[job("add", a=2, b=3)].result == 5
    assert outcomes[job("boom")].error == "ValueError: no such pattern"
    if not ray_address:
        assert outcomes[job("die")].error == "its process ended with exit code -9"
    assert len(list(traces.iterdir())) == 2
    assert len(list(work.glob("*.json"))) == 3
    assert [path for path in work.iterdir() if path.suffix != ".json"] == []

    again = execute(jobs, work, workers=2, ray_address=ray_address)
    assert len(list(traces.iterdir())) == 2
    for each in jobs:
        assert again[each].result == outcomes[each].result
        assert again[each].error == outcomes[each].error


def test_runner_distrusts_broken_files(tmp_path: Path) -> None:
    each = job("add", a=1, b=1)
    execute([each], tmp_path)
    (file,) = tmp_path.iterdir()
    for broken in ("", "{", "[]", '{"seconds": 1}'):
        file.write_text(broken)
        assert execute([each], tmp_path)[each].result == 2
        assert json.loads(file.read_text())["result"] == 2


def test_job_keys_tell_arguments_and_code_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = job("add", a=1, b=2), job("add", a=1, b=3)
    assert one.key != other.key
    assert one.key == job("add", b=2, a=1).key
    assert one == Job(one.function, one.arguments, {"folder": "elsewhere"})
    assert one.key == Job(one.function, one.arguments, {"folder": "elsewhere"}).key
    before = one.key
    monkeypatch.setattr("fasticl.reproduce.runner._code", lambda function: "other code")
    assert one.key != before


def test_ray_missing_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"pip install 'fasticl\[ray\]'"):
        execute([job("add", a=1, b=1)], tmp_path, ray_address="local")


# Estimates and verdicts


def test_estimate_is_a_t_interval() -> None:
    found = Estimate.of([1.0, 2.0, 3.0])
    half = 4.302652729911275 / math.sqrt(3)  # 97.5 % of Student's t with two degrees of freedom; deviation 1
    assert (found.mean, found.n) == (2.0, 3)
    assert (found.low, found.high) == pytest.approx((2 - half, 2 + half))
    assert not found.positive
    assert Estimate.of([1.0, 1.1, 1.2]).positive
    alone = Estimate.of([0.5])
    assert math.isnan(alone.low)
    assert alone.positive
    assert str(alone) == "0.5"


@pytest.mark.parametrize(
    ("paper", "ours", "trend", "verdict"),
    [
        (0.01, 0.019, None, "reproduced"),
        (0.01, 0.0051, None, "reproduced"),
        (0.01, 0.021, None, "not reproduced"),
        (0.01, 0.0, None, "not reproduced"),
        (0.01, 0.0, True, "in trend"),
        (0.01, 0.0, False, "not reproduced"),
    ],
)
def test_verdict_on_a_value(paper: float, ours: float, trend: bool | None, verdict: str) -> None:
    """The mean decides: an interval so wide that it holds every value would else reproduce all of them."""
    estimate = Estimate(ours, ours - 1, ours + 1, 2)
    assert value_claim("error", paper, estimate, factor=2, trend=trend).verdict == verdict


def test_verdict_on_a_trend() -> None:
    assert trend_claim("falls", "yes", "0.1", True, "").verdict == "reproduced"
    assert trend_claim("falls", "yes", "0.1", False, "").verdict == "not reproduced"


def test_curves_average_the_rows_that_match() -> None:
    results = [
        {"rows": [{"x": 2, "y": 1.0, "kind": "a"}, {"x": 1, "y": 5.0, "kind": "a"}, {"x": 1, "y": 9.0, "kind": "b"}]},
        {"rows": [{"x": 2, "y": 3.0, "kind": "a"}, {"x": 1, "y": 6.0, "kind": "a"}]},
    ]
    found = curve(0, "a", results, "rows", "x", "y", kind="a")
    assert [(x, e.mean, e.n) for x, e in found.points] == [(1, 5.5, 2), (2, 2.0, 2)]
    assert pick(results[0], "rows", "y", x=1, kind="b") == 9.0


def test_trainings_that_failed_are_named_and_never_averaged() -> None:
    jobs = [Job("m:one_layer", {"seed": seed}) for seed in range(4)]
    results = Results(
        {
            jobs[0]: Outcome(jobs[0], 1.0, {"at_chance": False, "value": 1}),
            jobs[1]: Outcome(jobs[1], 1.0, {"at_chance": True, "value": 100}),
            jobs[2]: Outcome(jobs[2], 1.0, error="FloatingPointError: training diverged: the loss is nan"),
            jobs[3]: Outcome(jobs[3], 1.0, {"value": 2}),
        }
    )
    found, notes = results.good(jobs)
    assert [result["value"] for result in found] == [1, 2]
    assert notes == [
        "left out: one_layer, seed 1: training stayed at chance",
        "left out: one_layer, seed 2: FloatingPointError: training diverged: the loss is nan",
    ]
    with pytest.raises(NoResults, match=r"seed 1: training stayed at chance; .*seed 2: FloatingPointError"):
        results.good(jobs[1:3])


def test_search_ranks_by_distance_to_the_authors() -> None:
    """Settings whose errors are the authors' come first, a failed seed leaves one out, and more seeds decide."""
    tiny = Plan(seeds=1, quick=True)
    jobs, outcomes = tiny.search(), dict[Job, Outcome]()
    assert len(jobs) == 2 * tiny.budget

    def run(job: Job, factor: float, at_chance: bool = False) -> None:
        """Its errors are the authors' times ``factor``."""
        keys = (("W_O W_V", 0.0), ("W_O W_V", 0.16), ("W_O W_V", 0.4), ("random", 0.4))
        where = {"alpha": job.arguments["alpha"], "domain": "out_of_domain"}
        rows = [
            {"order": order, "rate": rate, **where, "zero_one": error * factor}
            for (order, rate), error in zip(keys, tiny.target.values(), strict=True)
        ]
        result = {"at_chance": at_chance, "alpha": job.arguments["alpha"], "pruning": rows}
        outcomes[job] = Outcome(job, 1.0, result)

    for i, job in enumerate(jobs):
        factor = (10.0, 1.0, 3.0, 1.0)[i // 2] * (1.5 if i % 2 else 0.5)  # seeds that average to it
        run(job, factor, at_chance=i == 7)
    ranked = tiny.ranked(Results(outcomes))
    assert [entry.settings["seed"] for entry in ranked] == [1002, 1004, 1000]
    assert [entry.distance for entry in ranked] == pytest.approx([0, math.log10(3), 1])
    assert tiny.confirm(Results(outcomes)) == []  # the finalists have not run

    def settings(job: Job) -> dict[str, Any]:
        return {name: job.arguments[name] for name in tiny.ranges}

    finalists = tiny.finalists(Results(outcomes))
    assert [settings(job) for job in finalists] == [settings(jobs[i]) for i in (2, 2, 4, 4)]
    for job, factor in zip(finalists, (9.0, 9.0, 0.5, 0.5), strict=True):  # with the two before: 5 and 1.75
        run(job, factor)
    ranked = tiny.ranked(Results(outcomes), final=True)
    assert [entry.settings["seed"] for entry in ranked] == [1004, 1002]
    assert [entry.distance for entry in ranked] == pytest.approx([math.log10(1.75), math.log10(5)])
    confirm = tiny.confirm(Results(outcomes))
    assert [settings(job) for job in confirm] == [settings(jobs[4])] * 2
    seeds = [{job.arguments["seed"] for job in stage} for stage in (jobs, finalists, confirm)]
    assert len(set.union(*seeds)) == sum(map(len, seeds))


# All of it, small


class TinyPlan(Plan):
    """Sizes that train, and no more."""

    kappas = (0.5, 1.5)
    widths, M1s, M2s, budget = (8, 16), (4, 6), (6, 24), 2  # type: ignore[assignment]

    def one_layer(self) -> list[Job]:
        rates = [0.0, 0.16, 0.4]
        return self._seeded("one_layer", m=32, steps=420, lengths=[1, 4, 6, 20], rates=rates, n=50)

    def baselines(self, kappa: float) -> list[Job]:
        return self._seeded("baselines", m=32, steps=500, kappa=kappa, alphas=[0.6, 0.8], lengths=[6, 20], n=10)

    def gpt2(self, kappa: float = 0.5) -> list[Job]:
        places = {"checkpoint": self.checkpoints}
        return self._seeded("gpt2", places, None, steps=60, kappa=kappa, lr=1e-3, batch=64, lengths=[4, 20], n=20)

    def theorem(self, *, m: int = 16, M1: int = 6, M2: int = 24) -> list[Job]:
        return self._seeded("theorem", m=m, M1=M1, M2=M2, steps=900, rates=[0.0, 0.2, 0.5], n=50)

    def _regime(self, settings: Any, seed: int, alphas: Sequence[float] = ()) -> Job:
        easy = {"m": 32, "xi": 0.1, "kappa": 0.5, "label_noise": 0.0, "tasks_per_pattern": 3, "stop_below": 0.3}
        test = {"ood_patterns": 4, "alpha": 0.5, "alphas": [0.5, *alphas]}
        sizes = {**test, "rates": [0.0, 0.16, 0.4], "n": 50, "steps": 500}
        return Job(f"{plan._JOBS}:regime", {"seed": seed, **easy, **sizes, "device": self.device})

    def time(self) -> list[Job]:
        return [Job(f"{plan._JOBS}:time", {"seed": 0, "m": 32, "rates": [0.0, 0.9], "seconds": 0.1})]


@pytest.mark.slow
def test_every_figure_is_made_and_nothing_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("matplotlib", "scipy", "sklearn", "transformers"):
        pytest.importorskip(package)
    monkeypatch.setattr(plan, "Plan", TinyPlan)
    monkeypatch.setattr("fasticl.reproduce.plan.Plan.language_model", lambda self: [])
    figures = tuple(name for name in FIGURES if name != "language-model")  # its measurements have tests of their own
    settings = Settings(figures, out=tmp_path / "run", seeds=1)
    found = reproduce.run(settings, Console(quiet=True))
    assert found["failures"] == []
    assert tuple(found["figures"]) == figures
    page = (settings.out / "report.html").read_text()
    for name, claims in found["figures"].items():
        assert claims
        assert {claim["verdict"] for claim in claims} <= {"reproduced", "in trend", "not reproduced"}
        assert f'id="{name}"' in page
        assert (settings.out / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
        with (settings.out / f"{name}.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert {row["source"] for row in rows} <= {"fasticl", "authors"}
        assert all(math.isfinite(float(row["mean"])) for row in rows)
    assert json.loads((settings.out / "results.json").read_text())["figures"] == found["figures"]

    assert {path.suffix for path in (settings.out / "jobs").iterdir()} == {".json"}  # no checkpoint is left
    jobs = {path: path.stat().st_mtime_ns for path in (settings.out / "jobs").glob("*.json")}
    again = reproduce.run(settings, Console(quiet=True))
    assert again["figures"] == found["figures"]
    assert {path: path.stat().st_mtime_ns for path in (settings.out / "jobs").glob("*.json")} == jobs

    next(path for path in jobs if path.name.startswith("one_layer")).unlink()  # is made again, and is the same
    alone = Settings(("attention",), out=settings.out, seeds=1)
    assert reproduce.run(alone, Console(quiet=True))["figures"]["attention"] == found["figures"]["attention"]


def test_a_figure_without_results_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    pytest.importorskip("sklearn")
    pytest.importorskip("transformers")
    broken = Job(f"{__name__}:boom", {})
    monkeypatch.setattr(Plan, "one_layer", lambda self: [broken])
    found = reproduce.run(Settings(("norms",), out=tmp_path, seeds=1), Console(quiet=True))
    assert found["figures"] == {}
    (failure,) = found["failures"]
    assert failure.startswith("norms: no figure, for no job came to a result: left out: boom")
    assert "ValueError: no such pattern" in failure
    assert failure.split(":")[0] in (tmp_path / "report.html").read_text()


def test_figures_are_drawn_with_their_zeros_and_without_intervals(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from fasticl.reproduce.plots import write_csv, write_png

    one = Estimate(0.1, math.nan, math.nan, 1)
    figure = Figure(
        "zero",
        "Zero",
        "",
        [Panel("errors", "x", "y", log_y=True)],
        [Curve(0, "ours", [(1, one), (2, Estimate(0.0, 0.0, 0.0, 3))])],
        [],
        "",
    )
    write_png(figure, tmp_path / "zero.png")
    write_csv(figure, tmp_path / "zero.csv")
    assert (tmp_path / "zero.csv").read_text().splitlines() == [
        "panel,curve,x,mean,low,high,n,source",
        "errors,ours,1,0.1,,,1,fasticl",
        "errors,ours,2,0,0,0,3,fasticl",
    ]


# The command


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pruned"], "expected figures of contexts, alpha, .*got pruned"),
        (["--out", __file__], "--out: expected a folder, got the file"),
    ],
)
def test_command_refuses(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["reproduce", *arguments])
    assert result.exit_code == 1
    assert re.search(message, result.stderr.replace("\n", " "))


@pytest.mark.parametrize("arguments", [["--seeds", "0"], ["--workers", "0"], ["--device", "cuda:77"]])
def test_command_refuses_values(arguments: list[str]) -> None:
    assert CliRunner().invoke(app, ["reproduce", *arguments]).exit_code == 2


def test_missing_packages_are_named_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reproduce, "find_spec", lambda name: None if name in ("sklearn", "ray") else object())
    with pytest.raises(ReproduceError, match=r"needs scikit-learn, ray: pip install 'fasticl\[reproduce,ray\]'"):
        reproduce.run(Settings(("norms",), out=tmp_path / "run", ray="local"), Console(quiet=True))
    assert not (tmp_path / "run").exists()


def test_language_model_is_left_out_of_all_and_said_so(monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("matplotlib", "scipy", "sklearn", "transformers"):
        pytest.importorskip(package)
    monkeypatch.setattr("fasticl.demo.lm._bundled_model", lambda: (_ for _ in ()).throw(reproduce_error()))
    names, left_out = reproduce._check_packages(Settings())
    assert "language-model" not in names
    assert len(names) == len(FIGURES) - 1
    assert left_out == ["language-model: left out, not installed"]
    with pytest.raises(ReproduceError, match="not installed"):
        reproduce._check_packages(Settings(("language-model",)))


def reproduce_error() -> Exception:
    from fasticl.demo import DemoError

    return DemoError("not installed")
