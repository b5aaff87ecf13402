"""The demo's report, from what ``results.json`` holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from fasticl.demo.plots import NAMES
from fasticl.report import image, page, table


def html(results: Mapping[str, Any], images: Mapping[str, Path]) -> str:
    """The page, from what ``results.json`` holds and the PNG files of :func:`fasticl.demo.plots.plot`."""
    cpu = results["machine"]["cpu"]
    settings = results["settings"]
    sections = [
        "<h1>A pruned Transformer on FastICL</h1>",
        f'<p class="lead">FastICL {escape(results["machine"]["versions"]["fasticl"])} on {escape(cpu["model"])}, '
        f"{_threads(cpu)}, {escape(cpu['target'])} kernels, {escape(settings['dtype'])}"
        f"{'; quick settings, whose numbers mean little' if settings['quick'] else ''}.</p>",
        _cards(results),
        _verdict(results["failures"]),
    ]
    if results["lm"] is not None:
        sections.append(_language_model(results["lm"], images))
    sections += [_one_layer(results["icl"], images), _how(results)]
    return page("FastICL demo", sections)


def _cards(results: Mapping[str, Any]) -> str:
    cards = []
    if (lm := results["lm"]) is not None:
        ours = lm["variants"]["fasticl"]
        cards += [
            (f"{ours['decode_speedup']:.2f}×", "the dense model's decode speed, by transformers"),
            (f"{ours['prefill_speedup']:.2f}×", "the dense model's prefill speed"),
            *(
                [(f"{by['decode_speedup']:.2f}×", "the dense model's decode speed, by fasticl.Decoder")]
                if (by := lm["variants"].get("decoder"))
                else []
            ),
            (
                f"{lm['same_answers']} of {len(lm['answers'])}",
                "questions answered word for word as by the masked model",
            ),
        ]
    at = _pruned_at(results["icl"])
    cards.append(
        (f"{at['speedup']:.1f}×", f"eager PyTorch: the one-layer model, {at['rate']:.0%} of its neurons pruned")
    )
    return (
        '<div class="cards">'
        + "".join(f"<div class=card><b>{b}</b><span>{t}</span></div>" for b, t in cards)
        + "</div>"
    )


def _verdict(failures: Sequence[str]) -> str:
    if not failures:
        text = "Every check passed: FastICL computes what the pruned models do, to rounding."
        return f'<div class="verdict"><p>{text}</p></div>'
    return '<div class="verdict bad">' + "".join(f"<p>{escape(failure)}</p>" for failure in failures) + "</div>"


def _language_model(lm: Mapping[str, Any], images: Mapping[str, Path]) -> str:
    pruning, variants = lm["pruning"], lm["variants"]
    rows = [
        (
            NAMES[name],
            f"{variant['megabytes']:,.0f}",
            f"{variant['perplexity']:.2f}",
            f"{variant['few_shot']['mean']:.3f}",
            f"{variant['prefill_tokens_per_s']:,.0f}",
            f"{variant['prefill_speedup']:.2f}×",
            f"{variant['decode_tokens_per_s']:.1f}",
            f"{variant['decode_speedup']:.2f}×",
        )
        for name, variant in variants.items()
    ]
    columns = ("", "MB", "perplexity", "few-shot", "prefill tok/s", "vs dense", "decode tok/s", "vs dense")
    answers = "".join(
        f'<p class="question">{escape(row["question"])}</p>'
        + table([NAMES[name] for name in variants], [[row[name] for name in variants]], css="answers")
        for row in lm["answers"]
    )
    checks = [
        (
            row["layers"],
            row["path"],
            str(row["tokens"]),
            f"{row['max_relative_error']:.1e}",
            f"{row['masked_rounding']:.1e}",
            f"{row['tolerance']:.1e}",
            f"{row['argmax_agreement']:.1%}",
            "passed" if row["passed"] else "FAILED",
        )
        for row in lm["agreement"]
    ]
    summary = (
        f"{lm['parameters'] / 1e6:,.0f} million parameters, pruned with {pruning['method']} on "
        f"{pruning['calibration_tokens']:,} tokens of the Python language reference. Masked is what pruning leaves: "
        "the same dense layers, holding zeros. FastICL holds what is left, without the zeros, wherever that was "
        f"measured to be faster: in {lm['conversion']['packed']} of {lm['conversion']['linears']} linear layers. Where "
        "its answers differ from the dense model's, pruning did it; from the masked model's, rounding. "
    )
    summary += (
        f"There is no fasticl.Decoder of this model: {lm['no_decoder']}."
        if lm["no_decoder"]
        else "FastICL Decoder is packed where that is faster at one token, and decodes by fasticl.Decoder: one call "
        "into C++ a token, where transformers computes layer by layer from Python."
    )
    quality = (
        f"Few-shot: {lm['few_shot_questions']} questions on word relations, {lm['shots']} examples each, right "
        f"if greedy decoding says the whole word. Perplexity: {lm['evaluation_tokens']:,} tokens of the standard "
        "library's documentation strings, which calibration did not see."
    )
    agreement = (
        "Errors are shares of the largest logit. All packed: with those pruned layers packed too that are faster "
        "dense. Rounding alone: how far the masked model's logits lie from its own in float64; both models add the "
        f"same products up, each in its own order, and may differ by {lm['rounding_factor']} times as much."
    )
    conversion = escape(lm["conversion"]["summary"])
    check_columns = ("layers", "path", "tokens", "largest error", "rounding alone", "tolerance", "same argmax", "")
    return "\n".join(
        [
            f"<h2>{escape(lm['model'])}, {pruning['sparsity']:.0%} of its block weights gone</h2>",
            f"<p>{escape(summary)}</p>",
            table(columns, rows, ours=list(variants).index("fasticl")),
            image(images["lm-speed"], "Prefill and decode speed of the models"),
            "<h3>The same questions, greedy decoding</h3>",
            answers,
            "<h3>What pruning costs</h3>",
            image(images["lm-few-shot"], "Few-shot accuracy by relation"),
            f'<p class="note">{escape(quality)}</p>',
            "<h3>Do FastICL and masked agree?</h3>",
            table(check_columns, checks),
            f'<p class="note">{escape(agreement)}</p>',
            f"<details><summary>What each layer runs</summary><pre>{conversion}</pre></details>",
        ]
    )


def _one_layer(icl: Mapping[str, Any], images: Mapping[str, Path]) -> str:
    errors = {point["rate"]: point for point in icl["pruning"]["smallest first"]}
    rows = [
        (
            f"{row['rate']:.0%}",
            str(row["neurons"]),
            *(
                f"{errors[row['rate']][domain][score]:.4f}"
                for score in ("hinge", "zero_one")
                for domain in ("in_domain", "out_of_domain")
            ),
            f"{row['eager_us']:.2f}",
            f"{row['fasticl_us']:.2f}",
            f"{row['speedup']:.1f}×",
        )
        for row in icl["time"]
    ]
    columns = (
        *("pruned", "neurons", "hinge, in", "hinge, out", "0/1, in", "0/1, out"),
        *("eager µs", "FastICL µs", "speed-up"),
    )
    summary = (
        f"The theory's model (Li et al., ICML 2024) learns in context: shown {icl['prompt_length']} labelled examples "
        f"of a task that it was never trained on, it labels the next input. After {icl['steps']} steps its "
        f"{icl['neurons']} neurons are of two kinds, large and small. The small ones can go for next to nothing; each "
        "of the others costs."
    )
    note = (
        "In: unseen tasks on the patterns of training. Out: new patterns, combinations of those. "
        f"{icl['test_prompts']:,} test prompts each. 0/1 error is the blunter score: it stays where it is until one "
        "sign of the output weights runs out."
    )
    return "\n".join(
        [
            "<h2>The one-layer model, and why pruning works</h2>",
            f"<p>{escape(summary)}</p>",
            image(images["icl-training"], "Training loss; sorted row norms of the neurons"),
            image(images["icl-error"], "Hinge and 0/1 error over the pruning rate, smallest first and in random order"),
            image(images["icl-time"], "Inference time over the pruning rate", css="narrow"),
            table(columns, rows),
            f'<p class="note">{escape(note)}</p>',
        ]
    )


def _how(results: Mapping[str, Any]) -> str:
    machine = results["machine"]
    versions = [(name, number or "not installed") for name, number in machine["versions"].items()]
    cpu = machine["cpu"]
    facts = [
        ("processor", f"{cpu['model']}, {cpu['cores']} cores, {_threads(cpu)} used"),
        ("instruction sets", " ".join(cpu["isa"]) or "unknown"),
        ("kernels", f"{cpu['target']}, of {', '.join(cpu['targets'])}"),
        ("settings", ", ".join(f"{name} {value}" for name, value in results["settings"].items())),
    ]
    seconds = [(stage, f"{took:.1f}") for stage, took in results["seconds"].items()]
    how = (
        "Contenders take turns in one process; speeds are ratios of medians of wall-clock time. Results are checked "
        "before they are timed. results.json, beside this file, holds all numbers."
    )
    tables = [table(("", ""), facts), table(("stage", "seconds"), seconds), table(("package", "version"), versions)]
    return "\n".join(["<h2>How this was measured</h2>", f"<p>{escape(how)}</p>", *tables])


def _threads(cpu: Mapping[str, Any]) -> str:
    return f"{cpu['threads']} thread{'' if cpu['threads'] == 1 else 's'}"


def _pruned_at(icl: Mapping[str, Any]) -> Mapping[str, Any]:
    """The timed rate closest to a half."""
    return min(icl["time"], key=lambda row: abs(row["rate"] - 0.5))
