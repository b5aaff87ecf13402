"""Which jobs a run consists of, in its quick and its full size, and what came of them."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fasticl.reproduce.runner import Job, Outcome

_JOBS = "fasticl.reproduce.jobs"


class NoResults(RuntimeError):
    """No job that a figure needs came to a result; the message says what each of them did instead."""


@dataclass
class Results:
    """Outcomes of jobs, by job."""

    outcomes: dict[Job, Outcome] = field(default_factory=dict)

    def good(self, jobs: Sequence[Job]) -> tuple[list[Any], list[str]]:
        """Results of the jobs that succeeded with a model that learned, and a note on each of the others.

        Raises:
            NoResults: there is none.
        """
        results, notes = [], []
        for job in jobs:
            outcome = self.outcomes[job]
            seed = job.arguments.get("seed")
            if outcome.error is not None:
                notes.append(f"left out: {job.function.rpartition(':')[2]}, seed {seed}: {outcome.error}")
            elif outcome.result.get("at_chance"):
                notes.append(f"left out: {job.function.rpartition(':')[2]}, seed {seed}: training stayed at chance")
            else:
                results.append(outcome.result)
        if jobs and not results:
            raise NoResults("; ".join(notes))
        return results, notes

    def confirmed(self, plan: Plan) -> list[Any]:
        """Results of the search's best settings on fresh seeds; empty before they ran."""
        jobs = plan.confirm(self)
        return self.good(jobs)[0] if jobs and all(job in self.outcomes for job in jobs) else []


@dataclass(frozen=True)
class Found:
    """One setting of the search: mean distance to the authors' errors in decades, our errors, its seeds' results."""

    distance: float
    settings: Mapping[str, Any]
    errors: list[float]
    results: list[Any]


@dataclass(frozen=True)
class Plan:
    """Jobs by what they are for.

    Attributes:
        seeds: of each setting.
        quick: smaller models, fewer prompts; shows that all works.
        device: where models are trained and measured.
        checkpoints: a folder for trainings that take minutes, or None.
        model: folder of a Hugging Face causal language model; None is SmolLM2-135M-Instruct.
    """

    seeds: int = 5
    quick: bool = False
    device: str = "cpu"
    checkpoints: str | None = None
    model: str | None = None

    kappas = (0.5, 1.5)  # the paper's, and three times the noise
    target: Mapping[str, float] = field(
        default_factory=lambda: {
            "0/1 error, unpruned": 0.007,
            "0/1 error, 16 % by magnitude": 0.0062,
            "0/1 error, 40 % by magnitude": 0.030,
            "0/1 error, 40 % at random": 0.045,
        },
        init=False,
    )
    ranges: Mapping[str, Sequence[float]] = field(
        default_factory=lambda: {
            "m": (16, 32, 64, 128),
            "xi": (0.02, 0.05, 0.1, 0.3),
            "kappa": (0.5, 1.0, 1.5, 2.0),
            "label_noise": (0.0, 0.1),
            "tasks_per_pattern": (1, 3),
            "stop_below": (0.5, 0.3, 0.1, 0.03, 0.0),
            "ood_patterns": (3, 4),  # M1'; at S1 = 1.2 five orthogonal ones are impossible
            "alpha": (0.3, 0.4, 0.5, 0.6),  # alpha' of the test prompts
        },
        init=False,
    )

    def _seeded(
        self, function: str, places: dict[str, Any] | None = None, seeds: int | None = None, **arguments: Any
    ) -> list[Job]:
        return [
            Job(f"{_JOBS}:{function}", {"seed": seed, **arguments, "device": self.device}, places or {})
            for seed in range(seeds or self.seeds)
        ]

    def one_layer(self) -> list[Job]:
        """The recipe's model."""
        rates = sorted({*(i / 20 for i in range(20)), 0.16})
        return self._seeded(
            "one_layer",
            m=64 if self.quick else 256,
            steps=400,
            lengths=[1, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20],
            rates=rates,
            n=1000 if self.quick else 10_000,
        )

    def baselines(self, kappa: float) -> list[Job]:
        return self._seeded(
            "baselines",
            m=64,
            steps=800,
            kappa=kappa,
            alphas=[0.6, 0.8],
            lengths=[6, 20] if self.quick else [6, 10, 14, 20],
            n=100 if self.quick else 1000,
        )

    def gpt2(self, kappa: float = 0.5) -> list[Job]:
        """At the paper's kappa twice the seeds, for errors of GPT-2 differ by orders of magnitude between them."""
        return self._seeded(
            "gpt2",
            {"checkpoint": self.checkpoints},
            seeds=self.seeds * (2 if kappa == self.kappas[0] else 1),
            steps=100 if self.quick else 1000,
            kappa=kappa,
            lr=3e-4,
            batch=64,
            lengths=[1, 2, 4, 6, 8, 10, 14, 20],
            n=500 if self.quick else 2000,
        )

    @property
    def widths(self) -> tuple[int, ...]:
        return (16, 32, 64) if self.quick else (16, 32, 64, 128, 256, 512)

    @property
    def M1s(self) -> tuple[int, ...]:
        return (4, 6) if self.quick else (4, 6, 8, 12)

    @property
    def M2s(self) -> tuple[int, ...]:
        return (12, 24) if self.quick else (6, 12, 24, 48)

    def theorem(self, *, m: int = 64, M1: int = 6, M2: int = 24) -> list[Job]:
        return self._seeded(
            "theorem", m=m, M1=M1, M2=M2, steps=2000, rates=[i / 50 for i in range(50)], n=500 if self.quick else 4000
        )

    def all_theorem(self) -> list[Job]:
        return [
            *(job for m in self.widths for job in self.theorem(m=m)),
            *(job for M1 in self.M1s for job in self.theorem(M1=M1)),
            *(job for M2 in self.M2s for job in self.theorem(M2=M2)),
        ]

    def search(self) -> list[Job]:
        """Settings drawn at random from ``ranges``, two seeds each."""
        rng = random.Random(0)
        drawn = [{name: rng.choice(values) for name, values in self.ranges.items()} for _ in range(self.budget)]
        return [self._regime(settings, 1000 + 2 * i + k) for i, settings in enumerate(drawn) for k in range(2)]

    @property
    def budget(self) -> int:
        """Settings that the search tries."""
        return 4 if self.quick else 120

    def finalists(self, results: Results) -> list[Job]:
        """The best settings again, on more seeds: the best of many that two seeds show is lucky too."""
        count, seeds = (2, 2) if self.quick else (8, 6)
        return [
            self._regime({name: entry.settings[name] for name in self.ranges}, 3000 + seeds * i + k)
            for i, entry in enumerate(self.ranked(results)[:count])
            for k in range(seeds)
        ]

    def confirm(self, results: Results) -> list[Job]:
        """The best settings of the search on seeds that it did not use; none without a search."""
        ranked = self.ranked(results, final=True)
        if not ranked:
            return []
        best = {name: ranked[0].settings[name] for name in self.ranges}
        return [self._regime(best, 5000 + seed, [0.6, 0.8, 1.0]) for seed in range(2 * self.seeds)]

    def _regime(self, settings: Mapping[str, float], seed: int, alphas: Sequence[float] = ()) -> Job:
        rates = [0.0, 0.05, 0.1, 0.16, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.6, 0.7, 0.8]
        alphas = sorted({settings["alpha"], *alphas})
        sizes = {"alphas": alphas, "rates": rates, "n": 1000 if self.quick else 10_000, "steps": 800}
        return Job(f"{_JOBS}:regime", {"seed": seed, **settings, **sizes, "device": self.device})

    def ranked(self, results: Results, *, final: bool = False) -> list[Found]:
        """What the search found, closest to the authors' curve first; settings with a seed that failed are left out.

        ``final``: of the finalists alone, by all their seeds.
        """
        runs: dict[tuple[float, ...], list[Job]] = {}
        for job in self.search():
            runs.setdefault(self._drawn(job), []).append(job)
        if final:
            last = self.finalists(results)
            runs = {drawn: runs[drawn] for drawn in map(self._drawn, last)}
            for job in last:
                runs[self._drawn(job)].append(job)
        found = []
        for jobs in runs.values():
            outcomes = [results.outcomes.get(job) for job in jobs]
            good = [o.result for o in outcomes if o is not None and o.error is None and not o.result["at_chance"]]
            if len(good) < len(jobs):
                continue
            errors = [sum(values) / len(values) for values in zip(*map(self.four_errors, good), strict=True)]
            ratios = (max(ours, 1e-4) / theirs for ours, theirs in zip(errors, self.target.values(), strict=True))
            distance = sum(abs(math.log10(ratio)) for ratio in ratios) / len(self.target)
            found.append(Found(distance, jobs[0].arguments, errors, good))
        return sorted(found, key=lambda entry: entry.distance)

    def _drawn(self, job: Job) -> tuple[float, ...]:
        return tuple(job.arguments[name] for name in self.ranges)

    @staticmethod
    def four_errors(result: Mapping[str, Any]) -> list[float]:
        """OOD 0/1 errors at the setting's alpha' in the order of ``target``."""
        rows = {
            (row["order"], row["rate"]): row["zero_one"]
            for row in result["pruning"]
            if row["domain"] == "out_of_domain" and row["alpha"] == result["alpha"]
        }
        return [rows[key] for key in (("W_O W_V", 0.0), ("W_O W_V", 0.16), ("W_O W_V", 0.4), ("random", 0.4))]

    def language_model(self) -> list[Job]:
        sizes = {"rates": [0.0, 0.5], "prompts": 20, "attention_prompts": 5, "windows": 2}
        if not self.quick:
            sizes = {
                "rates": [0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5],
                "prompts": 200,
                "attention_prompts": 50,
                "windows": 16,
            }
        return [Job(f"{_JOBS}:language_model", {"seed": 0, "model": self.model, **sizes, "device": self.device})]

    def time(self) -> list[Job]:
        return [
            Job(
                f"{_JOBS}:time",
                {
                    "seed": 0,
                    "m": 256,
                    "rates": [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9],
                    "seconds": 1.0 if self.quick else 10.0,
                    "device": self.device,
                },
            )
        ]
