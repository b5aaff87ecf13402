"""The demo's plots, from what ``results.json`` holds."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fasticl.demo import DemoError
from fasticl.report import INK, axes, label, legend

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLORS = {"dense": "#9aa3ad", "masked": "#dd9a4a", "fasticl": "#1769aa", "decoder": "#0b3d66"}
NAMES = {"dense": "dense", "masked": "masked", "fasticl": "FastICL", "decoder": "FastICL Decoder"}
_DOMAINS = {"in_domain": ("in domain", "-"), "out_of_domain": ("out of domain", "--")}


def check_packages() -> None:
    """Raises DemoError, with the command that installs it, unless matplotlib is there."""
    if find_spec("matplotlib") is None:
        raise DemoError("the demo's plots need matplotlib: pip install 'fasticl[demo]'")


def plot(results: Mapping[str, Any], folder: Path) -> dict[str, Path]:
    """Draws and writes the PNGs; returns name -> file, without the language model's where it was left out."""
    figures = {"icl-training": _training(results["icl"]), "icl-error": _error(results["icl"])}
    figures["icl-time"] = _time(results["icl"])
    if results["lm"] is not None:
        figures["lm-speed"] = _speed(results["lm"]["variants"])
        figures["lm-few-shot"] = _few_shot(results["lm"]["variants"])
    files = {}
    for name, figure in figures.items():
        files[name] = folder / f"{name}.png"
        figure.savefig(files[name], dpi=160)
    return files


def _training(icl: Mapping[str, Any]) -> Figure:
    figure, (loss, norms) = axes(2)
    loss.plot(range(1, len(icl["losses"]) + 1), icl["losses"], color=COLORS["fasticl"], linewidth=1.4)
    loss.set_ylim(bottom=0)
    label(loss, "Training loss", "step", "hinge loss of the batch")
    norms.plot(
        [100 * i / icl["neurons"] for i in range(icl["neurons"])], icl["row_norms"], ".", color=COLORS["fasticl"]
    )
    norms.set_ylim(bottom=0)
    label(norms, "Two kinds of neurons", "neurons, smallest first, %", "row norm of W_O")
    return figure


def _error(icl: Mapping[str, Any]) -> Figure:
    figure, panels = axes(2)
    for panel, (score, title) in zip(panels, {"hinge": "Hinge error", "zero_one": "0/1 error"}.items(), strict=True):
        for order, color in (("random order", COLORS["dense"]), ("smallest first", COLORS["fasticl"])):
            for domain, (name, line) in _DOMAINS.items():
                points = icl["pruning"][order]
                panel.plot(
                    [100 * point["rate"] for point in points],
                    [point[domain][score] for point in points],
                    line,
                    color=color,
                    linewidth=1.6,
                    label=f"{order}, {name}",
                )
        panel.set_ylim(0, 1 if score == "hinge" else 0.55)
        label(panel, title, "neurons pruned, %")
    panels[1].axhline(0.5, color=INK, linewidth=0.8, linestyle=":")
    panels[1].annotate("chance", (0, 0.5), (2, 3), textcoords="offset points", fontsize=8.5, color=INK)
    panels[0].legend(frameon=False, fontsize=8.5, labelcolor=INK, loc="upper left")
    return figure


def _time(icl: Mapping[str, Any]) -> Figure:
    figure, (panel,) = axes(1, width=5.6)
    rates = [100 * row["rate"] for row in icl["time"]]
    for name, series, color in (
        ("eager_us", "PyTorch, eager", COLORS["dense"]),
        ("fasticl_us", "FastICL", COLORS["fasticl"]),
    ):
        panel.plot(
            rates, [row[name] for row in icl["time"]], "o-", color=color, linewidth=1.6, markersize=4, label=series
        )
    panel.set_ylim(bottom=0)
    label(panel, "Inference time", "neurons pruned, %", "microseconds per prompt")
    legend(panel)
    return figure


def _speed(variants: Mapping[str, Mapping[str, Any]]) -> Figure:
    figure, panels = axes(2, height=2.7)
    titles = {"prefill": "Prefill, tokens per second", "decode": "Decode, tokens per second"}
    for panel, (path, title) in zip(panels, titles.items(), strict=True):
        speeds = [variant[f"{path}_tokens_per_s"] for variant in variants.values()]
        bars = panel.bar([NAMES[name] for name in variants], speeds, 0.62, color=[COLORS[name] for name in variants])
        panel.bar_label(
            bars,
            [f"{speed:,.0f}" if speed >= 100 else f"{speed:.1f}" for speed in speeds],
            fontsize=9,
            color=INK,
            padding=2,
        )
        panel.set_ylim(top=1.15 * max(speeds))
        label(panel, title)
    return figure


def _few_shot(variants: Mapping[str, Mapping[str, Any]]) -> Figure:
    figure, (panel,) = axes(1, height=2.7)
    relations = list(next(iter(variants.values()))["few_shot"])
    width = 0.8 / len(variants)
    for i, (name, variant) in enumerate(variants.items()):
        places = [j + (i - (len(variants) - 1) / 2) * width for j in range(len(relations))]
        scores = [variant["few_shot"][relation] for relation in relations]
        panel.bar(places, scores, 0.9 * width, color=COLORS[name], label=NAMES[name])
    panel.set_xticks(range(len(relations)), relations)
    panel.set_ylim(0, 1)
    label(panel, "Few-shot accuracy")
    panel.legend(frameon=False, fontsize=8.5, labelcolor=INK, loc="upper left", bbox_to_anchor=(1, 1))
    return figure
