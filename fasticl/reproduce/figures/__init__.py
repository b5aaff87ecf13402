"""The paper's figures, and ours: which jobs each needs, its curves, and the verdict on each of its claims.

Authors' values are read by eye off the figures of Li et al., ICML 2024.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fasticl.reproduce.figures.beyond import language_model, time
from fasticl.reproduce.figures.generalization import alpha, baselines, contexts
from fasticl.reproduce.figures.mechanism import attention, gpt2_3layer, neurons, norms
from fasticl.reproduce.figures.pruned import pruning, pruning_alpha, search, width
from fasticl.reproduce.plan import Plan, Results
from fasticl.reproduce.results import Figure
from fasticl.reproduce.runner import Job


@dataclass(frozen=True)
class Spec:
    """A figure's name on the command line, the jobs it needs, and how it is made of their results."""

    name: str
    jobs: Callable[[Plan], list[Job]]
    make: Callable[[Plan, Results], Figure]
    searches: bool = False  # it shows what the search found: its finalists and their confirmation follow those jobs


SPECS = {
    spec.name: spec
    for spec in (
        Spec("contexts", lambda plan: [*plan.one_layer(), *plan.gpt2(), *plan.gpt2(plan.kappas[1])], contexts),
        Spec("alpha", lambda plan: plan.one_layer(), alpha),
        Spec(
            "baselines",
            lambda plan: [job for kappa in plan.kappas for job in plan.baselines(kappa)],
            baselines,
        ),
        Spec("attention", lambda plan: plan.one_layer(), attention),
        Spec("norms", lambda plan: plan.one_layer(), norms),
        Spec("neurons", lambda plan: plan.one_layer(), neurons),
        Spec("pruning", lambda plan: plan.one_layer() + plan.search(), pruning, searches=True),
        Spec("pruning-alpha", lambda plan: plan.one_layer() + plan.search(), pruning_alpha, searches=True),
        Spec("gpt2-3layer", lambda plan: plan.gpt2(), gpt2_3layer),
        Spec("width", lambda plan: plan.all_theorem(), width),
        Spec("search", lambda plan: plan.search(), search, searches=True),
        Spec("language-model", lambda plan: plan.language_model(), language_model),
        Spec("time", lambda plan: plan.time(), time),
    )
}
