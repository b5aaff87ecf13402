"""The demo's report: one HTML file with its style and plots inside, that needs no network."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from fasticl.demo.plots import NAMES

_STYLE = """
:root { --ink: #22272e; --soft: #5c6670; --line: #e3e7eb; --paper: #ffffff; --wash: #f6f8fa; --accent: #1769aa; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--wash); color: var(--ink); -webkit-font-smoothing: antialiased;
  font: 16px/1.6 system-ui, -apple-system, "Segoe UI", "Helvetica Neue", "DejaVu Sans", Arial, sans-serif; }
main { max-width: 60rem; min-height: 100vh; margin: 0 auto; padding: 3.5rem 3rem 4rem; background: var(--paper); }
h1 { font-size: 2.1rem; line-height: 1.2; letter-spacing: -.02em; margin: 0 0 .6rem; }
h2 { font-size: 1.35rem; letter-spacing: -.01em; margin: 3.2rem 0 .4rem; padding-top: 1.2rem;
  border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 2rem 0 .5rem; }
p { max-width: 44rem; margin: .5rem 0 1rem; }
.lead, .note { color: var(--soft); }
.note { font-size: .9rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)); gap: 1rem; margin: 1.8rem 0 1rem; }
.card { background: var(--wash); border-radius: 8px; padding: 1rem 1.1rem; }
.card b { display: block; font-size: 1.75rem; line-height: 1.2; letter-spacing: -.02em; color: var(--accent); }
.card span { font-size: .85rem; color: var(--soft); line-height: 1.35; display: block; margin-top: .2rem; }
.verdict { border-left: 4px solid #2e8555; background: #eef7f1; border-radius: 0 6px 6px 0; margin: 1.4rem 0;
  padding: .7rem 1.1rem; }
.verdict.bad { border-color: #b3362b; background: #fcefed; }
.verdict p { margin: .15rem 0; max-width: none; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; margin: .8rem 0 1.4rem; font-size: .92rem;
  font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 600; color: var(--soft); font-size: .82rem; border-bottom: 2px solid var(--line); }
th, td { padding: .42rem .8rem .42rem 0; vertical-align: top; }
td { border-bottom: 1px solid var(--line); }
.number { text-align: right; padding-right: 1.1rem; }
tr.ours td { font-weight: 600; color: var(--accent); }
.answers td { width: 33%; font-size: .92rem; white-space: pre-line; overflow-wrap: anywhere; }
.question { font-weight: 600; margin: 1.5rem 0 0; }
img { display: block; max-width: 100%; margin: 1.2rem 0; }
img.narrow { max-width: 66%; }
pre { background: var(--wash); padding: 1rem; border-radius: 8px; overflow-x: auto;
  font: .76rem/1.5 ui-monospace, "DejaVu Sans Mono", monospace; }
summary { cursor: pointer; color: var(--accent); }
@media print { body { background: none; } main { padding: 0; } }
"""


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
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>FastICL demo</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(sections)
        + "\n</main>\n</body>\n</html>\n"
    )


def _cards(results: Mapping[str, Any]) -> str:
    cards = []
    if (lm := results["lm"]) is not None:
        ours = lm["variants"]["fasticl"]
        cards += [
            (f"{ours['decode_speedup']:.2f}×", "the dense model's decode speed"),
            (f"{ours['prefill_speedup']:.2f}×", "the dense model's prefill speed"),
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
        + _table([NAMES[name] for name in variants], [[row[name] for name in variants]], css="answers")
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
        "its answers differ from the dense model's, pruning did it; from the masked model's, rounding."
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
            _table(columns, rows, ours=len(rows) - 1),
            _image(images["lm-speed"], "Prefill and decode speed of the three models"),
            "<h3>The same questions, greedy decoding</h3>",
            answers,
            "<h3>What pruning costs</h3>",
            _image(images["lm-few-shot"], "Few-shot accuracy by relation"),
            f'<p class="note">{escape(quality)}</p>',
            "<h3>Do FastICL and masked agree?</h3>",
            _table(check_columns, checks),
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
            _image(images["icl-training"], "Training loss; sorted row norms of the neurons"),
            _image(
                images["icl-error"], "Hinge and 0/1 error over the pruning rate, smallest first and in random order"
            ),
            _image(images["icl-time"], "Inference time over the pruning rate", css="narrow"),
            _table(columns, rows),
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
    tables = [_table(("", ""), facts), _table(("stage", "seconds"), seconds), _table(("package", "version"), versions)]
    return "\n".join(["<h2>How this was measured</h2>", f"<p>{escape(how)}</p>", *tables])


def _threads(cpu: Mapping[str, Any]) -> str:
    return f"{cpu['threads']} thread{'' if cpu['threads'] == 1 else 's'}"


def _pruned_at(icl: Mapping[str, Any]) -> Mapping[str, Any]:
    """The timed rate closest to a half."""
    return min(icl["time"], key=lambda row: abs(row["rate"] - 0.5))


def _table(columns: Iterable[str], rows: Sequence[Sequence[str]], *, ours: int | None = None, css: str = "") -> str:
    """``ours`` is the row to stand out. Columns of numbers go to the right."""
    numeric = [bool(rows) and all(row[i][:1].isdigit() for row in rows) for i in range(len(rows[0]) if rows else 0)]
    classes = ['class="number"' if right and css != "answers" else "" for right in numeric]

    def line(tag: str, cells: Iterable[str]) -> str:
        return "".join(f"<{tag} {c}>{escape(cell)}</{tag}>" for cell, c in zip(cells, classes, strict=True))

    head = line("th", columns)
    body = "".join(f"<tr{' class=ours' if i == ours else ''}>{line('td', row)}</tr>" for i, row in enumerate(rows))
    table = f'<table class="{css}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
    return f'<div class="scroll">{table}</div>'


def _image(path: Path, alternative: str, *, css: str = "") -> str:
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    return f'<img class="{css}" src="data:image/png;base64,{data}" alt="{escape(alternative)}">'
