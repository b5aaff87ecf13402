"""The paper's figures, and ours: which jobs each needs, its curves, and the verdict on each of its claims.

Authors' values are read by eye from the figures of Li et al., ICML 2024.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from fasticl.reproduce.plan import Plan, Results
from fasticl.reproduce.results import (
    Claim,
    Curve,
    Estimate,
    Figure,
    Panel,
    at,
    authors,
    curve,
    trend_claim,
    value_claim,
)
from fasticl.reproduce.runner import Job

ONE_LAYER = "One-layer model, recipe settings: kappa = 1/2, W_O small (xi = 0.02), plain SGD."
PRUNING_ORDERS = ("W_O W_V", "W_O", "random", "largest first", "small, then random")


@dataclass(frozen=True)
class Spec:
    """A figure's name on the command line, the jobs it needs, and how it is made of their results."""

    name: str
    jobs: Callable[[Plan], list[Job]]
    make: Callable[[Plan, Results], Figure]
    then: Callable[[Plan, Results], list[Job]] = lambda plan, results: []  # after those, from their results


def contexts(plan: Plan, results: Results) -> Figure:
    found, notes = results.good(plan.gpt2())
    noisy, left_out = results.good(plan.gpt2(plan.kappas[1]))
    paper = {0.5: 0.045, 0.7: 0.025, 0.9: 0.014, 1.1: 0.0035, 1.3: 0.002}
    curves = [curve(0, f"S1 = {S1:g}", found, "errors", "length", "zero_one", S1=S1) for S1 in paper]
    last = [at(line, 20) for line in curves]
    falls = [
        Estimate.of(_pick(r, "errors", S1=S1, length=4) - _pick(r, "errors", S1=S1, length=20) for r in found)
        for S1 in paper
    ]
    over_S1 = Estimate.of(_pick(r, "errors", S1=0.5, length=20) - _pick(r, "errors", S1=1.3, length=20) for r in found)
    claims = [
        trend_claim(
            "error falls with the context's length, at every S1",
            "yes",
            f"error at l = 4 less that at 20: {', '.join(str(fall) for fall in falls)}",
            all(fall.positive for fall in falls),
            "each difference's interval above 0",
        ),
        trend_claim(
            "error falls with S1, at l = 20",
            "0.045 to 0.002",
            f"S1 = 0.5 less S1 = 1.3: {over_S1}",
            over_S1.positive,
            "the difference's interval above 0",
        ),
    ]
    claims += [
        value_claim(f"error at l = 20, S1 = {S1:g}", value, ours, factor=2, trend=over_S1.positive)
        for (S1, value), ours in zip(paper.items(), last, strict=True)
    ]
    return Figure(
        "contexts",
        "Error over the number of contexts, GPT-2",
        "A 3-layer, 2-head GPT-2 on patterns that training never saw, mu'_j = sum k_ji mu_i with sum k_ji = S1. The theory "
        "asks for S1 >= 1.",
        [Panel("out of domain, alpha' = 0.8", "contexts l", "0/1 error", log_y=True)],
        [*curves, authors(0, "authors, l = 20", [(20, value) for value in paper.values()])],
        claims,
        _settings(plan.gpt2()),
        notes,
    )


def alpha(plan: Plan, results: Results) -> Figure:
    found, notes = results.good(plan.one_layer())
    paper = {"in_domain": {0.8: 0.07, 0.9: 0.055, 1.0: 0.02}, "out_of_domain": {0.8: 0.07, 0.9: 0.04, 1.0: 0.01}}
    names = {"in_domain": "in domain", "out_of_domain": "out of domain"}
    curves, claims = [], []
    for panel, (domain, values) in enumerate(paper.items()):
        for rate in (0.4, 0.6, *values):
            curves.append(
                curve(panel, f"alpha' = {rate:g}", found, "contexts", "length", "zero_one", alpha=rate, domain=domain)
            )
        curves.append(authors(panel, "authors, l = 20", [(20, value) for value in values.values()]))
        lower = Estimate.of(
            _pick(r, "contexts", alpha=0.8, domain=domain, length=6)
            - _pick(r, "contexts", alpha=1.0, domain=domain, length=6)
            for r in found
        )
        claims.append(
            trend_claim(
                f"{names[domain]}: error falls with alpha'",
                "yes",
                f"at l = 6, alpha' = 0.8 less 1: {lower}",
                lower.positive,
                "the difference's interval above 0; at l = 6, where both can be told from 0",
            )
        )
        claims += [
            value_claim(
                f"{names[domain]}: error at l = 20, alpha' = {rate:g}",
                value,
                Estimate.of(_pick(r, "contexts", alpha=rate, domain=domain, length=20) for r in found),
                factor=2,
                trend=lower.positive,
            )
            for rate, value in values.items()
        ]
    needed = {}
    for rate in (0.4, 0.6, 0.8, 1.0):
        needed[rate] = Estimate.of(_crossing(r, rate, 0.01) for r in found)
    product = {rate: Estimate(e.mean * rate, e.low * rate, e.high * rate, e.n) for rate, e in needed.items()}
    spread = max(e.mean for e in product.values()) / min(e.mean for e in product.values())
    claims.append(
        trend_claim(
            "contexts needed for 1 % error, out of domain, are of order 1/alpha'",
            "theorem 1 and 2",
            "l at alpha': " + ", ".join(f"{e.mean:.1f} at {rate:g}" for rate, e in needed.items()),
            spread < 1.5,
            "l alpha' constant to a factor of 1.5",
        )
    )
    return Figure(
        "alpha",
        "Error over the number of contexts and alpha'",
        "alpha' is the share of a test prompt's contexts that carry one of the task's two patterns; training had 0.8.",
        [Panel(f"{name}", "contexts l", "0/1 error", log_y=True) for name in names.values()],
        curves,
        claims,
        ONE_LAYER + " " + _settings(plan.one_layer()),
        notes,
    )


def baselines(plan: Plan, results: Results) -> Figure:
    paper = {"ICL": 0.0015, "logistic": 0.0035, "1-NN": 0.007, "3-NN": 0.009, "RBF SVM": 0.014, "linear SVM": 0.035}
    curves: list[Curve] = []
    claims: list[Claim] = []
    notes: list[str] = []
    panels: list[Panel] = []
    for kappa in plan.kappas:
        found, left_out = results.good(plan.baselines(kappa))
        notes += left_out
        for rate in (0.6, 0.8):
            panel = len(panels)
            panels.append(Panel(f"kappa = {kappa:g}, alpha' = {rate:g}", "contexts l", "0/1 error", log_y=True))
            curves += [
                curve(panel, name, found, "rows", "length", "zero_one", learner=name, alpha=rate) for name in paper
            ]
            if rate == 0.6:
                curves.append(authors(panel, "authors, l = 20", [(20, value) for value in paper.values()]))
        error = {name: [_pick(r, "rows", learner=name, alpha=0.6, length=20) for r in found] for name in paper}
        for name in list(paper)[1:]:
            more = Estimate.of(theirs - ours for theirs, ours in zip(error[name], error["ICL"], strict=True))
            claims.append(
                trend_claim(
                    f"kappa = {kappa:g}: ICL beats {name} (l = 20, alpha' = 0.6)",
                    f"{paper['ICL']:g} against {paper[name]:g}",
                    f"{Estimate.of(error['ICL'])} against {Estimate.of(error[name])}",
                    more.positive,
                    "the difference's interval above 0",
                )
            )
        claims += [
            value_claim(f"kappa = {kappa:g}: error of {name}", value, Estimate.of(error[name]), factor=2)
            for name, value in paper.items()
        ]
    return Figure(
        "baselines",
        "In-context learning against classical learners",
        "Each learner is fitted to the context of each prompt alone; patterns are out of domain. The data model says "
        "kappa = 1/2, where no noise can move an input closer to a wrong pattern than to its own: 1-NN then errs only "
        "where the context lacks the query's pattern, and nothing can beat it by much. Three times the noise is shown beside it.",
        panels,
        curves,
        claims,
        "One-layer model trained at the same kappa. " + _settings(plan.baselines(plan.kappas[0])),
        notes,
    )


def attention(plan: Plan, results: Results) -> Figure:
    found, notes = results.good(plan.one_layer())
    curves = [
        Curve(0, name, _trace(found, "attention", domain))
        for domain, name in (("in_domain", "in domain"), ("out_of_domain", "out of domain"))
    ]
    first, last = curves[1].points[0][1], curves[1].points[-1][1]
    grows = Estimate.of(
        r["trace"][-1]["attention"]["out_of_domain"] - r["trace"][0]["attention"]["out_of_domain"] for r in found
    ).positive
    claims = [
        value_claim("attention on same-pattern contexts, at the start", 0.42, first, factor=1.15),
        value_claim("the same, after training", 1.0, last, factor=1.15, trend=grows),
    ]
    steps = curves[1].points[-1][0]
    return Figure(
        "attention",
        "Attention concentrates on contexts that share the query's pattern",
        "The sum of attention on the contexts that carry the query's relevant pattern, alpha' = 0.8.",
        [Panel("attention on same-pattern contexts", "step", "sum of attention")],
        [*curves, authors(0, "authors", [(0, 0.42), (steps, 1.0)])],
        claims,
        ONE_LAYER + " " + _settings(plan.one_layer()),
        notes,
    )


def norms(plan: Plan, results: Results) -> Figure:
    found, notes = results.good(plan.one_layer())
    names = {
        "query": "||W_Q p_query||",
        "query_relevant": "||W_Q mu||, query",
        "key": "||W_K p_i||",
        "key_relevant": "||W_K mu||, contexts",
    }
    curves = [Curve(0, label, _trace(found, "projections", name)) for name, label in names.items()]
    final = {name: line.points[-1][1] for name, line in zip(names, curves, strict=True)}
    grows = all(line.points[-1][1].mean > 2 * line.points[0][1].mean for line in curves)
    irrelevant = Estimate.of(
        math.sqrt(
            max(r["trace"][-1]["projections"]["query"] ** 2 - r["trace"][-1]["projections"]["query_relevant"] ** 2, 0)
        )
        / math.sqrt(r["trace"][0]["projections"]["query"] ** 2 - r["trace"][0]["projections"]["query_relevant"] ** 2)
        for r in found
    )
    relevant = Estimate.of(
        r["trace"][-1]["projections"]["query_relevant"] / r["trace"][0]["projections"]["query_relevant"] for r in found
    )
    claims = [
        value_claim("projections at the start", 0.4, curves[0].points[0][1], factor=1.25),
        value_claim("||W_Q p_query|| after training", 1.75, final["query"], factor=1.5, trend=grows),
        value_claim("its relevant part", 1.45, final["query_relevant"], factor=1.5, trend=grows),
        value_claim("||W_K p_i|| after training", 1.75, final["key"], factor=1.5, trend=grows),
        trend_claim(
            "what grows is the relevant part",
            "1.45 of 1.75",
            f"relevant part times {relevant}, the rest times {irrelevant}",
            relevant.mean > 2 * irrelevant.mean,
            "the relevant part grows by more than twice the factor of the rest",
        ),
    ]
    steps = curves[0].points[-1][0]
    return Figure(
        "norms",
        "W_Q and W_K project onto the relevant patterns",
        "Mean norms of what the query and the contexts become; the relevant part is that of the pattern mu alone.",
        [Panel("norms of projections", "step", "mean norm")],
        [*curves, authors(0, "authors", [(0, 0.4), (steps, 1.75), (steps, 1.45)])],
        claims,
        ONE_LAYER + " " + _settings(plan.one_layer()),
        notes,
    )


def neurons(plan: Plan, results: Results) -> Figure:
    found, notes = results.good(plan.one_layer())
    quantities = ("feature", "label", "feature_angle", "label_angle")
    curves = [
        Curve(
            panel,
            f"{kind} neurons, {quantity.removesuffix('_angle')}",
            _trace(found, kind, quantity),
        )
        for kind in ("large", "small")
        for panel, pair in enumerate((quantities[:2], quantities[2:]))
        for quantity in pair
    ]
    final = {line.name + str(line.panel): line.points[-1][1] for line in curves}
    first = {line.name + str(line.panel): line.points[0][1] for line in curves}
    turns = final["large neurons, feature1"].mean < first["large neurons, feature1"].mean / 2
    claims = [
        value_claim("feature part at the start", 0.02, first["large neurons, feature0"], factor=1.5),
        value_claim("feature part of large neurons", 0.45, final["large neurons, feature0"], factor=1.5, trend=True),
        value_claim("label part of large neurons", 1.2, final["large neurons, label0"], factor=1.5, trend=True),
        value_claim(
            "angle of the feature part to the mean of mu",
            math.pi / 8,
            final["large neurons, feature1"],
            factor=1.5,
            trend=turns,
        ),
        trend_claim(
            "label parts of large neurons align with sign(a) q",
            "theory",
            f"angle {final['large neurons, label1']}",
            final["large neurons, label1"].mean < 0.2,
            "mean angle below 0.2 rad",
        ),
        trend_claim(
            "the other neurons stay near their initialisation",
            "theory",
            f"feature part {first['small neurons, feature0']} to {final['small neurons, feature0']}",
            final["small neurons, feature0"].mean < final["large neurons, feature0"].mean / 3,
            "their feature part below a third of the large ones'",
        ),
    ]
    last = curves[0].points[-1][0]
    return Figure(
        "neurons",
        "Rows of W_O W_V: two kinds of neurons",
        "Feature part: the input's coordinates of a row; label part: the label's. Means over the neurons that end large, and over "
        "those that end small.",
        [Panel("norms", "step", "mean norm"), Panel("angles to mean(mu) and to sign(a) q", "step", "radians")],
        [
            *curves,
            authors(0, "authors, large", [(0, 0.02), (last, 0.45), (last, 1.2)]),
            authors(1, "authors, feature", [(last, math.pi / 8)]),
        ],
        claims,
        ONE_LAYER + " " + _settings(plan.one_layer()),
        notes,
    )


def pruning(plan: Plan, results: Results) -> Figure:
    found, notes = results.good(plan.one_layer())
    where = {"alpha": 0.6, "domain": "out_of_domain"}
    hinge = [curve(0, by, found, "pruning", "rate", "hinge", order=by, **where) for by in PRUNING_ORDERS]
    zero_one = [curve(1, by, found, "pruning", "rate", "zero_one", order=by, **where) for by in PRUNING_ORDERS]
    sorted_norms = Curve(
        2,
        "recipe",
        [
            (i / len(found[0]["norms"]), Estimate.of(r["norms"][i] for r in found))
            for i in range(len(found[0]["norms"]))
        ],
    )
    panels = [
        Panel("recipe, hinge", "neurons pruned", "OOD hinge error"),
        Panel("recipe, 0/1", "neurons pruned", "OOD 0/1 error"),
        Panel("sorted norms of W_O W_V's rows", "neurons, smallest first", "norm"),
    ]
    paper = {"W_O W_V": {0.0: 0.007, 0.16: 0.0062, 0.4: 0.030}, "random": {0.4: 0.045}}
    curves = [*hinge, *zero_one, sorted_norms]
    claims = _pruning_claims("recipe", found, "alpha", paper)
    confirmed = results.confirmed(plan)
    if confirmed:
        where = {"domain": "out_of_domain"}
        panels += [
            Panel("found by the search, 0/1", "neurons pruned", "OOD 0/1 error", log_y=True),
            Panel("found by the search, hinge", "neurons pruned", "OOD hinge error"),
        ]
        for panel, score in ((3, "zero_one"), (4, "hinge")):
            curves += [
                curve(panel, by, confirmed, "pruning", "rate", score, order=by, **where) for by in ("W_O W_V", "random")
            ]
        curves.append(authors(3, "authors, magnitude", list(paper["W_O W_V"].items())))
        curves.append(authors(3, "authors, random", list(paper["random"].items())))
        claims += _pruning_claims("found by the search", confirmed, None, paper)
    return Figure(
        "pruning",
        "Error over the pruning rate: magnitude against random",
        "Neurons of the trained model go, smallest row of W_O W_V (or W_O) first, in random order, largest first, or the small cluster "
        "and then large ones at random. The recipe trains until nothing is left to learn; its 0/1 error then hardly feels "
        "pruning until one sign of a runs out, and hinge error is the finer score. The settings found by the search "
        "(see there) were confirmed on seeds that the search did not use.",
        panels,
        curves,
        claims,
        ONE_LAYER + " " + _settings(plan.one_layer()),
        notes,
    )


def _pruning_claims(
    name: str, found: Sequence[Mapping[str, Any]], alpha_key: str | None, paper: Mapping[str, Mapping[float, float]]
) -> list[Claim]:
    where: dict[str, Any] = {"domain": "out_of_domain", **({} if alpha_key is None else {alpha_key: 0.6})}

    def difference(score: str, first: tuple[str, float], second: tuple[str, float]) -> Estimate:
        return Estimate.of(
            _pick(r, "pruning", score, order=first[0], rate=first[1], **where)
            - _pick(r, "pruning", score, order=second[0], rate=second[1], **where)
            for r in found
        )

    small = Estimate.of(r["small_fraction"] for r in found)
    gap = Estimate.of(r["gap"] for r in found)
    free = difference("hinge", ("W_O W_V", 0.16), ("W_O W_V", 0.0))
    rise = difference("zero_one", ("W_O W_V", 0.4), ("W_O W_V", 0.0))
    claims = [
        value_claim(f"{name}: share of small neurons", 0.17, small, factor=1.5),
        trend_claim(
            f"{name}: small and large are apart",
            "norms .14-.18 against .45-.51, ratio 2.5",
            f"ratio at the gap {gap}",
            gap.mean > 2,
            "gap above 2",
        ),
        trend_claim(
            f"{name}: removing the smallest 16 % costs nothing (hinge)",
            "yes",
            f"extra {free}",
            free.mean < 0.005,
            "less than 0.005",
        ),
        trend_claim(
            f"{name}: 0/1 error rises gradually, at 40 %",
            "0.007 to 0.030",
            f"by {rise}",
            0.002 < rise.mean < 0.2 and rise.positive,
            "by 0.002 to 0.2, interval above 0",
        ),
    ]
    for score, label in (("hinge", "hinge"), ("zero_one", "0/1")):
        more = difference(score, ("random", 0.4), ("W_O W_V", 0.4))
        claims.append(
            trend_claim(
                f"{name}: random order costs more than magnitude at 40 % ({label})",
                "0.045 against 0.030",
                f"by {more}",
                more.positive,
                "the difference's interval above 0",
            )
        )
    for by, values in paper.items():
        for rate, value in values.items():
            ours = Estimate.of(_pick(r, "pruning", order=by, rate=rate, **where) for r in found)
            claims.append(value_claim(f"{name}: 0/1 error, {by}, {rate:.0%} pruned", value, ours, factor=2))
    return claims


def pruning_alpha(plan: Plan, results: Results) -> Figure:
    found, notes = results.good(plan.one_layer())
    paper = {0.6: 0.03, 0.8: 0.0105, 1.0: 0.007}
    curves, claims = [], []
    sets = [("recipe", found)]
    if confirmed := results.confirmed(plan):
        sets.append(("found by the search", confirmed))
    panels: list[Panel] = []
    for name, runs in sets:
        for score, label in (("zero_one", "0/1"), ("hinge", "hinge")):
            panel = len(panels)
            panels.append(Panel(f"{name}, {label}", "neurons pruned", f"OOD {label} error"))
            curves += [
                curve(
                    panel,
                    f"alpha' = {a:g}",
                    runs,
                    "pruning",
                    "rate",
                    score,
                    order="W_O W_V",
                    alpha=a,
                    domain="out_of_domain",
                )
                for a in paper
            ]
            if score == "zero_one":
                curves.append(authors(panel, "authors, 40 %", [(0.4, value) for value in paper.values()]))
        for score, label in (("zero_one", "0/1"), ("hinge", "hinge")):
            where = {"order": "W_O W_V", "rate": 0.4, "domain": "out_of_domain"}
            falls = Estimate.of(
                _pick(r, "pruning", score, alpha=0.6, **where) - _pick(r, "pruning", score, alpha=1.0, **where)
                for r in runs
            )
            claims.append(
                trend_claim(
                    f"{name}: at 40 % pruned, error falls with alpha' ({label})",
                    "0.03, 0.0105, 0.007",
                    f"alpha' = 0.6 less 1: {falls}",
                    falls.positive,
                    "the difference's interval above 0",
                )
            )
        claims += [
            value_claim(
                f"{name}: 0/1 error at 40 % pruned, alpha' = {a:g}",
                value,
                Estimate.of(
                    _pick(r, "pruning", order="W_O W_V", rate=0.4, alpha=a, domain="out_of_domain") for r in runs
                ),
                factor=2,
            )
            for a, value in paper.items()
        ]
    return Figure(
        "pruning-alpha",
        "Pruning and the share of relevant contexts",
        "Magnitude pruning of W_O W_V's rows on test prompts with different shares alpha' of relevant contexts.",
        panels,
        curves,
        claims,
        ONE_LAYER + " " + _settings(plan.one_layer()),
        notes,
    )


def gpt2_3layer(plan: Plan, results: Results) -> Figure:
    found, notes = results.good(plan.gpt2())
    paper = [0.85, 0.77, 0.88]
    layers = [
        Curve(
            0,
            f"layer {layer + 1}",
            [
                (found[0]["trace"][i][0], Estimate.of(r["trace"][i][1]["attention"][layer] for r in found))
                for i in range(len(found[0]["trace"]))
            ],
        )
        for layer in range(3)
    ]
    claims = []
    for layer, (line, value) in enumerate(zip(layers, paper, strict=True)):
        grows = Estimate.of(r["trace"][-1][1]["attention"][layer] - r["trace"][0][1]["attention"][layer] for r in found)
        claims.append(value_claim(f"layer {layer + 1}: at the start", 0.475, line.points[0][1], factor=1.25))
        claims.append(
            value_claim(
                f"layer {layer + 1}: after training", value, line.points[-1][1], factor=1.15, trend=grows.positive
            )
        )
    last = layers[0].points[-1][0]
    return Figure(
        "gpt2-3layer",
        "Same-pattern attention in each layer of GPT-2",
        "Attention of the query's position on the contexts that share its pattern, of what it pays to all contexts; mean over heads.",
        [Panel("attention on same-pattern contexts", "step", "share of attention")],
        [*layers, authors(0, "authors", [(0, 0.475), *((last, value) for value in paper)])],
        claims,
        _settings(plan.gpt2()),
        notes,
    )


def width(plan: Plan, results: Results) -> Figure:
    from scipy.stats import linregress

    notes: list[str] = []
    by: dict[str, dict[int, list[Mapping[str, Any]]]] = {"m": {}, "M1": {}, "M2": {}}
    for name, sizes in (("m", plan.widths), ("M1", plan.M1s), ("M2", plan.M2s)):
        for size in sizes:
            by[name][size], left_out = results.good(plan.theorem(**{name: size}))
            notes += left_out
    by = {name: {size: runs for size, runs in sizes.items() if runs} for name, sizes in by.items()}

    def over(name: str, score: Callable[[Mapping[str, Any]], float]) -> list[tuple[float, Estimate]]:
        return [(float(size), Estimate.of(map(score, runs))) for size, runs in sorted(by[name].items())]

    free = over("m", lambda r: r["free_fraction"])
    small = over("m", lambda r: r["small_fraction"])
    cost = {name: over(name, lambda r: max(r["small_cost"], 0.0)) for name in ("M1", "M2")}
    every = [r for sizes in by.values() for runs in sizes.values() for r in runs]
    R = [(row["R"], row["hinge"]) for r in every for row in r["large_cost"]]
    at_R = {x: Estimate.of(y for where, y in R if where == x) for x in sorted({x for x, _ in R})}
    fit = linregress([x for x, _ in R if x > 0], [y for x, y in R if x > 0])
    ratio = min(y / x for x, y in R if x >= 0.3)
    largest = Estimate.of(max(r["small_cost"], 0.0) for r in every)
    bounds = []
    for name, points in cost.items():
        # The theorem bounds the cost by C (eps + M^-1/2): a cost that fell more slowly than M^-1/2, from a size that matters, would break it.
        slope = (
            linregress([1 / math.sqrt(x) for x, _ in points], [e.mean for _, e in points]) if len(points) > 2 else None
        )
        bounds.append((name, points, slope))
    claims = [
        trend_claim(
            "a constant share of neurons is free at every width",
            "theorem: a constant fraction is small",
            ", ".join(f"{e.mean:.2f} at m = {x:g}" for x, e in free),
            min(e.mean for _, e in free) > 0.1,
            f"extra hinge error below 0.005 at 10 % or more, at every m; the small cluster is {min(e.mean for _, e in small):.2f} to "
            f"{max(e.mean for _, e in small):.2f} of them",
        ),
        *(
            trend_claim(
                f"removing all small neurons costs O(eps + {name}^-1/2)",
                f"at most C (eps + {name}^-1/2)",
                ", ".join(f"{e.mean:.2g} at {name} = {x:g}" for x, e in points)
                + (
                    ""
                    if slope is None
                    else f"; fitted slope against {name}^-1/2: {slope.slope:.2g} ± {1.96 * slope.stderr:.2g}"
                ),
                max(e.mean for _, e in points) < 0.01 and (slope is None or slope.slope > -2 * slope.stderr - 1e-3),
                f"extra hinge error below 0.01 at every {name}, and not growing with {name}",
            )
            for name, points, slope in bounds
        ),
        trend_claim(
            "removing a share R of the large neurons costs Omega(R)",
            "at least c R, c > 0",
            f"fitted {fit.slope:.2f} R {fit.intercept:+.2f} (slope ± {1.96 * fit.stderr:.2f}); the least cost / R at R >= 0.3 is {ratio:.2f}",
            fit.slope - 1.96 * fit.stderr > 0 and ratio > 0.1,
            "fitted slope's interval above 0, and no run below 0.1 R from R = 0.3 on",
        ),
        trend_claim(
            "small neurons are cheap, large ones are not",
            "yes",
            f"all small ones {largest}, 30 % of the large ones {at_R[0.3]}",
            largest.mean < at_R[0.3].mean / 10,
            "a tenth of the cost or less",
        ),
    ]
    return Figure(
        "width",
        "The theorem on pruning: what is free, and what is not",
        "Hinge errors on out-of-domain prompts. Free: the largest rate, smallest first, that costs less than 0.005. The theorem speaks of "
        "M without saying on every page whether that is M1 or M2, so both are varied.",
        [
            Panel("prunable share over width", "neurons m", "share", log_x=True),
            Panel("removing all small neurons", "M1 or M2", "extra hinge error", log_x=True),
            Panel("removing a share R of the large", "R", "extra hinge error"),
        ],
        [
            Curve(0, "free", free),
            Curve(0, "small cluster", small),
            Curve(1, "over M1", cost["M1"]),
            Curve(1, "over M2", cost["M2"]),
            Curve(2, "all models", list(at_R.items())),
            authors(2, "fitted line", [(x / 20, max(fit.intercept + fit.slope * x / 20, 0)) for x in range(2, 13)]),
        ],
        claims,
        _settings(plan.theorem(m=plan.widths[0])),
        notes,
    )


def search(plan: Plan, results: Results) -> Figure:
    found = plan.ranked(results)
    notes = [
        f"{len(plan.search())} settings drawn at random from the ranges below, one seed each; {len(found)} trained. Score: mean distance, in "
        "decades, of the four 0/1 errors to the authors' (magnitude at 0, 16 and 40 %, random at 40 %; alpha' = 0.6).",
        "ranges: " + ", ".join(f"{name} in {list(values)}" for name, values in plan.ranges.items()),
    ]
    for rank, (score, job, result) in enumerate(found[:10], 1):
        values = ", ".join(f"{name} = {job.arguments[name]:g}" for name in plan.ranges)
        errors = ", ".join(f"{error:.4f}" for error in plan.four_errors(result))
        notes.append(f"{rank}. distance {score:.2f}: {values}; {result['steps']} steps; errors {errors}")
    curves = []
    for rank, (_, _, result) in enumerate(found[:3], 1):
        curves.append(
            curve(
                0,
                f"rank {rank}, one seed",
                [result],
                "pruning",
                "rate",
                "zero_one",
                order="W_O W_V",
                domain="out_of_domain",
            )
        )
    confirmed, left_out = results.good(plan.confirm(results))
    claims = []
    if confirmed:
        curves.append(
            curve(
                0,
                "rank 1, fresh seeds",
                confirmed,
                "pruning",
                "rate",
                "zero_one",
                order="W_O W_V",
                alpha=0.6,
                domain="out_of_domain",
            )
        )
        target = plan.target
        fresh = [Estimate.of(values) for values in zip(*(plan.four_errors(r) for r in confirmed), strict=True)]
        claims = [
            value_claim(f"fresh seeds: {what}", value, ours, factor=2)
            for (what, value), ours in zip(target.items(), fresh, strict=True)
        ]
    curves.append(authors(0, "authors", [(0.0, 0.007), (0.16, 0.0062), (0.4, 0.03)]))
    return Figure(
        "search",
        "Search for the regime of the pruning figure",
        "Under the recipe the 0/1 error of pruned models stays flat and then jumps; the paper's rises gradually. Which settings, of those that "
        "the paper does not state, show its curve? The best of the search is run again on seeds that it did not use, and only those count.",
        [Panel("0/1 error over the pruning rate, alpha' = 0.6", "neurons pruned", "OOD 0/1 error", log_y=True)],
        curves,
        claims,
        _settings(plan.search()),
        notes + left_out,
    )


def time(plan: Plan, results: Results) -> Figure:
    (result,), notes = results.good(plan.time())
    curves = [
        curve(0, label, [result], "rows", "rate", name)
        for name, label in (("eager_us", "PyTorch, eager"), ("fasticl_us", "FastICL"))
    ]
    curves.append(curve(1, "FastICL over eager", [result], "rows", "rate", "speedup"))
    first, last = result["rows"][0], result["rows"][-1]
    within = all(row["max_relative_error"] <= row["tolerance"] for row in result["rows"])
    return Figure(
        "time",
        "Inference time over the pruning rate",
        "One-layer model in float32: microseconds per prompt, eager PyTorch and FastICL's fused attention-MLP, interleaved in one process. Pruned "
        "neurons are gone from the weights.",
        [
            Panel("time per prompt", "neurons pruned", "microseconds"),
            Panel("speed-up", "neurons pruned", "times eager"),
        ],
        curves,
        [
            trend_claim(
                "pruning cuts inference time",
                "yes",
                f"{first['fasticl_us']:.3g} us to {last['fasticl_us']:.3g} us at {last['rate']:.0%} pruned",
                last["fasticl_us"] < first["fasticl_us"],
                "less time at the highest rate than at 0",
            ),
            trend_claim(
                "the fused model computes what the pruned one does",
                "",
                f"largest error {max(r['max_relative_error'] for r in result['rows']):.1e}",
                within,
                "every error within the rounding of the eager model",
            ),
        ],
        _settings(plan.time()) + f", {result['threads']} threads, {result['cpu']}",
        notes,
    )


def language_model(plan: Plan, results: Results) -> Figure:
    (result,), notes = results.good(plan.language_model())
    n = result["prompts"]
    curves = []
    for order, points in result["accuracy"].items():
        estimates = []
        for rate, accuracy in points:
            half = 1.96 * math.sqrt(accuracy * (1 - accuracy) / n)
            estimates.append((rate, Estimate(accuracy, accuracy - half, accuracy + half, n)))
        curves.append(Curve(0, order, estimates))
    layers = range(1, len(result["attention"]) + 1)
    for label, values in (("mean over heads", result["attention"]), ("best head", result["attention_best_head"])):
        curves.append(
            Curve(1, label, [(x, Estimate(y, math.nan, math.nan, 1)) for x, y in zip(layers, values, strict=True)])
        )
    gaps = [layer["gap"] for layer in result["neurons"]]
    curves.append(
        Curve(2, "widest gap", [(x, Estimate(y, math.nan, math.nan, 1)) for x, y in zip(layers, gaps, strict=True)])
    )
    first = {order: dict(map(tuple, points)) for order, points in result["accuracy"].items()}
    dense = first["activation"][0.0]
    free = max(
        rate
        for rate, accuracy in first["activation"].items()
        if dense - accuracy < 1.96 * math.sqrt(dense * (1 - dense) / n)
    )
    last = max(first["activation"])
    mass = sum(result["attention"]) / len(result["attention"])
    claims = [
        trend_claim(
            "neurons end in two clusters, small and large",
            "ratio 2.5 at the gap (one-layer model)",
            f"the widest gap of any MLP is {max(gaps):.2f}",
            max(gaps) > 2,
            "a gap above 2 in some MLP",
        ),
        trend_claim(
            "a share of neurons is free",
            "17 % (one-layer model)",
            f"up to {free:.0%}, smallest activations first (accuracy {dense:.2f})",
            free >= 0.1,
            "accuracy at 10 % or more within one 95 % interval of the dense model's",
        ),
        trend_claim(
            "the order matters: smallest first beats random",
            "0.030 against 0.045 error at 40 % (one-layer model)",
            f"at {last:.0%}: {first['activation'][last]:.2f} against {first['random'][last]:.2f}",
            first["activation"][last] - first["random"][last] > 1.96 * math.sqrt(0.5 / n),
            "by more than chance, 1.96 sqrt(0.5 / n)",
        ),
        trend_claim(
            "attention concentrates on examples of the query's class",
            "0.42 to 1.0 (one-layer model)",
            f"{mass:.2f} of the attention to examples, mean over layers; {max(result['attention_best_head']):.2f} in the best head; 0.5 is even",
            mass > 0.55,
            "above 0.55 on average",
        ),
    ]
    return Figure(
        "language-model",
        f"The same measurements on a pretrained language model ({result['model']})",
        "Prompts are words and their categories, two categories a prompt, eight examples; the model names the category of a ninth word. Whole neurons "
        "of every MLP go, by the activation score, by weight norm, or at random. Theory and practice side by side: nothing here was trained for the theory.",
        [
            Panel("accuracy over the pruning rate", "neurons pruned", "accuracy"),
            Panel("attention on same-class examples", "layer", "share of attention to examples"),
            Panel("widest gap between neurons' scores", "layer", "ratio of neighbours"),
        ],
        curves,
        claims,
        _settings(plan.language_model()),
        notes,
    )


def _pick(result: Mapping[str, Any], rows: str, score: str = "zero_one", **where: Any) -> float:
    """``score`` of the one row where all of ``where`` holds."""
    return next(row[score] for row in result[rows] if all(row[key] == value for key, value in where.items()))


def _trace(found: Sequence[Mapping[str, Any]], group: str, name: str) -> list[tuple[float, Estimate]]:
    """(step, estimate) of ``trace[i][group][name]``."""
    steps = [row["step"] for row in found[0]["trace"]]
    return [(step, Estimate.of(r["trace"][i][group][name] for r in found)) for i, step in enumerate(steps)]


def _crossing(result: Mapping[str, Any], alpha: float, error: float) -> float:
    """The least l at which the OOD error is ``error``, interpolated between measured ones in log error."""
    rows = sorted(
        (row["length"], max(row["zero_one"], 1e-5))
        for row in result["contexts"]
        if row["alpha"] == alpha and row["domain"] == "out_of_domain"
    )
    for (l0, e0), (l1, e1) in pairwise(rows):
        if e0 > error >= e1:
            return l0 + (l1 - l0) * math.log(e0 / error) / math.log(e0 / e1)
    return float(rows[-1][0])


def _settings(jobs: Sequence[Job]) -> str:
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


SPECS = {
    spec.name: spec
    for spec in (
        Spec("contexts", lambda plan: [job for kappa in plan.kappas for job in plan.gpt2(kappa)], contexts),
        Spec("alpha", Plan.one_layer, alpha),
        Spec(
            "baselines",
            lambda plan: [job for kappa in plan.kappas for job in plan.baselines(kappa)],
            baselines,
        ),
        Spec("attention", Plan.one_layer, attention),
        Spec("norms", Plan.one_layer, norms),
        Spec("neurons", Plan.one_layer, neurons),
        Spec("pruning", lambda plan: plan.one_layer() + plan.search(), pruning, Plan.confirm),
        Spec("pruning-alpha", lambda plan: plan.one_layer() + plan.search(), pruning_alpha, Plan.confirm),
        Spec("gpt2-3layer", Plan.gpt2, gpt2_3layer),
        Spec("width", Plan.all_theorem, width),
        Spec("search", Plan.search, search, Plan.confirm),
        Spec("language-model", Plan.language_model, language_model),
        Spec("time", Plan.time, time),
    )
}
