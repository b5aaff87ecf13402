"""Beyond the paper: a pretrained language model, and inference time."""

from __future__ import annotations

import math

from fasticl.reproduce.plan import Plan, Results
from fasticl.reproduce.results import (
    Curve,
    Estimate,
    Figure,
    Panel,
    curve,
    settings_of,
    trend_claim,
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
            f"{mass:.2f} of the attention to examples, mean over layers; {max(result['attention_best_head']):.2f} in "
            "the best head; 0.5 is even",
            mass > 0.55,
            "above 0.55 on average",
        ),
    ]
    return Figure(
        "language-model",
        f"The same measurements on a pretrained language model ({result['model']})",
        "Prompts are words and their categories, two categories a prompt, eight examples; the model names the category "
        "of a ninth word. Whole neurons of every MLP go, by the activation score, by weight norm, or at random. Theory "
        "and practice side by side: nothing here was trained for the theory.",
        [
            Panel("accuracy over the pruning rate", "neurons pruned", "accuracy"),
            Panel("attention on same-class examples", "layer", "share of attention to examples"),
            Panel("widest gap between neurons' scores", "layer", "ratio of neighbours"),
        ],
        curves,
        claims,
        settings_of(plan.language_model()),
        notes,
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
        "One-layer model in float32: microseconds per prompt, eager PyTorch and FastICL's fused attention-MLP, "
        "interleaved in one process. Pruned neurons are gone from the weights.",
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
        settings_of(plan.time()) + f", {result['threads']} threads, {result['cpu']}",
        notes,
    )
