"""What training does: attention, projections, rows of W_O W_V, and attention in GPT-2."""

from __future__ import annotations

import math

from fasticl.reproduce.plan import Plan, Results
from fasticl.reproduce.results import (
    RECIPE,
    Curve,
    Estimate,
    Figure,
    Panel,
    authors,
    settings_of,
    trace,
    trend_claim,
    value_claim,
)


def attention(plan: Plan, results: Results) -> Figure:
    found, notes = results.good(plan.one_layer())
    curves = [
        Curve(0, name, trace(found, "attention", domain))
        for domain, name in (("in_domain", "in domain"), ("out_of_domain", "out of domain"))
    ]
    first, last = curves[1].points[0][1], curves[1].points[-1][1]
    grows = Estimate.of(
        r["trace"][-1]["attention"]["out_of_domain"] - r["trace"][0]["attention"]["out_of_domain"] for r in found
    ).positive
    claims = [
        value_claim("attention on same-pattern contexts, after training", 1.0, last, factor=1.15, trend=grows),
        value_claim("the same, at the start", 0.42, first, factor=1.15),
    ]
    steps = curves[1].points[-1][0]
    return Figure(
        "attention",
        "Attention concentrates on contexts that share the query's pattern",
        "The sum of attention on the contexts that carry the query's relevant pattern, alpha' = 0.8.",
        [Panel("attention on same-pattern contexts", "step", "sum of attention")],
        [*curves, authors(0, "authors", [(0, 0.42), (steps, 1.0)])],
        claims,
        RECIPE + " " + settings_of(plan.one_layer()),
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
    curves = [Curve(0, label, trace(found, "projections", name)) for name, label in names.items()]
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
        trend_claim(
            "what grows is the relevant part",
            "1.45 of 1.75",
            f"relevant part times {relevant}, the rest times {irrelevant}",
            relevant.mean > 2 * irrelevant.mean,
            "the relevant part grows by more than twice the factor of the rest",
        ),
        value_claim("projections at the start", 0.4, curves[0].points[0][1], factor=1.25),
        value_claim("||W_Q p_query|| after training", 1.75, final["query"], factor=1.5, trend=grows),
        value_claim("its relevant part", 1.45, final["query_relevant"], factor=1.5, trend=grows),
        value_claim("||W_K p_i|| after training", 1.75, final["key"], factor=1.5, trend=grows),
    ]
    steps = curves[0].points[-1][0]
    return Figure(
        "norms",
        "W_Q and W_K project onto the relevant patterns",
        "Mean norms of what the query and the contexts become; the relevant part is that of the pattern mu alone.",
        [Panel("norms of projections", "step", "mean norm")],
        [*curves, authors(0, "authors", [(0, 0.4), (steps, 1.75), (steps, 1.45)])],
        claims,
        RECIPE + " " + settings_of(plan.one_layer()),
        notes,
    )


def neurons(plan: Plan, results: Results) -> Figure:
    found, notes = results.good(plan.one_layer())
    quantities = ("feature", "label", "feature_angle", "label_angle")
    curves = [
        Curve(
            panel,
            f"{kind} neurons, {quantity.removesuffix('_angle')}",
            trace(found, kind, quantity),
        )
        for kind in ("large", "small")
        for panel, pair in enumerate((quantities[:2], quantities[2:]))
        for quantity in pair
    ]
    final = {line.name + str(line.panel): line.points[-1][1] for line in curves}
    first = {line.name + str(line.panel): line.points[0][1] for line in curves}
    turns = final["large neurons, feature1"].mean < first["large neurons, feature1"].mean / 2
    claims = [
        trend_claim(
            "label parts of large neurons align with sign(a) q",
            "theory",
            f"angle {final['large neurons, label1']}",
            final["large neurons, label1"].mean < 0.2,
            "mean angle below 0.2 rad",
        ),
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
        "Feature part: the input's coordinates of a row; label part: the label's. Means over the neurons that end "
        "large, and over those that end small.",
        [Panel("norms", "step", "mean norm"), Panel("angles to mean(mu) and to sign(a) q", "step", "radians")],
        [
            *curves,
            authors(0, "authors, large", [(0, 0.02), (last, 0.45), (last, 1.2)]),
            authors(1, "authors, feature", [(last, math.pi / 8)]),
        ],
        claims,
        RECIPE + " " + settings_of(plan.one_layer()),
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
        claims.append(
            value_claim(
                f"layer {layer + 1}: after training", value, line.points[-1][1], factor=1.15, trend=grows.positive
            )
        )
    claims += [
        value_claim(f"layer {layer + 1}: at the start", 0.475, line.points[0][1], factor=1.25)
        for layer, line in enumerate(layers)
    ]
    last = layers[0].points[-1][0]
    return Figure(
        "gpt2-3layer",
        "Same-pattern attention in each layer of GPT-2",
        "Attention of the query's position on the contexts that share its pattern, of what it pays to all contexts; "
        "mean over heads.",
        [Panel("attention on same-pattern contexts", "step", "share of attention")],
        [*layers, authors(0, "authors", [(0, 0.475), *((last, value) for value in paper)])],
        claims,
        settings_of(plan.gpt2()),
        notes,
    )
